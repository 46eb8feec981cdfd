"""The OpenAPI document, beyond what FastAPI finds in the routes' signatures.

Clients are generated from it. So it says the same thing once, as a component, and in plain JSON
Schema, because generators read clever schemas differently or not at all.
"""

import re
from collections.abc import Iterable, Iterator
from http import HTTPStatus
from importlib.metadata import version
from typing import Any

from fastapi.encoders import jsonable_encoder

from todo_api.errors import ApiError
from todo_api.http.answers import FieldsProblem, Problem

Json = dict[str, Any]

INFORMATION: Json = {
    "title": "todo-api",
    "summary": "A multi-user to-do list: every user sees their own tasks and nothing else.",
    "description": "Two families of paths serve the same tasks. The token-scoped paths, "
    "`/api/tasks`, take the user from the token. The user-scoped paths, `/api/{user_id}/tasks`, "
    "also name the user, who must be the token's. `PATCH …/complete` without a body toggles a task "
    "in the first family and completes it in the second. A path that fits both is token-scoped.",
    "version": version("todo-api"),
    "contact": {"name": "The maintainers of todo-api"},
    "license_info": {"name": "MIT", "identifier": "MIT"},
    "servers": [{"url": "/", "description": "The server that this document comes from."}],
    "openapi_tags": [
        {"name": "tasks", "description": "The tasks of the token's user."},
        {"name": "user tasks", "description": "The same tasks, with the user in the path."},
        {"name": "health", "description": "For probes. These paths need no token."},
        {"name": "account", "description": "Erase the user with everything they own, for good."},
    ],
}
"""What FastAPI is told of the API as a whole."""


def _text(description: str, example: str, *, required: bool = False) -> Json:
    schema = {"type": "string"}
    return {"description": description, "required": required, "schema": schema, "example": example}


HEADERS: Json = {
    "X-Request-ID": _text(
        "The request's id in the log: the client's, if it is 1 to 128 of `A-Za-z0-9._-`.",
        "0b5c3c2e6d1f4a4e9a7d5b8c1e2f3a4b",
        required=True,
    ),
    "Cache-Control": _text(
        "`private, no-cache` if a browser may keep the answer and ask whether it is still true, "
        "otherwise `no-store`.",
        "no-store",
        required=True,
    ),
    "ETag": _text(
        "The version of the task or list, for `If-Match` and `If-None-Match`.", '"7"', required=True
    ),
    "Link": _text(
        "The path of the next page, if there is one.", '</api/tasks?limit=20&cursor=x>; rel="next"'
    ),
    "X-Total-Count": _text("How many tasks match. Only with `count=true`.", "42"),
    "Idempotency-Replayed": _text(
        "`true` if this is the stored answer to an earlier request with the key.", "true"
    ),
    "Vary": _text("The request's fields that the answer depends on.", "Origin", required=True),
    "X-Content-Type-Options": _text("The media type is as declared.", "nosniff", required=True),
    "RateLimit-Policy": _text("The limit, if the operator has set one.", '"minute";q=600;w=60'),
    "RateLimit": _text(
        "How many requests are left (`r`), and in how many seconds there is another one (`t`). "
        "Absent if there is no limit, or if all processes count together.",
        '"minute";r=599;t=0',
    ),
    "Location": _text(
        "The path of the new task, in the family of the request.", "/api/tasks/42", required=True
    ),
    "Allow": _text("The methods of the path. Only with 405.", "GET, HEAD, OPTIONS, POST"),
    "Accept": _text("The media type that a body must have.", "application/json"),
    "WWW-Authenticate": _text(
        'How to sign in. With `error="invalid_token"`, the token that was sent is refused.',
        'Bearer error="invalid_token"',
        required=True,
    ),
    "Retry-After": _text("The seconds to wait before another attempt.", "1"),
}
"""Every header field of an answer that is not part of HTTP itself or of CORS."""

_COMMON = ("X-Request-ID", "Cache-Control", "Vary", "X-Content-Type-Options")
_LIMITED = ("RateLimit-Policy", "RateLimit")
_OF_STATUS = {
    401: ("WWW-Authenticate", *_LIMITED),
    403: (),
    412: ("ETag", *_LIMITED),
    415: ("Accept", *_LIMITED),
    429: ("Retry-After", *_LIMITED),
    500: ("Retry-After", *_LIMITED),
    503: ("Retry-After", *_LIMITED),
}
_OTHER_ERROR = "OtherError"


def error_responses(*statuses: int) -> dict[int | str, Json]:
    """Return the `responses` of a route that can have errors of these statuses.

    References, because FastAPI builds a model anew for each response that has one: with models for
    the errors, the application would take 49 ms to build in place of 28 (measured).
    """
    return {status: {"$ref": f"#/components/responses/{_name_of(status)}"} for status in statuses}


def completed(document: Json) -> Json:
    """Add to FastAPI's document what it cannot know, in place, and return it."""
    schemas = document["components"]["schemas"]
    for model in (Problem, FieldsProblem):
        schemas[model.__name__] = jsonable_encoder(model.model_json_schema(), exclude_none=True)
    operations = [each for path in document["paths"].values() for each in path.values()]
    used: set[int] = set()
    for schema in schemas.values():
        _restore_nulls(schema)
    for operation in operations:
        operation.setdefault("security", [])
        used |= _share_errors(operation["responses"])
        _add_headers(operation)
        _complete_body(operation, schemas)
        for response in operation["responses"].values():
            _show_example(response.get("content", {}), schemas)
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    document["components"] |= {"headers": HEADERS, "responses": _shared_responses(used)}
    _write_integers(document)
    return document


def _restore_nulls(schema: Json) -> None:
    """Show null in the example of a schema where a member is required. FastAPI drops each null."""
    required = schema.get("required", [])
    for number, example in enumerate(schema.get("examples", [])):
        shown = [name for name in schema["properties"] if name in example or name in required]
        schema["examples"][number] = {name: example.get(name) for name in shown}


def _share_errors(responses: Json) -> set[int]:
    """Leave only the references to the shared responses of errors, and return their statuses.

    FastAPI's 422 goes, because wrong input is 400 here.
    """
    if "$ref" not in responses.get("422", {}):
        responses.pop("422", None)
    ours = {int(status) for status, response in responses.items() if "$ref" in response}
    for status in ours:
        del responses[str(status)]["description"]  # FastAPI's; the shared response has its own
    responses["default"] = {"$ref": f"#/components/responses/{_OTHER_ERROR}"}
    return ours


def _add_headers(operation: Json) -> None:
    """Document the header fields of an operation's own responses."""
    names = (*_COMMON, *(_LIMITED if operation["security"] else ()))
    for response in operation["responses"].values():
        if "$ref" not in response:
            response["headers"] = references(names) | response.get("headers", {})


def references(names: Iterable[str]) -> Json:
    """Return references to the descriptions of header fields."""
    return {name: {"$ref": f"#/components/headers/{name}"} for name in names}


def _complete_body(operation: Json, schemas: Json) -> None:
    """Show an example of the body. A body that may be left out has no default value.

    FastAPI takes one from the handler's signature, and "try it out" would send it.
    """
    body = operation.get("requestBody", {"content": {}})
    _show_example(body["content"], schemas)
    for media in body["content"].values():
        media["schema"].pop("default", None)
        name = str(media["schema"].get("$ref", "")).rpartition("/")[2]
        if description := schemas.get(name, {}).get("description"):
            body.setdefault("description", description)


def _show_example(content: Json, schemas: Json) -> None:
    """Show the example of the schema where a body has none of its own."""
    for media in content.values():
        schema = media.get("schema", {})
        is_array = schema.get("type") == "array"
        reference = str((schema["items"] if is_array else schema).get("$ref", ""))
        examples = schemas.get(reference.rpartition("/")[2], {}).get("examples")
        if examples and not media.keys() & {"example", "examples"}:
            media["example"] = examples[:1] if is_array else examples[0]


def error_classes(base: type[ApiError] = ApiError) -> Iterator[type[ApiError]]:
    """Iterate over every error with a code, from the general to the special."""
    if hasattr(base, "code"):
        yield base
    for special in base.__subclasses__():
        yield from error_classes(special)


def _name_of(status: int) -> str:
    """Return the name of the shared response of a status: its most general error."""
    return next(each.__name__ for each in error_classes() if each.status_code == status)


def _shared_responses(used: set[int]) -> Json:
    """Return the responses that operations refer to, with every error of the service."""
    every = list(error_classes())
    responses = {
        _name_of(status): _error_response(
            [each for each in every if each.status_code == status],
            headers=(*_COMMON, *_OF_STATUS.get(status, _LIMITED)),
        )
        for status in sorted(used)
    }
    others = [each for each in every if each.status_code not in used]
    responses[_OTHER_ERROR] = _error_response(others, headers=(*_COMMON, "Allow", *_LIMITED))
    return responses


def _error_response(errors: list[type[ApiError]], headers: Iterable[str]) -> Json:
    """Return a response with an example for each code of these errors."""
    by_code = {each.code: each for each in reversed(errors)}  # of several, the most general
    examples = {
        code: {"summary": _first_sentence(each), "value": each.example()}
        for code, each in reversed(by_code.items())
    }
    has_fields = any(each.status_code == HTTPStatus.BAD_REQUEST for each in errors)
    model = FieldsProblem if has_fields else Problem
    schema = {"$ref": f"#/components/schemas/{model.__name__}"}
    return {
        "description": "\n".join(
            f"- `{code}`: {example['summary']}" for code, example in examples.items()
        ),
        "headers": references(headers),
        "content": {"application/json": {"schema": schema, "examples": examples}},
    }


def _first_sentence(error: type[ApiError]) -> str:
    docstring = " ".join((error.__doc__ or "").split())
    return re.split(r"(?<=\.) ", docstring)[0]


def _write_integers(part: Any) -> None:
    """Write a limit of an integer as one. FastAPI's models make `1.0` of it."""
    if isinstance(part, list):
        for each in part:
            _write_integers(each)
    elif isinstance(part, dict):
        for each in part.values():
            _write_integers(each)
        if part.get("type") == "integer":
            limits = {name: int(part[name]) for name in ("minimum", "maximum") if name in part}
            part.update(limits)
