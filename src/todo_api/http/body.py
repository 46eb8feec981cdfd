"""Reading what a client sent, strictly: where a lenient parser loses meaning, we refuse."""

import re
from typing import Any

import jiter
from starlette.requests import ClientDisconnect, Request

from todo_api.errors import BadRequest, BodyTooLarge, UnsupportedMediaType

MAXIMUM_BYTES = 131_072


async def read_object(request: Request) -> dict[str, Any] | None:
    """Return the JSON object of a request's body, or None where the body is empty.

    RFC 8259, strictly: UTF-8 without a byte-order mark, no duplicate members, no NaN, no lone
    surrogates. Raises `BodyTooLarge`, `UnsupportedMediaType` or `BadRequest`.
    """
    body = await _read(request)
    if not body:
        return None
    _check_media_type(request)
    return _parse(body)


async def _read(request: Request) -> bytes:
    """Read at most the limit; what is over it is refused without reading on."""
    announced = request.headers.get("content-length", "0")
    if announced.isdecimal() and int(announced[:20]) > MAXIMUM_BYTES:
        raise BodyTooLarge(f"Body must be {MAXIMUM_BYTES} bytes or less")
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > MAXIMUM_BYTES:
                raise BodyTooLarge(f"Body must be {MAXIMUM_BYTES} bytes or less")
    except ClientDisconnect:  # nobody will read this answer
        raise BadRequest("The body ended early") from None
    return bytes(body)


def _check_media_type(request: Request) -> None:
    values = request.headers.getlist("content-type")
    if len(values) > 1:
        raise BadRequest("Send one Content-Type header")
    media_type = values[0].partition(";")[0].strip().lower() if values else None
    if media_type != "application/json":
        raise UnsupportedMediaType
    if request.headers.get("content-encoding", "identity").lower() != "identity":
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
    """Keep what and where of the parser's message, and leave out the name it quotes."""
    return re.sub(r'Detected duplicate key ".*"', "duplicate member", message, flags=re.DOTALL)
