"""The connections of one process: as many as are allowed, made when needed, shared in turn."""

import asyncio
import time
from collections import deque
from collections.abc import Callable

import psycopg

from todo_api.database.address import reason
from todo_api.database.connection import Connection, ConnectionLost, QueryFailed
from todo_api.database.statement import Statement
from todo_api.errors import DatabaseBusy, DatabaseUnreachable, ShuttingDown
from todo_api.settings import Settings

IDLE_LIMIT = 240.0
"""Seconds after which an idle connection is closed: before Neon cuts it at 300 and so that we are
not what keeps a serverless database awake."""

CONNECT_ATTEMPTS = (0.0, 0.1, 0.3)
"""Seconds to wait before each attempt to connect."""

Turn = asyncio.Future[Connection | None]
"""What a waiting request gets: a connection, or leave to make one."""


class Pool:
    """At most `POOL_SIZE` connections, each for one request at a time.

    A connection that becomes free goes straight to the request that has waited longest: under
    load there is nothing to compete for and nobody to wake in vain. `session` is run on each new
    connection; `on_trouble` is called when one breaks, or none can be made.
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
        self._taken = 0
        self._idle: list[tuple[Connection, float]] = []
        self._open: set[Connection] = set()
        self._waiting: deque[Turn] = deque()
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
            "pool_waiting": len(self._waiting),
        }

    async def take(self) -> Connection:
        """Take the connection used last, or make one. It comes back by itself once it was used.

        Raises `DatabaseBusy`, `DatabaseUnreachable` or `ShuttingDown`.
        """
        if self._taken < self._settings.pool_size:
            self._taken += 1
            connection = self._used_last()
        else:
            connection = await self._turn()
        if connection is not None and not connection.closed:
            return connection
        try:
            return await self._connect()
        except BaseException:
            self._pass_on(None)
            raise

    def _used_last(self) -> Connection | None:
        while self._idle:
            connection, _ = self._idle.pop()
            if not connection.closed:
                return connection
        return None

    async def _turn(self) -> Connection | None:
        loop = asyncio.get_running_loop()
        turn: Turn = loop.create_future()
        started = time.monotonic()
        deadline = loop.call_later(self._settings.pool_timeout, self._give_up, turn)
        self._waiting.append(turn)
        try:
            return await turn
        except asyncio.CancelledError:
            self._leave(turn)
            raise
        finally:
            deadline.cancel()
            self.on_wait(time.monotonic() - started)

    def _give_up(self, turn: Turn) -> None:
        """End a wait that has taken too long."""
        if not turn.done():
            self._waiting.remove(turn)
            turn.set_exception(DatabaseBusy())

    def _leave(self, turn: Turn) -> None:
        """Give up a place, and what may have been handed over at the same moment."""
        if turn in self._waiting:
            self._waiting.remove(turn)
        elif not turn.cancelled() and turn.exception() is None:
            self._pass_on(turn.result())

    def _pass_on(self, connection: Connection | None) -> None:
        """Let the next one have this place in the pool, with the connection if there is one."""
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(connection)
                return
        self._taken -= 1
        if connection is not None:
            self._idle.append((connection, time.monotonic()))

    def _lost(self, connection: Connection) -> None:
        self._open.discard(connection)
        if not connection.closing:
            self._on_trouble()
        if connection.busy:
            self._pass_on(None)

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
            on_free=self._pass_on,
            on_lost=self._lost,
        )
        self._open.add(connection)
        return connection
