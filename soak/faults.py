"""Random faults in processes, sessions, the network and the database."""

import asyncio
import os
import random
import re
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import ExitStack, suppress
from itertools import count
from pathlib import Path

import httpx2
import psutil
import psycopg

from soak.calls import Connections
from support.network import Network
from support.own_postgres import OwnPostgres
from support.program import Program, serving

SESSIONS = """
SELECT pid FROM pg_stat_activity
WHERE datname = current_database() AND application_name = 'todo-api'
"""
TERMINATE = f"SELECT pg_terminate_backend(pid) FROM ({SESSIONS}) AS session"  # noqa: S608  ours

COMPLAINT = re.compile(r"unexpected error.*|(?<=^Traceback)(?:.*\n[ \t])+.*\n.*", re.MULTILINE)

RARELY = {"worker killed": 5, "program replaced": 12}
"""Rare faults, and in how many rounds they happen once. A round takes about ten seconds, so some
processes live long enough to watch."""


START = 30.0
"""Seconds that a worker may need to start, on a busy machine."""


class Copies:
    """The program, one copy after another. The clients always use the newest copy."""

    def __init__(self, folder: Path, connections: Connections, **variables: str) -> None:
        self._folder = folder
        self._connections = connections
        self._variables = variables
        self._stack = ExitStack()
        self._started = 0
        self.exit_codes: list[int] = []
        self.slowest_end = 0.0
        self.program: Program | None = None

    async def start(self) -> None:
        """Start a copy, and send the clients to it once a worker answers."""
        self._started += 1
        folder = self._folder / f"copy-{self._started}"
        folder.mkdir()
        serve = serving(folder, **self._variables)
        self.program = await asyncio.to_thread(self._stack.enter_context, serve)
        alive = f"{self.program.address}/livez"
        await asyncio.to_thread(httpx2.get, alive, timeout=START, trust_env=False)
        self._connections.lead_to(self.program.address)

    async def replace(self) -> None:
        """Start a new copy, then stop the old one gracefully."""
        old = self.program
        await self.start()
        await self._stop(old)

    async def stop(self) -> None:
        """Stop the running copy gracefully."""
        await self._stop(self.program)

    async def _stop(self, program: Program | None) -> None:
        if program is not None:
            began = time.monotonic()
            self.exit_codes.append(await asyncio.to_thread(program.stop))
            self.slowest_end = max(self.slowest_end, time.monotonic() - began)

    def workers(self) -> list[psutil.Process]:
        """Return the worker processes of the newest copy."""
        return self.program.workers() if self.program else []

    def complaints(self) -> list[str]:
        """Return the unexpected errors and tracebacks in the logs."""
        return [
            complaint
            for log in self._folder.glob("copy-*/log")
            for complaint in COMPLAINT.findall(log.read_text())
        ]

    def close(self) -> None:
        """Kill the remaining copies."""
        self._stack.close()


class Faults:
    """One fault after another. A seed decides the order, and each fault ends before the next."""

    def __init__(
        self, postgres: OwnPostgres, url: str, network: Network, copies: Copies, seed: int
    ) -> None:
        self._postgres = postgres
        self._url = url
        self._network = network
        self._copies = copies
        self._random = random.Random(seed)  # noqa: S311  no secret
        self.counts: Counter[str] = Counter()
        self.longest = 0.0, "none"

    async def run(self, stopped: Callable[[], bool]) -> None:
        """Cause every fault once per round, each round in a new order."""
        for number in count():
            for name, fault in self._shuffled():
                if number % RARELY.get(name, 1):
                    continue
                await asyncio.sleep(self._random.uniform(0.1, 1))
                if stopped():
                    return
                self.counts[name] += 1
                began = time.monotonic()
                await fault()
                self.longest = max(self.longest, (time.monotonic() - began, name))

    def _shuffled(self) -> list[tuple[str, Callable[[], Awaitable[None]]]]:
        faults: dict[str, Callable[[], Awaitable[None]]] = {
            "worker killed": self._kill_worker,
            "sessions ended": self._end_sessions,
            "database crashed": self._crash_database,
            "session frozen": self._freeze_session,
            "network reset": self._reset,
            "network silent": self._silence,
            "cut after commit": self._cut_answers,
            "program replaced": self._copies.replace,
        }
        return self._random.sample(list(faults.items()), len(faults))

    async def _for_a_while(self) -> None:
        await asyncio.sleep(self._random.uniform(0.2, 2.5))

    async def _kill_worker(self) -> None:
        """Kill the youngest worker. The memory of the other shows whether it grows."""
        if workers := self._copies.workers():
            max(workers, key=psutil.Process.create_time).kill()

    async def _end_sessions(self) -> None:
        await asyncio.to_thread(self._sql, TERMINATE)

    async def _crash_database(self) -> None:
        await asyncio.to_thread(self._postgres.crash, signal.SIGQUIT)
        await asyncio.to_thread(self._postgres.start)

    async def _freeze_session(self) -> None:
        sessions = await asyncio.to_thread(self._sql, SESSIONS)
        if not sessions:
            return
        frozen = self._random.choice(sessions)
        with suppress(ProcessLookupError):
            os.kill(frozen, signal.SIGSTOP)
            await self._for_a_while()
            os.kill(frozen, signal.SIGCONT)

    async def _reset(self) -> None:
        self._network.cut()

    async def _silence(self) -> None:
        self._network.passing.clear()
        await self._for_a_while()
        if self._random.random() < 0.5:  # noqa: PLR2004  as often as not
            self._network.cut()
        self._network.passing.set()

    async def _cut_answers(self) -> None:
        self._network.cut_answers = True
        await asyncio.sleep(self._random.uniform(0.1, 0.6))
        self._network.cut_answers = False

    def _sql(self, query: str) -> list[int]:
        with psycopg.connect(self._url, autocommit=True) as sql:
            return [row[0] for row in sql.execute(query)]
