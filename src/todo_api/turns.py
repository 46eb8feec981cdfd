"""So many places, and what to do with whoever finds them all taken."""

import asyncio
import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Generic, TypeAlias, TypeVar

from todo_api.errors import ApiError

Value = TypeVar("Value")
Work: TypeAlias = asyncio.Future[Any]
"""What was begun at a place, for whoever waited for one."""

Begin: TypeAlias = Callable[[Value], Work]
"""Begins it."""

Turn: TypeAlias = asyncio.Future[Work | None]


class Turns(Generic[Value]):
    """A number of places. Whoever leaves hands his on, so that nobody is woken in vain.

    With a place may go what it is a place at: then the work of whoever is next begins there and
    then, and not when the event loop comes to him. Where nobody waits, `keep` gets that.

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
        self._newest_first = newest_first
        self.taken = 0
        self._waiting: OrderedDict[Turn, Begin[Value] | None] = OrderedDict()

    @property
    def waiting(self) -> int:
        """How many wait for a place."""
        return len(self._waiting)

    def take_free(self) -> bool:
        """Take a place if one is free; tell whether it was."""
        is_free = self.taken < self._places
        self.taken += is_free
        return is_free

    async def wait(self, begin: Begin[Value] | None = None) -> Work | None:
        """Wait for a place and take it.

        Returns what was begun there, or None where nothing came with the place: then it is for the
        caller to begin. Raises the refusal.
        """
        if len(self._waiting) >= self._most_waiting:
            raise self._refusal
        loop = asyncio.get_running_loop()
        turn: Turn = loop.create_future()
        deadline = loop.call_later(self._seconds, self._refuse, turn)
        self._waiting[turn] = begin
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
            turn, begin = self._waiting.popitem(last=self._newest_first)
            if not turn.done():
                turn.set_result(None if value is None or begin is None else begin(value))
                return
        self.taken -= 1
        if value is not None:
            self._keep(value)

    def _refuse(self, turn: Turn) -> None:
        if not turn.done():
            del self._waiting[turn]
            turn.set_exception(self._refusal())

    def _leave(self, turn: Turn) -> None:
        if turn in self._waiting:
            del self._waiting[turn]
        elif not turn.cancelled() and turn.exception() is None:
            work = turn.result()
            if work is None:
                self.hand_on()
            elif not work.cancel():  # the place is handed on when it is over
                work.exception()  # it has failed already, and nobody else will ask why
