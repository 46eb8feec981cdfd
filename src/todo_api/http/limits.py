"""Limits on the requests in flight, and on the time that a request may take.

Health checks and documents need no slot, because a probe must not fail under load.
"""

import asyncio
from asyncio import CancelledError
from collections.abc import Awaitable
from typing import cast

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from todo_api.errors import Overloaded, RequestTimeout
from todo_api.limiter import Limiter
from todo_api.request_context import RequestContext

WAITERS_PER_SLOT = 20
"""The limiter refuses a request at once if this many already wait for each slot."""


class _Slot:
    """The slot of one request. The request releases it while it waits for its client."""

    __slots__ = ("_is_acquired", "_limiter")

    def __init__(self, limiter: Limiter[None]) -> None:
        self._limiter = limiter
        self._is_acquired = False

    async def acquire(self) -> None:
        """Acquire the slot, and wait for a free one if necessary. Raises `Overloaded`."""
        if not self._limiter.try_acquire():
            await self._limiter.wait()
        self._is_acquired = True

    def release(self) -> None:
        """Release the slot to the next waiter, unless it is released already."""
        if self._is_acquired:
            self._is_acquired = False
            self._limiter.release()

    async def await_body(self, body: Awaitable[Message]) -> Message:
        """Await a part of the body without the slot; acquire it again after the last part."""
        self.release()
        message = await body
        if not message.get("more_body"):
            await self.acquire()
        return message


class _Deadline:
    """Cancels the task that made it, after so many seconds from its last start."""

    __slots__ = ("_expired", "_seconds", "_task", "_timer")

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._task = cast("asyncio.Task[None]", asyncio.current_task())
        self._timer: asyncio.TimerHandle | None = None
        self._expired = False

    def start(self) -> None:
        """Start the clock anew."""
        self._timer = asyncio.get_running_loop().call_later(self._seconds, self._expire)

    def stop(self) -> None:
        """Stop the clock."""
        if self._timer is not None:
            self._timer.cancel()

    def has_cancelled(self) -> bool:
        """Take back the cancellation. Return whether nothing else has cancelled the task."""
        return self._expired and not self._task.uncancel()

    def _expire(self) -> None:
        self._expired = True
        self._task.cancel()


class Limits:
    """Limits the requests in flight, refuses excess requests, and ends slow ones.

    Excess requests wait in a LIFO queue. A refusal costs half as much as an answer. At twice the
    load that one core can carry, refusing every excess request at once left a tenth of the
    goodput. The queue keeps nine tenths (`make load`).

    The deadline cancels the handler's task from outside, whatever it waits for: a slot, the
    database, the client's body, or the client that reads a long list.
    """

    def __init__(self, app: ASGIApp, *, in_flight: int, wait: float, seconds: float) -> None:
        self._app = app
        self._seconds = seconds
        self._limiter: Limiter[None] = Limiter(
            in_flight, wait, Overloaded, lifo=True, max_waiters=WAITERS_PER_SLOT * in_flight
        )

    @property
    def in_flight(self) -> int:
        """The number of requests that hold a slot."""
        return self._limiter.in_use

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve the request. Raises `Overloaded` or `RequestTimeout`."""
        if not scope["raw_path"].startswith(b"/api/"):
            await self._app(scope, receive, send)
            return
        context = RequestContext.of(scope)
        slot, deadline = _Slot(self._limiter), _Deadline(self._seconds)

        async def step_aside(event: Awaitable[bool]) -> bool:
            slot.release()
            deadline.stop()
            happened = await event
            deadline.start()
            await slot.acquire()
            return happened

        context.await_body, context.step_aside = slot.await_body, step_aside
        deadline.start()
        try:
            await slot.acquire()
            await self._app(scope, receive, send)
        except CancelledError:
            if not deadline.has_cancelled():
                raise
            raise RequestTimeout from None
        finally:
            deadline.stop()
            slot.release()
