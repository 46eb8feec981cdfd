"""A limiter: a fixed number of slots, and a queue of waiters for the next free one."""

import asyncio
import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Generic, TypeAlias, TypeVar

from todo_api.errors import ApiError

Resource = TypeVar("Resource")
Work: TypeAlias = asyncio.Future[Any]
"""The work that a waiter's callback started on a resource."""

Start: TypeAlias = Callable[[Resource], Work]
"""A waiter's callback, which starts its work on a resource."""

_Waiter: TypeAlias = asyncio.Future[Work | None]


class Limiter(Generic[Resource]):
    """Hands out a fixed number of slots. A released slot goes straight to the next waiter.

    A slot may come with a resource, such as a connection. The waiter's callback starts the work on
    it during the release, so the resource does not idle until the event loop resumes the waiter.

    The queue is first in, first out, or with `lifo` last in, first out. Under overload some
    requests time out in any case, and LIFO serves the others quickly. It also takes the request
    that is most likely still in the processor's caches (ADR 10).

    The limiter raises `refusal` after `timeout` seconds, or at once if `max_waiters` are waiting.
    """

    def __init__(
        self,
        slots: int,
        timeout: float,
        refusal: type[ApiError],
        *,
        lifo: bool = False,
        max_waiters: float = math.inf,
    ) -> None:
        self._slots = slots
        self._timeout = timeout
        self._refusal = refusal
        self._lifo = lifo
        self._max_waiters = max_waiters
        self.in_use = 0
        """The number of slots in use."""
        self._waiters: OrderedDict[_Waiter, Start[Resource] | None] = OrderedDict()

    @property
    def waiting(self) -> int:
        """The number of waiters."""
        return len(self._waiters)

    def try_acquire(self) -> bool:
        """Take a slot if one is free, and return whether one was."""
        is_free = self.in_use < self._slots
        self.in_use += is_free
        return is_free

    async def wait(self, start: Start[Resource] | None = None) -> Work | None:
        """Wait for a slot, and return the work that `start` began on the slot's resource.

        Return None if the slot came without a resource. The caller has the slot all the same.
        Raises the refusal.
        """
        if len(self._waiters) >= self._max_waiters:
            raise self._refusal
        loop = asyncio.get_running_loop()
        waiter: _Waiter = loop.create_future()
        deadline = loop.call_later(self._timeout, self._refuse, waiter)
        self._waiters[waiter] = start
        try:
            return await waiter
        except asyncio.CancelledError:
            self._give_up(waiter)
            raise
        finally:
            deadline.cancel()
            del waiter  # breaks the cycle of the refusal, its traceback and this frame

    def release(self, resource: Resource | None = None) -> bool:
        """Release a slot with its resource, and return whether a waiter took them."""
        while self._waiters:
            waiter, start = self._waiters.popitem(last=self._lifo)
            if not waiter.done():
                waiter.set_result(None if resource is None or start is None else start(resource))
                return True
        self.in_use -= 1
        return False

    def _refuse(self, waiter: _Waiter) -> None:
        if not waiter.done():
            del self._waiters[waiter]
            waiter.set_exception(self._refusal())

    def _give_up(self, waiter: _Waiter) -> None:
        """Leave the queue, or pass on a slot that came just before the cancellation."""
        if waiter in self._waiters:
            del self._waiters[waiter]
        elif not waiter.cancelled() and waiter.exception() is None:
            work = waiter.result()
            if work is None:
                self.release()
            elif not work.cancel():  # a cancelled one releases its slot when the resource is free
                work.exception()  # asyncio logs an exception that nobody retrieves
