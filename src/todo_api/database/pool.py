"""The connection pool of one process."""

import asyncio
import time
from collections.abc import Callable, Sequence

import psycopg

from todo_api.database.address import refusal
from todo_api.database.connection import Command, Connection, Result
from todo_api.database.failures import ConnectionLost, ConnectionRefused, QueryFailed
from todo_api.database.statement import Statement
from todo_api.errors import DatabaseBusy, ShuttingDown
from todo_api.limiter import Limiter
from todo_api.settings import Settings

IDLE_LIMIT = 240.0
"""Seconds after which the pool closes an idle connection. Neon cuts it at 300, and an open
connection keeps a serverless database awake."""

CONNECT_DELAYS = (0.0, 0.1, 0.3)
"""Seconds to wait before each attempt to connect."""


class Pool:
    """At most `POOL_SIZE` connections, each for one request at a time.

    Each new connection runs `session`. The pool calls `on_failure` when a connection breaks, and
    when it cannot connect.
    """

    def __init__(
        self,
        conninfo: str,
        settings: Settings,
        session: Statement | None,
        on_failure: Callable[[], None],
    ) -> None:
        self._conninfo = conninfo
        self._settings = settings
        self._session = session
        self._on_failure = on_failure
        self._limiter: Limiter[Connection] = Limiter(
            settings.pool_size, settings.pool_timeout, DatabaseBusy
        )
        self._idle: list[tuple[Connection, float]] = []
        """Idle connections with the time of their last use, the last used at the end."""
        self._open: set[Connection] = set()
        self._sweeper: asyncio.TimerHandle | None = None
        self._closed = False
        self.on_wait: Callable[[float], None] = lambda _: None
        """Called with each wait for a connection, in seconds."""

    def open(self) -> None:
        """Start to close connections that are idle for `IDLE_LIMIT`."""
        self._sweep()

    def close(self) -> None:
        """Close every connection, and refuse to make new ones."""
        self._closed = True
        if self._sweeper is not None:
            self._sweeper.cancel()
        for connection in list(self._open):
            connection.close()

    def close_idle(self) -> None:
        """Close the connections that no request uses."""
        while self._idle:
            self._idle.pop()[0].close()

    @property
    def server_version(self) -> int:
        """The server's version as libpq has it, once the pool has connected."""
        return next(iter(self._open)).server_version

    @property
    def place(self) -> str:
        """The names of the database and of its host, once the pool has connected."""
        return next(iter(self._open)).place

    def levels(self) -> dict[str, float]:
        """Return how much of the pool is in use, for the metrics."""
        return {
            "pool_connections": len(self._open),
            "pool_busy": sum(connection.busy for connection in self._open),
            "pool_waiting": self._limiter.waiting,
        }

    async def run(self, commands: Sequence[Command], seconds: float, kept: int = 1) -> Result:
        """Run commands on the connection used last, on a new one, or on the next that is free.

        Raises `DatabaseBusy`, `DatabaseUnreachable`, `ShuttingDown` or a `QueryFailed`. Without a
        connection the error's cause is the `ConnectionLost` that says why.
        """
        result = None
        if not self._limiter.try_acquire():
            result = await self._wait(lambda connection: connection.send(commands, seconds, kept))
        if result is None:
            connection = self._pop_idle() or await self._connect()
            result = connection.send(commands, seconds, kept)
        return await result

    async def _wait(
        self, start: Callable[[Connection], asyncio.Future[Result]]
    ) -> asyncio.Future[Result] | None:
        started = time.monotonic()
        try:
            return await self._limiter.wait(start)
        finally:
            self.on_wait(time.monotonic() - started)

    def _pop_idle(self) -> Connection | None:
        while self._idle:
            connection, _ = self._idle.pop()
            if not connection.closed:
                return connection
        return None

    def _sweep(self) -> None:
        """Close connections that are idle for long, now and every quarter of `IDLE_LIMIT`."""
        self._sweeper = asyncio.get_running_loop().call_later(IDLE_LIMIT / 4, self._sweep)
        oldest = time.monotonic() - IDLE_LIMIT
        while self._idle and (self._idle[0][0].closed or self._idle[0][1] < oldest):
            self._idle.pop(0)[0].close()

    def _release(self, connection: Connection) -> None:
        """Give a free connection to the next waiter, or keep it idle."""
        if not self._limiter.release(connection):
            self._idle.append((connection, time.monotonic()))

    def _on_lost(self, connection: Connection) -> None:
        self._open.discard(connection)
        if not connection.closing:
            self._on_failure()
        if connection.busy:
            self._limiter.release()

    async def _connect(self) -> Connection:
        """Connect with up to three attempts, or release the slot."""
        try:
            return await self._try_to_connect()
        except BaseException:
            self._limiter.release()
            raise

    async def _try_to_connect(self) -> Connection:
        if self._closed:
            raise ShuttingDown
        cause: Exception | None = None
        for delay in CONNECT_DELAYS:
            await asyncio.sleep(delay)
            try:
                async with asyncio.timeout(self._settings.connect_timeout):
                    return await self._connect_once()
            except TimeoutError as error:  # an OSError too, but not worth another attempt
                cause = error
                break
            except (psycopg.Error, QueryFailed, OSError) as error:
                cause = error
        self._on_failure()
        # The failure goes to the log, and libpq's own message would show the database's address.
        failure = _failure_to_connect(cause)
        raise failure.api_error from failure

    async def _connect_once(self) -> Connection:
        connection = await Connection.open(
            self._conninfo,
            session=self._session,
            prepare=self._settings.prepared_statements,
            on_free=self._release,
            on_lost=self._on_lost,
        )
        self._open.add(connection)
        if self._closed:
            connection.close()
            raise ShuttingDown
        return connection


def _failure_to_connect(cause: Exception | None) -> ConnectionLost:
    refused = refusal(cause)
    if refused.by_server:
        return ConnectionRefused(refused.reason, is_full=refused.is_full)
    return ConnectionLost(refused.reason, did_not_run=True)
