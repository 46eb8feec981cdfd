"""What clients, operators and their tools rely on, as short sentences to compare releases by.

`PYTHONPATH=tests python -m support.promises` prints them as JSON.
"""

import json
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import typer.main
from structlog.testing import capture_logs

from todo_api.app import create_app
from todo_api.cli import cli
from todo_api.errors import FIELD_REASONS
from todo_api.http.metrics import metrics
from todo_api.http.observation import access_log
from todo_api.http.openapi import error_classes
from todo_api.request_context import RequestContext
from todo_api.settings import Settings, variables

Json = dict[str, Any]


def promises() -> dict[str, list[str]]:
    """Return the sentences by kind. A sentence that disappears is a broken promise."""
    document = create_app(Settings.model_construct(), "postgresql://").openapi()
    found = {
        "operations": _operations(document),
        "answers": _shared_answers(document),
        "schemas": _schemas(document),
        "errors": _errors(),
        "reasons": FIELD_REASONS,
        "settings": (f"{name} is {default}" for name, default in variables().items()),
        "commands": _commands(),
        "metrics": _metrics(),
        "log": _log_members(),
    }
    return {kind: sorted(set(sentences)) for kind, sentences in found.items()}


def _operations(document: Json) -> Iterator[str]:
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            name = f"{method.upper()} {path}"
            yield f"{name} is {operation['operationId']}"
            yield from (f"{name} {rest}" for rest in _input(operation))
            for status, response in operation["responses"].items():
                yield from (f"{name} answers {rest}" for rest in _answer(status, response))


def _input(operation: Json) -> Iterator[str]:
    parameters = operation.get("parameters", [])
    body = operation.get("requestBody", {})
    needed = [each["name"] for each in parameters if each.get("required")]
    yield f"needs {_listed([*needed, *(['a body'] if body.get('required') else [])])}"
    for each in parameters:
        for form in _forms(each["schema"]):
            yield f"takes {each['name']} ({each['in']}): {form}"
    for media_type, content in body.get("content", {}).items():
        for form in _forms(content["schema"]):
            yield f"takes a body ({media_type}): {form}"


def _shared_answers(document: Json) -> Iterator[str]:
    for name, response in document["components"]["responses"].items():
        yield from _answer(name, response)


def _answer(name: str, response: Json) -> Iterator[str]:
    if "$ref" in response:
        yield f"{name} as {_name(response)}"
        return
    yield from (f"{name} with {header}" for header in response["headers"])
    for media_type, content in response.get("content", {}).items():
        yield f"{name} ({media_type}): {' or '.join(_forms(content['schema']))}"


def _schemas(document: Json) -> Iterator[str]:
    """Say what members are: each accepted form of a request's, and all forms of an answer's."""
    schemas = document["components"]["schemas"]
    operations = [each for path in document["paths"].values() for each in path.values()]
    of_requests = _reached(schemas, [each.get("requestBody", {}) for each in operations])
    for name, schema in schemas.items():
        needed = schema.get("required", [])
        is_read = name in of_requests
        if is_read:
            yield f"{name} needs {_listed(needed)}"
        for member, content in schema["properties"].items():
            forms = _forms(content)
            if is_read:
                yield from (f"{name}.{member} takes {form}" for form in forms)
            else:
                presence = "is always" if member in needed else "can be"
                yield f"{name}.{member} {presence} {' or '.join(forms)}"


def _reached(schemas: Json, start: Any) -> set[str]:
    """Return the names of the schemas that lead on from here."""
    found: set[str] = set()
    waiting = [start]
    while waiting:
        each = waiting.pop()
        if isinstance(each, dict):
            waiting += each.values()
            name = _name(each) if "$ref" in each else None
            if name in schemas and name not in found:
                found.add(name)
                waiting.append(schemas[name])
        elif isinstance(each, list):
            waiting += each
    return found


def _forms(schema: Json) -> list[str]:
    """Return what a value can be: a schema's name, a value, or a type."""
    if "$ref" in schema:
        return [_name(schema)]
    if choices := schema.get("anyOf") or schema.get("oneOf"):
        return [form for choice in choices for form in _forms(choice)]
    if "enum" in schema:
        return [json.dumps(value) for value in schema["enum"]]
    if "const" in schema:
        return [json.dumps(schema["const"])]
    if "items" in schema:
        return [f"array of {' or '.join(_forms(schema['items']))}"]
    return [schema.get("type", "anything")]


def _name(reference: Json) -> str:
    return str(reference["$ref"]).rpartition("/")[2]


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "nothing"


def _errors() -> Iterator[str]:
    for each in error_classes():
        if each.__module__.startswith("todo_api."):
            yield f"{each.status_code} {each.code}, {each.__name__} in log and metrics"


def _commands() -> Iterator[str]:
    group: Any = typer.main.get_command(cli)
    for name, command in {"": group, **group.commands}.items():
        program = f"todo-api {name}".strip()
        needed = [each.name for each in command.params if each.required]
        yield f"{program} needs {_listed(needed)}"
        for each in command.params:
            for form in each.opts if each.param_type_name == "option" else [each.name]:
                yield f"{program} takes {form}"


def _metrics() -> Iterator[str]:
    ours = metrics()
    for each in (ours._requests, ours._refusals, ours._pool_wait, *ours._gauges.values()):
        yield f"{each._name} is a {each._type} by {_listed(each._labelnames)}"


def _log_members() -> list[str]:
    context = RequestContext(headers={}, request_id="id", method="GET", client_address=None)
    with capture_logs() as lines:
        access_log(b"key")(context, 0.001)
    return [member for member in lines[0] if member != "log_level"]


if __name__ == "__main__":
    json.dump(promises(), sys.stdout, indent=1)
    print()  # noqa: T201
