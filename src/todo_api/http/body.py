"""Strict parsing of request bodies. Ambiguous JSON is refused."""

import re
from typing import Any

import jiter
from starlette.requests import Request

from todo_api.errors import BadRequest, BodyTooLarge, UnsupportedMediaType
from todo_api.request_context import HeaderFields, RequestContext

MAXIMUM_BYTES = 131_072


async def read_object(request: Request) -> dict[str, Any] | None:
    """Return the JSON object of a request's body, or None if the body is empty.

    RFC 8259 applies strictly: UTF-8 without a byte-order mark, no duplicate members, no NaN and no
    lone surrogates. Raises `BodyTooLarge`, `UnsupportedMediaType` or `BadRequest`.
    """
    headers = RequestContext.of(request.scope).headers
    body = await _read(request, headers.get(b"content-length", [b"0"])[0])
    if not body:
        return None
    _check_media_type(headers)
    return _parse(body)


async def _read(request: Request, announced: bytes) -> bytes:
    """Read the body. Refuse it as soon as it exceeds the limit, and stop reading."""
    if announced.isdigit() and int(announced[:20]) > MAXIMUM_BYTES:
        raise BodyTooLarge(f"Body must be {MAXIMUM_BYTES} bytes or less")
    body = b""
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":  # the client cannot read this answer
            raise BadRequest("The body ended early")
        body += bytes(message.get("body", b""))
        if len(body) > MAXIMUM_BYTES:
            raise BodyTooLarge(f"Body must be {MAXIMUM_BYTES} bytes or less")
        if not message.get("more_body", False):
            return body


def _check_media_type(headers: HeaderFields) -> None:
    types = headers.get(b"content-type", [])
    if len(types) > 1:
        raise BadRequest("Send one Content-Type header")
    if not types or types[0].partition(b";")[0].strip().lower() != b"application/json":
        raise UnsupportedMediaType
    if any(coding.lower() != b"identity" for coding in headers.get(b"content-encoding", ())):
        raise UnsupportedMediaType("Content-Encoding is not supported: send plain JSON")


def _parse(body: bytes) -> dict[str, Any]:
    try:
        value = jiter.from_json(
            body, allow_inf_nan=False, catch_duplicate_keys=True, cache_mode="keys"
        )
    except ValueError as error:
        raise BadRequest(f"Body is not valid JSON: {_without_content(str(error))}") from None
    if not isinstance(value, dict):
        raise BadRequest("Body must be a JSON object")
    return value


def _without_content(message: str) -> str:
    """Keep the problem and its position, and remove the member's name that the parser quotes."""
    return re.sub(r'Detected duplicate key ".*"', "duplicate member", message, flags=re.DOTALL)
