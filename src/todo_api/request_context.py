"""Everything the service learns about one request, from its header to its log line."""

import re
import secrets
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, Self, TypeAlias

from starlette.types import Message, Scope

from todo_api.errors import ApiError

HeaderFields: TypeAlias = Mapping[bytes, Sequence[bytes]]
"""The values of header fields by name, in lower case."""

_KEY = "todo_api"
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")
_PROCESS_ID = secrets.token_hex(8)
_numbers = count()


async def _await(message: Awaitable[Message]) -> Message:
    return await message


async def _wait(event: Awaitable[bool]) -> bool:
    return await event


Opener: TypeAlias = Callable[["RequestContext", str | None], Awaitable[Any]]
"""Authenticates a request, and returns what its owner may reach. If the path names a user, they
must be the owner."""


async def _open_nothing(context: "RequestContext", named: str | None) -> Any:
    del context, named
    raise NotImplementedError("Only an application of todo-api serves private routes.")


@dataclass(slots=True)
class RequestContext:
    """The one object of ours in an ASGI scope. HTTP, authentication and logs share it."""

    headers: HeaderFields
    request_id: str
    method: str
    """The method that the client sent. The service handles HEAD as GET."""
    client_address: str | None
    refusal: ApiError | None = None
    """Why the protocol refuses this request before the application sees it."""
    route: str | None = None
    """The template of the route, such as `/api/tasks/{id}`."""
    user: str | None = None
    """The verified subject of the token."""
    status: int = 0
    """The status of the response, 0 until it starts."""
    error: str | None = None
    """The class of the error that the client gets, see `todo_api.errors`."""
    reason: str | None = None
    """Why the token was refused. It never contains the token or its subject."""
    client_left: bool = False
    """Whether the client left before a response started."""
    body: bytes | None = None
    """The request's body, once it was read."""
    rate_limit_headers: Sequence[tuple[bytes, bytes]] = ()
    open: Opener = _open_nothing
    """What a private route calls. The application that serves the request sets it."""
    await_body: Callable[[Awaitable[Message]], Awaitable[Message]] = _await
    """Awaits a part of the body that has not arrived yet."""
    step_aside: Callable[[Awaitable[bool]], Awaitable[bool]] = _wait
    """Awaits an event of other requests, without a slot."""
    on_shutdown: Callable[[], None] | None = None
    """Called when the server begins to shut down. A request that waits ends its wait."""

    @property
    def announced_length(self) -> int:
        """The length of the body according to `Content-Length`, or 0."""
        value = self.headers.get(b"content-length", [b"0"])[0]
        return int(value[:20]) if value.isdigit() else 0

    @classmethod
    def of(cls, scope: Scope) -> Self:
        """Return the context of a request. The first call makes it."""
        context: Self | None = scope.get(_KEY)
        if context is None:
            headers = headers_by_name(scope["headers"])
            client = scope.get("client")
            context = scope[_KEY] = cls(
                headers, _request_id(headers), scope["method"], client and client[0]
            )
        return context


def headers_by_name(headers: Iterable[tuple[bytes, bytes]]) -> HeaderFields:
    """Group header fields by name."""
    grouped: dict[bytes, list[bytes]] = {}
    for name, value in headers:
        grouped.setdefault(name, []).append(value)
    return grouped


def _request_id(headers: HeaderFields) -> str:
    """Return the caller's id if it is harmless, otherwise a new one."""
    sent = headers.get(b"x-request-id", ())
    if len(sent) == 1 and _REQUEST_ID.fullmatch(its_id := sent[0].strip(b" \t")):
        return its_id.decode()
    return f"{_PROCESS_ID}{next(_numbers):016x}"
