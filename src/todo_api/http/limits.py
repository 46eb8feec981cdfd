"""How much is taken on at once, and how long a request may take.

Health and documents are not counted: a probe must not fail because there is much to do.
"""

import asyncio
from asyncio import CancelledError
from typing import cast

from starlette.types import ASGIApp, Receive, Scope, Send

from todo_api.errors import Overloaded, RequestTimeout

REFUSALS = 1000
"""How many requests are refused a second."""

REFUSAL_SECONDS = 3.0
"""How long a refusal waits for its turn; when so many wait, the next are refused at once."""


class Limits:
    """Refuses what is over the limit before anything is done for it, and ends what takes too long.

    The deadline comes from outside the handler's task and cancels it, whatever it waits for: the
    database, the client's body, or the client to read a long list.
    """

    def __init__(self, app: ASGIApp, *, in_flight: int, seconds: float) -> None:
        self._app = app
        self._maximum = in_flight
        self._seconds = seconds
        self.in_flight = 0
        self._next_refusal = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve the request. Raises `Overloaded` or `RequestTimeout`."""
        if not scope["raw_path"].startswith(b"/api/"):
            await self._app(scope, receive, send)
            return
        if self.in_flight >= self._maximum:
            await self._refuse_in_turn()
        task = cast("asyncio.Task[None]", asyncio.current_task())
        expired = False

        def expire() -> None:
            nonlocal expired
            expired = True
            task.cancel()

        deadline = asyncio.get_running_loop().call_later(self._seconds, expire)
        self.in_flight += 1
        try:
            await self._app(scope, receive, send)
        except CancelledError:
            if not expired or task.uncancel():  # by somebody else, or by him as well
                raise
            raise RequestTimeout from None
        finally:
            self.in_flight -= 1
            deadline.cancel()

    async def _refuse_in_turn(self) -> None:
        """Raise `Overloaded`, but so many times a second and no more.

        To refuse costs half as much as to serve: under twice the load that one core can carry,
        refusing at once left a tenth of the goodput, in turn it left 84 % (measured, `make load`).
        """
        now = asyncio.get_running_loop().time()
        turn = max(now, self._next_refusal)
        if turn - now < REFUSAL_SECONDS:
            self._next_refusal = turn + 1 / REFUSALS
            await asyncio.sleep(turn - now)
        raise Overloaded
