"""Requests that wait for a change of their user's tasks (ADR 15).

A write through this process wakes them at once. For writes through other processes, one query a
second asks for the versions of all users with waiting requests. If nobody waits, no query runs.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress

from todo_api.errors import ApiError, TooManyWaiting, WaitingIsFull

POLL_SECONDS = 1.0
"""The interval of the query for writes through other processes."""

MAXIMUM_OF_USER = 20
MAXIMUM_OF_PROCESS = 2_000
"""The most waiting requests of one user, and of all users together."""

Versions = Callable[[list[str]], Awaitable[Mapping[str, int]]]
"""Returns the version of each of these users who has one."""


class Waiter:
    """One waiting request."""

    def __init__(self) -> None:
        self.version: int | None = None
        """The version that the request knows, once it has asked."""
        self._woken = asyncio.get_running_loop().create_future()
        self._has_ended = False

    def end(self) -> None:
        """End the wait for good: time is up, the client has left, or the server shuts down."""
        self._has_ended = True
        self.wake()

    def wake(self) -> None:
        """Let the request ask again, now or when it waits next."""
        if not self._woken.done():
            self._woken.set_result(None)

    async def wait(self) -> bool:
        """Wait until something wakes the request. Return whether it shall ask again."""
        await self._woken
        self._woken = asyncio.get_running_loop().create_future()
        return not self._has_ended


class Waiters:
    """The waiting requests of this process."""

    def __init__(self, versions: Versions) -> None:
        self._versions = versions
        self._by_user: dict[str, set[Waiter]] = {}
        self._watcher: asyncio.Task[None] | None = None
        self.count = 0
        """The number of waiting requests."""

    @contextmanager
    def joined(self, user_id: str) -> Iterator[Waiter]:
        """Take a place among the waiting. Raises `TooManyWaiting` or `WaitingIsFull`."""
        if len(self._by_user.get(user_id, ())) >= MAXIMUM_OF_USER:
            raise TooManyWaiting
        if self.count >= MAXIMUM_OF_PROCESS:
            raise WaitingIsFull
        waiter = Waiter()
        self._by_user.setdefault(user_id, set()).add(waiter)
        self.count += 1
        if self._watcher is None:
            self._watcher = asyncio.create_task(self._watch())
        try:
            yield waiter
        finally:
            self._leave(user_id, waiter)

    def wake(self, user_id: str) -> None:
        """Wake the requests of a user whose tasks have changed."""
        for waiter in self._by_user.get(user_id, ()):
            waiter.wake()

    def _leave(self, user_id: str, waiter: Waiter) -> None:
        self.count -= 1
        of_user = self._by_user[user_id]
        of_user.remove(waiter)
        if not of_user:
            del self._by_user[user_id]
        if not self.count and self._watcher is not None:
            self._watcher.cancel()
            self._watcher = None

    async def _watch(self) -> None:
        """Ask for the versions again and again, and wake the requests that know others."""
        while True:
            await asyncio.sleep(POLL_SECONDS)
            with suppress(ApiError):  # the database is away; the requests find out for themselves
                found = await self._versions([*self._by_user])
                for user_id, waiters in self._by_user.items():
                    for waiter in waiters:
                        if waiter.version not in {None, found.get(user_id, 0)}:
                            waiter.wake()
