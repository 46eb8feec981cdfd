"""What all requests and responses have in common: an id, header fields, HEAD."""

import re
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import count
from typing import TypeAlias

from starlette.types import ASGIApp, Message, Receive, Scope, Send

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")

_PROCESS_ID = secrets.token_hex(8).encode()
_numbers = count()

Fields: TypeAlias = Mapping[bytes, Sequence[bytes]]
"""The values of a request's header fields by name, in `scope["fields"]`."""

COMMON_HEADERS = (
    (b"vary", b"Origin"),  # CORS headers depend on it, and so does their absence
    (b"cache-control", b"no-store"),
    (b"x-content-type-options", b"nosniff"),
)
"""Sent where the response does not say otherwise."""


class Envelope:
    """The outermost layer: whatever answers, also a refused preflight or a 500, goes through it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve the request."""
        fields = scope["fields"] = fields_by_name(scope["headers"])
        own_id = request_id(fields)
        is_head = scope["method"] == "HEAD"
        scope["request_id"] = own_id.decode()
        if is_head:  # HEAD is GET without the body (RFC 9110, section 9.3.2)
            scope = {**scope, "method": "GET", "sent": scope}

        async def send_enveloped(message: Message) -> None:
            if message["type"] == "http.response.start":
                scope["status"] = message["status"]
                headers = message["headers"]
                present = dict(headers)
                headers += [each for each in COMMON_HEADERS if each[0] not in present]
                headers.append((b"x-request-id", own_id))
                if "rate_limit" in scope:
                    headers += _rate_limit(*scope["rate_limit"])
            elif is_head:
                message = {**message, "body": b""}
            await send(message)

        await self._app(scope, receive, send_enveloped)


def _rate_limit(policy: str, left: str | None) -> Iterator[tuple[bytes, bytes]]:
    """Give the fields of draft-ietf-httpapi-ratelimit-headers, as far as they are known."""
    yield b"ratelimit-policy", policy.encode()
    if left is not None:
        yield b"ratelimit", left.encode()


def fields_by_name(headers: Iterable[tuple[bytes, bytes]]) -> Fields:
    """Sort header fields by name, for all who look for one."""
    fields: dict[bytes, list[bytes]] = {}
    for name, value in headers:
        fields.setdefault(name, []).append(value)
    return fields


def request_id(fields: Fields) -> bytes:
    """Return the caller's id where it is harmless, else a new one."""
    sent = fields.get(b"x-request-id", ())
    if len(sent) == 1 and _REQUEST_ID.fullmatch(its_id := sent[0].strip(b" \t")):
        return bytes(its_id)
    return _PROCESS_ID + b"%016x" % next(_numbers)
