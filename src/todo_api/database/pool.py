"""The connections of one process: as many as are allowed, made when needed, shared in turn."""

import asyncio
import time
from collections.abc import Callable, Sequence

import psycopg

from todo_api.database.address import reason
from todo_api.database.connection import (
    Answer,
    Command,
    Connection,
    ConnectionLost,
    QueryFailed,
)
from todo_api.database.statement import Statement
from todo_api.errors import DatabaseBusy, DatabaseUnreachable, ShuttingDown
from todo_api.settings import Settings
from todo_api.turns import Turns

IDLE_LIMIT = 240.0
"""Seconds after which an idle connection is closed: before Neon cuts it at 300 and so that we are
not what keeps a serverless database awake."""

CONNECT_ATTEMPTS = (0.0, 0.1, 0.3)
"""Seconds to wait before each attempt to connect."""


class Pool:
    """At most `POOL_SIZE` connections, each for one request at a time.

    `session` is run on each new connection; `on_trouble` is called when one breaks, or none can be
    made.
    """

    def __init__(
        self,
        conninfo: str,
        settings: Settings,
        session: Statement | None,
        on_trouble: Callable[[], None],
    ) -> None:
        self._conninfo = conninfo
        self._settings = settings
        self._session = session
        self._on_trouble = on_trouble
        self._turns: Turns[Connection] = Turns(
            settings.pool_size, settings.pool_timeout, DatabaseBusy, keep=self._keep
        )
        self._idle: list[tuple[Connection, float]] = []
        self._open: set[Connection] = set()
        self._sweeper: asyncio.TimerHandle | None = None
        self._closed = False
        self.on_wait: Callable[[float], None] = lambda _: None
        """Is told of each wait for a connection, in seconds."""

    def open(self) -> None:
        """Begin to close connections that are idle for long."""
        self._sweeper = asyncio.get_running_loop().call_later(IDLE_LIMIT / 4, self.open)
        oldest = time.monotonic() - IDLE_LIMIT
        while self._idle and (self._idle[0][0].closed or self._idle[0][1] < oldest):
            self._idle.pop(0)[0].close()  # those used last are at the end

    def close(self) -> None:
        """Close every connection, and make no more."""
        self._closed = True
        if self._sweeper is not None:
            self._sweeper.cancel()
        for connection in list(self._open):
            connection.close()

    def drop_idle(self) -> None:
        """Close the connections that nobody uses."""
        while self._idle:
            self._idle.pop()[0].close()

    @property
    def server_version(self) -> int:
        """The server's version as libpq has it, of a pool that has connected."""
        return next(iter(self._open)).server_version

    def levels(self) -> dict[str, float]:
        """Return how much of the pool is in use."""
        return {
            "pool_connections": len(self._open),
            "pool_busy": sum(connection.busy for connection in self._open),
            "pool_waiting": self._turns.waiting,
        }

    async def run(self, commands: Sequence[Command], seconds: float) -> Answer:
        """Run commands on the connection used last, on a new one, or on the next that is free.

        Raises `DatabaseBusy`, `DatabaseUnreachable`, `ShuttingDown` or a `QueryFailed`.
        """
        answer = None
        if not self._turns.take_free():
            answer = await self._wait(lambda connection: connection.send(commands, seconds))
        if answer is None:
            connection = self._used_last() or await self._connect_in_place()
            answer = connection.send(commands, seconds)
        return await answer

    async def _wait(
        self, begin: Callable[[Connection], asyncio.Future[Answer]]
    ) -> asyncio.Future[Answer] | None:
        started = time.monotonic()
        try:
            return await self._turns.wait(begin)
        finally:
            self.on_wait(time.monotonic() - started)

    def _used_last(self) -> Connection | None:
        while self._idle:
            connection, _ = self._idle.pop()
            if not connection.closed:
                return connection
        return None

    def _keep(self, connection: Connection) -> None:
        self._idle.append((connection, time.monotonic()))

    def _lost(self, connection: Connection) -> None:
        self._open.discard(connection)
        if not connection.closing:
            self._on_trouble()
        if connection.busy:
            self._turns.hand_on()

    async def _connect_in_place(self) -> Connection:
        try:
            return await self._connect()
        except BaseException:
            self._turns.hand_on()
            raise

    async def _connect(self) -> Connection:
        if self._closed:
            raise ShuttingDown
        cause: Exception | None = None
        for delay in CONNECT_ATTEMPTS:
            await asyncio.sleep(delay)
            try:
                async with asyncio.timeout(self._settings.connect_timeout):
                    return await self._connect_once()
            except TimeoutError as error:  # an OSError too, but not worth another try
                cause = error
                break
            except (psycopg.Error, QueryFailed, OSError) as error:
                cause = error
        self._on_trouble()
        # The cause is for the log: libpq's own words would put the database's address there.
        raise DatabaseUnreachable from ConnectionLost(reason(cause), did_not_run=True)

    async def _connect_once(self) -> Connection:
        connection = await Connection.open(
            self._conninfo,
            session=self._session,
            prepare=self._settings.prepared_statements,
            on_free=self._turns.hand_on,
            on_lost=self._lost,
        )
        self._open.add(connection)
        if self._closed:
            connection.close()
            raise ShuttingDown
        return connection
