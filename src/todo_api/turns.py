"""So many places, and what to do with whoever finds them all taken."""

import asyncio
import math
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

from todo_api.errors import ApiError

Value = TypeVar("Value")


class Turns(Generic[Value]):
    """A number of places. Whoever leaves hands his on, so that nobody is woken in vain.

    With a place may go what it is a place at; where nobody waits, `keep` gets that.

    With `newest_first`, whoever came last is served first: where more comes than can be served,
    somebody has to wait in vain, and it is better that some wait long than that all do. The work
    of the newest is also still in the processor's caches.

    Who would have to wait longer than `seconds`, or behind `most_waiting` others, is refused.
    """

    def __init__(  # noqa: PLR0913  most of them by name
        self,
        places: int,
        seconds: float,
        refusal: type[ApiError],
        *,
        keep: Callable[[Value], None] = lambda _: None,
        newest_first: bool = False,
        most_waiting: float = math.inf,
    ) -> None:
        self._places = places
        self._seconds = seconds
        self._refusal = refusal
        self._keep = keep
        self._most_waiting = most_waiting
        self._next = deque.pop if newest_first else deque.popleft
        self.taken = 0
        self._waiting: deque[asyncio.Future[Value | None]] = deque()

    @property
    def waiting(self) -> int:
        """How many wait for a place."""
        return len(self._waiting)

    def take_free(self) -> bool:
        """Take a place if one is free; tell whether it was."""
        is_free = self.taken < self._places
        self.taken += is_free
        return is_free

    async def wait(self) -> Value | None:
        """Wait for a place, and take it with what the one before left there.

        Raises the refusal.
        """
        if len(self._waiting) >= self._most_waiting:
            raise self._refusal
        loop = asyncio.get_running_loop()
        turn: asyncio.Future[Value | None] = loop.create_future()
        deadline = loop.call_later(self._seconds, self._refuse, turn)
        self._waiting.append(turn)
        try:
            return await turn
        except asyncio.CancelledError:
            self._leave(turn)
            raise
        finally:
            deadline.cancel()

    def hand_on(self, value: Value | None = None) -> None:
        """Leave a place, with a value for whoever is next."""
        while self._waiting:
            turn = self._next(self._waiting)
            if not turn.done():
                turn.set_result(value)
                return
        self.taken -= 1
        if value is not None:
            self._keep(value)

    def _refuse(self, turn: asyncio.Future[Value | None]) -> None:
        if not turn.done():
            self._waiting.remove(turn)
            turn.set_exception(self._refusal())

    def _leave(self, turn: asyncio.Future[Value | None]) -> None:
        if turn in self._waiting:
            self._waiting.remove(turn)
        elif not turn.cancelled() and turn.exception() is None:
            self.hand_on(turn.result())
