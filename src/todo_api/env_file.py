"""The settings in `.env`, read so that nothing in the file is dropped.

python-dotenv, which parses it, leaves out a line that it cannot parse. The setting on this line
would then count as not set, and the program would serve another database than the one it names.
"""

import re
from collections.abc import Collection, Mapping
from io import StringIO
from pathlib import Path

from dotenv.parser import Binding, parse_stream
from dotenv.variables import Variable, parse_variables

from todo_api.errors import StartupError


def read(file: Path, names: Collection[str], environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables in the file, which may be missing.

    `names` are our variables, in lower case. A value may refer to other variables, as `${NAME}` or
    `${NAME:-default}`. Raises `StartupError` with the line and the problem, without the value.
    """
    values: dict[str, str] = {}
    lines: dict[str, int] = {}
    for binding in parse_stream(StringIO(_text(file))):
        if problem := _problem(binding, names, lines, {**environment, **values}):
            raise StartupError(f"{file} line {_line(binding)}: {problem}")
        if binding.key is not None and binding.value is not None:
            known = {**environment, **values}
            lines[binding.key.lower()] = _line(binding)
            values[binding.key] = "".join(
                atom.resolve(known) for atom in parse_variables(binding.value)
            )
    return values


def _text(file: Path) -> str:
    try:
        content = file.read_bytes()  # also from a pipe, which some managers of secrets make
    except FileNotFoundError:
        if file.is_symlink():
            raise StartupError(f"{file}: links to a file that does not exist") from None
        return ""
    except OSError as error:
        raise StartupError(f"{file}: cannot be read ({error.strerror})") from None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise StartupError(f"{file} line {line}: must be UTF-8 text") from None


def _line(binding: Binding) -> int:
    """Return the line of a binding, which begins with the empty lines before it."""
    text = binding.original.string
    before = text[: len(text) - len(text.lstrip())]
    return binding.original.line + len(re.findall(r"\r\n|\n|\r", before))


def _problem(
    binding: Binding, names: Collection[str], lines: Mapping[str, int], known: Mapping[str, str]
) -> str | None:
    """Return what is wrong with a binding, or None."""
    if binding.error:
        return "cannot be parsed; write NAME=value, and close every quote"
    if binding.key is None:
        return None
    if binding.value is None:
        return "has no `=`; write NAME=value"
    for taken_in in re.findall(r"[\r\n]\s*(?:export\s+)?(\w+)\s*=", binding.value):
        if taken_in.lower() in names:
            return f"the quote that opens here also takes in {taken_in.upper()}; close it"
    if binding.key.lower() in names:
        return _problem_of_setting(binding.key, binding.value, lines, known)
    return None


def _problem_of_setting(
    key: str, value: str, lines: Mapping[str, int], known: Mapping[str, str]
) -> str | None:
    """Return what is wrong with the value of one of our variables, or None."""
    name = key.upper()
    if first := lines.get(key.lower()):
        return f"{name} is already set on line {first}; keep one of them"
    for atom in parse_variables(value):
        if isinstance(atom, Variable) and atom.default is None and atom.name not in known:
            return f"{name} refers with ${{...}} to a variable that is not set"
    return None
