"""Files of tasks, as JSON lines or as CSV, read and written a task at a time.

A line of JSON is a task as the API shows it. CSV has the same members as columns, in UTF-8 with a
byte-order mark, for spreadsheets. It differs in three points, so that every task comes back as it
was:

- An empty cell is null, and a lone apostrophe is the empty text.
- Spreadsheets run a cell that begins with = + - @ as a formula. So such a text gets an apostrophe
  in front. A text that has apostrophes there already gets one more.
- `true` and `false` may be in capital letters.
"""

import csv
import json
import re
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, BinaryIO, Literal, NamedTuple

from todo_api.errors import InvalidJson, StartupError
from todo_api.http.body import MAXIMUM_BYTES, parse_object
from todo_api.tasks.fields import BY_NAME

_FORMULA = "=+\\-@\t\r\n\uff1d\uff0b\uff0d\uff20"
"""Characters that begin a formula, in some spreadsheet. The last four are the wide ones."""
_NEEDS_APOSTROPHE = re.compile(f"'*(?:[{_FORMULA}]|$)")
_HAS_APOSTROPHE = re.compile(f"''*(?:[{_FORMULA}]|$)")
_BOOLEANS = {"true": True, "false": False}


Format = Literal["jsonl", "csv"]


class Line(NamedTuple):
    """A task of a file, and the number of its first line."""

    number: int
    members: dict[str, Any]


def refusal(number: int, why: str) -> StartupError:
    """Return the error of a line. `why` may quote a name of the file, but shows no control code."""
    shown = "".join(each if each.isprintable() else "?" for each in why)
    return StartupError(f"FILE, line {number}: {shown}; nothing was imported")


def write(tasks: Iterable[bytes], file: BinaryIO, form: Format) -> Iterator[None]:
    """Write each task, given as its JSON text, and yield after it."""
    if form == "csv":
        yield from _write_csv(tasks, file)
        return
    for task in tasks:
        file.write(task + b"\n")
        yield


class _Encoding:
    """A text file for `csv`, without a buffer of its own."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def write(self, text: str) -> int:
        return self._file.write(text.encode())


def _write_csv(tasks: Iterable[bytes], file: BinaryIO) -> Iterator[None]:
    file.write(BOM_UTF8)
    writer = csv.writer(_Encoding(file))
    writer.writerow(BY_NAME)
    for task in tasks:
        writer.writerow([_cell(value) for value in json.loads(task).values()])
        yield


def _cell(value: object) -> object:
    if isinstance(value, str):
        return f"'{value}" if _NEEDS_APOSTROPHE.match(value) else value
    return str(value).lower() if isinstance(value, bool) else value


def read(file: BinaryIO, form: Format) -> Iterator[Line]:
    """Yield the tasks of a file. Raises `StartupError` with the number of the line."""
    file.seek(0)
    lines = _Lines(file)
    return _read_csv(lines) if form == "csv" else _read_json(lines)


class _Lines:
    """The lines of a file, of a limited length."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.number = 0
        self.taken = 0
        """The bytes since the last task. A cell of CSV may have several lines."""

    def __iter__(self) -> Iterator[bytes]:
        while line := self._file.readline(MAXIMUM_BYTES + 1):
            self.number += 1
            self.taken += len(line)
            if self.taken > MAXIMUM_BYTES:
                raise refusal(self.number, f"has a task of more than {MAXIMUM_BYTES} bytes")
            if self.number == 1:
                line = self._without_mark(line)
            yield line

    @staticmethod
    def _without_mark(line: bytes) -> bytes:
        if line.startswith((BOM_UTF16_LE, BOM_UTF16_BE)):
            raise refusal(1, "is UTF-16; save the file as UTF-8")
        return line.removeprefix(BOM_UTF8)


def _read_json(lines: _Lines) -> Iterator[Line]:
    for line in lines:
        lines.taken = 0
        if line.strip():
            try:
                members = parse_object(line, "it")
            except InvalidJson as error:
                raise refusal(lines.number, error.message) from None
            yield Line(lines.number, members)


def _read_csv(lines: _Lines) -> Iterator[Line]:
    rows = csv.reader(_decoded(lines), strict=True)
    first = lines.number + 1
    names = _next_row(rows, lines)
    if names is not None:
        _check_names(names)
    while names is not None:
        lines.taken, first = 0, lines.number + 1
        cells = _next_row(rows, lines)
        if cells is None:
            return
        if cells:  # not an empty line
            yield Line(first, _members(first, names, cells))


def _decoded(lines: _Lines) -> Iterator[str]:
    for line in lines:
        try:
            yield line.decode()
        except UnicodeDecodeError:
            raise refusal(lines.number, "is not UTF-8; save the file as UTF-8") from None


def _next_row(rows: Iterator[list[str]], lines: _Lines) -> list[str] | None:
    try:
        return next(rows, None)
    except csv.Error as error:
        raise refusal(lines.number, f"is not CSV with commas ({error})") from None


def _check_names(names: list[str]) -> None:
    """Refuse a first line that is no header, without showing it: it may be a task."""
    for place, name in enumerate(names, 1):
        if name not in BY_NAME:
            raise refusal(1, f"column {place} has no name of a field; begin with a line of names")
        if names.index(name) < place - 1:
            raise refusal(1, f"column {place} has the name of an earlier one")


def _members(number: int, names: list[str], cells: list[str]) -> dict[str, Any]:
    if len(cells) != len(names):
        raise refusal(number, f"has {len(cells)} cells, and the first line {len(names)} names")
    given: Mapping[str, str] = dict(zip(names, cells, strict=True))
    return {name: _value(name, cell) for name, cell in given.items() if cell}


def _value(name: str, cell: str) -> object:
    if name == "completed":
        return _BOOLEANS.get(cell.lower(), cell)
    return cell[1:] if _HAS_APOSTROPHE.match(cell) else cell
