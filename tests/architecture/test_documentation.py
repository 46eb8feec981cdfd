"""What a user or an operator meets is documented: settings, routes, headers, codes, messages."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from todo_api.app import create_app
from todo_api.http.openapi import HEADERS, error_classes
from todo_api.http.routing import ServiceRoute
from todo_api.settings import _SENTENCES, Settings, variables

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "todo_api"
PAGES = {page.stem: page.read_text() for page in (ROOT / "docs").glob("*.md")}
APP = create_app(Settings.model_construct(), "postgresql://")
PATHS: dict[str, dict[str, Any]] = APP.openapi()["paths"]


def section(page: str, heading: str) -> str:
    """Return the text below a heading, up to the next one of the same level."""
    _, rest = PAGES[page].split(f"\n{heading}\n", 1)
    level = heading.split(" ", 1)[0]
    return rest.split(f"\n{level} ", 1)[0]


@pytest.mark.parametrize("name", sorted(variables()))
def test_setting_is_documented(name: str) -> None:
    assert re.search(rf"`{name}[`=]", "".join(PAGES.values()))


def test_routes_are_the_documented_ones() -> None:
    rows = re.findall(
        r"^\| ([A-Z]+) \| `(\S+)` \| `(\S+)` \|", section("api", "## Routes"), re.MULTILINE
    )
    documented = {(verb, path) for verb, *paths in rows for path in paths}
    ours = {
        (verb.upper(), path)
        for path, operations in PATHS.items()
        for verb in operations
        if path.startswith("/api/")
    }
    assert documented == ours


def test_routes_without_a_token_are_documented() -> None:
    paths = {route.path for route in APP.routes if isinstance(route, ServiceRoute)}
    for path in paths:
        assert re.search(rf"`(GET )?{re.escape(path)}`", section("api", "## Routes")), path


def test_headers_are_documented() -> None:
    sent = {
        parameter["name"]
        for operations in PATHS.values()
        for operation in operations.values()
        for parameter in operation.get("parameters", [])
        if parameter["in"] == "header"
    }
    requests, answers = section("api", "## Headers").split("Of an answer:")
    assert sent <= documented_headers(requests)
    assert documented_headers(answers) == set(HEADERS)


def documented_headers(text: str) -> set[str]:
    rows = re.findall(r"^\| (`.+?`) \| \S", text, re.MULTILINE)
    return {name for row in rows for name in re.findall(r"`([A-Za-z-]+)`", row)}


@pytest.mark.parametrize("code", sorted({each.code for each in error_classes()}))
def test_code_has_advice_for_the_operator(code: str) -> None:
    rows = section("troubleshooting", "## Answers by code")
    assert re.search(rf"^\| .*`{code}`.* \| \S", rows, re.MULTILINE)


def text_of(node: ast.expr) -> str:
    """Return a string as it is written, with `…` for each value in it."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) for part in node.values)
    return "…"


NAMES = "|".join([*variables(), "FILE", "USER"])
OF_SETTING = re.compile(rf"({NAMES})( and ({NAMES}))?: ")
"""How a message for the operator begins."""
MESSAGE_OF = {"StartupError": 0, "_unusable": 0, "_wrong": 0, "refusal": 1}
"""The functions that get a message, and as which argument."""


def messages() -> Iterator[str]:
    """Yield every message for the operator: those that end a command, and the log's."""
    for file in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Constant | ast.JoinedStr):
                if OF_SETTING.match(text_of(node)):
                    yield text_of(node)
            elif isinstance(node, ast.Call):
                yield from _message(node)
    yield from _SENTENCES.values()


def _message(call: ast.Call) -> Iterator[str]:
    match call.func:
        case ast.Name(id=name) if len(call.args) > MESSAGE_OF.get(name, len(call.args)):
            yield text_of(call.args[MESSAGE_OF[name]])
        case ast.Attribute(value=ast.Name(id="log"), attr="warning" | "error"):
            yield text_of(call.args[0])


def leading_words(message: str) -> str:
    """Return a message up to the advice or the reason, without the values at its ends."""
    words = re.split(r"[;,`]| \(|: …| because ", message)[0]
    return re.sub(r"^[…: ]+|[…: ]+$", "", words)


LEADING_WORDS = sorted({leading_words(each) for each in messages()} - set(variables()) - {""})


@pytest.mark.parametrize("words", LEADING_WORDS)
def test_message_is_in_the_troubleshooting(words: str) -> None:
    rows = re.findall(r"^\| (.+?) \| \S", PAGES["troubleshooting"], re.MULTILINE)
    assert any(words in row for row in rows)
