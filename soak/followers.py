"""Followers, which keep a copy of a user's tasks by the feed of changes alone."""

import asyncio
import time
from collections.abc import Callable
from http import HTTPStatus
from typing import Any
from urllib.parse import urlencode

from soak.calls import KEPT, Caller, Connections
from soak.ledger import Ledger

WAIT = 1
"""Seconds for which a follower lets the service hold an answer back."""


class Follower(Caller):
    """Follows the changes of one user with its last cursor, whatever breaks."""

    def __init__(self, user: str, connections: Connections, ledger: Ledger, seed: str) -> None:
        super().__init__(f"{user} follows", user, connections, ledger, seed)
        self.user = user
        self.copy: dict[int, dict[str, Any]] = {}
        self._cursor: str | None = None
        self._version = 0
        self._is_complete = False

    async def run(self, stopped: Callable[[], bool]) -> None:
        """Follow, and sometimes begin anew, like a page that is loaded again."""
        self._stopped = stopped
        while not stopped():
            if self._chance(0.01):
                self._begin_anew()
            await self._follow(wait=self._chance(0.7))
            await asyncio.sleep(self._random.uniform(0, 0.05))

    async def finish(self, seconds: float) -> None:
        """Follow until a held answer has no change, so that the copy is complete."""
        end = time.monotonic() + seconds
        self._is_complete = False
        while not self._is_complete:
            if time.monotonic() > end:
                self._ledger.violated(KEPT, f"{self._name}: no end of the changes")
                return
            await self._follow(wait=True)

    def _begin_anew(self) -> None:
        self.copy.clear()
        self._cursor, self._version = None, 0
        self._ledger.events["copies begun anew"] += 1

    async def _follow(self, *, wait: bool) -> None:
        """Read the next changes into the copy."""
        query: dict[str, object] = {"limit": self._random.choice((1, 3, 20, 200))}
        if self._cursor is not None:
            query["since"] = self._cursor
        if wait:
            query["wait"] = WAIT
        timeout = self._connections.seconds + WAIT
        _, answer = await self._ask(
            "GET", f"/changes?{urlencode(query)}", {200, 410}, timeout=timeout
        )
        if answer is None:
            return
        if answer.status_code == HTTPStatus.GONE:
            self._ledger.violated(KEPT, f"{self._name}: {self._cursor} has expired")
            self._begin_anew()
        else:
            self._take(answer.json())

    def _take(self, body: dict[str, Any]) -> None:
        """Bring the copy up to date. The changes come in the order of their versions."""
        for change in body["changes"]:
            self._ledger.events["changes followed"] += 1
            version = change.get("task", change)["version"]
            if version <= self._version:
                self._ledger.violated(
                    KEPT, f"{self._name}: version {version} after {self._version}"
                )
            self._version = version
            if "task" in change:
                self.copy[change["task"]["id"]] = change["task"]
            else:
                self.copy.pop(change["deleted"], None)
        self._cursor = body["cursor"]
        self._is_complete = not body["changes"] and not body["more"]
