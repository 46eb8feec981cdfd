"""How much is worked on at once, and how long a request may take.

Health and documents are not counted: a probe must not fail because there is much to do.
"""

import asyncio
from asyncio import CancelledError
from collections.abc import Awaitable
from typing import cast

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from todo_api.errors import Overloaded, RequestTimeout
from todo_api.limiter import Limiter
from todo_api.request_context import RequestContext

WAITING = 20
"""How many may wait for each place."""


class _Place:
    """The place of one request, which it leaves while it waits for its client."""

    __slots__ = ("_is_taken", "_limiter")

    def __init__(self, limiter: Limiter[None]) -> None:
        self._limiter = limiter
        self._is_taken = False

    async def take(self) -> None:
        """Take it, as soon as there is one. Raises `Overloaded`."""
        if not self._limiter.try_acquire():
            await self._limiter.wait()
        self._is_taken = True

    def leave(self) -> None:
        """Leave it to somebody else."""
        if self._is_taken:
            self._is_taken = False
            self._limiter.release()

    async def step_aside(self, body: Awaitable[Message]) -> Message:
        """Leave it until the client has sent all of the body."""
        self.leave()
        message = await body
        if not message.get("more_body"):
            await self.take()
        return message


class Limits:
    """Has so many requests worked on at once, refuses what is over, ends what takes too long.

    What comes when all places are taken waits, and who came last is let in first. To refuse costs
    half as much as to serve: at twice the load that one core can carry, refusing everything at
    once left a tenth of what it can do; this leaves nine tenths (`make load`).

    The deadline comes from outside the handler's task and cancels it, whatever it waits for: a
    place, the database, the client's body, or the client to read a long list.
    """

    def __init__(self, app: ASGIApp, *, in_flight: int, wait: float, seconds: float) -> None:
        self._app = app
        self._seconds = seconds
        self._limiter: Limiter[None] = Limiter(
            in_flight, wait, Overloaded, lifo=True, max_waiters=WAITING * in_flight
        )

    @property
    def in_flight(self) -> int:
        """How many requests are worked on."""
        return self._limiter.in_use

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve the request. Raises `Overloaded` or `RequestTimeout`."""
        if not scope["raw_path"].startswith(b"/api/"):
            await self._app(scope, receive, send)
            return
        task = cast("asyncio.Task[None]", asyncio.current_task())
        expired = False

        def expire() -> None:
            nonlocal expired
            expired = True
            task.cancel()

        place = _Place(self._limiter)
        RequestContext.of(scope).await_body = place.step_aside
        deadline = asyncio.get_running_loop().call_later(self._seconds, expire)
        try:
            await place.take()
            await self._app(scope, receive, send)
        except CancelledError:
            if not expired or task.uncancel():  # by somebody else, or by him as well
                raise
            raise RequestTimeout from None
        finally:
            deadline.cancel()
            place.leave()
