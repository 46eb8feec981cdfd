"""One connection to PostgreSQL, driven straight from the event loop.

libpq's pipeline mode (https://www.postgresql.org/docs/current/libpq-pipeline-mode.html) sends
several commands and one Sync at once. Outside a transaction block they form one implicit
transaction. The server commits it at the Sync, and rolls all of it back on an error. psycopg
exposes libpq as `psycopg.pq`. Its cursors cost two to three times the CPU per request (ADR 2).
"""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NamedTuple, Self, TypeAlias

import psycopg
from psycopg import pq
from psycopg.pq import DiagnosticField, ExecStatus

from todo_api.database.failures import (
    STALE,
    ConnectionLost,
    QueryFailed,
    ServerError,
    ServerUnresponsive,
)
from todo_api.database.statement import Rows, Statement

CHUNK_ROWS = 64
"""How many rows of a stream libpq gathers before it shows them."""

BATCH_BYTES = 262_144
"""How many bytes of a stream the connection reads before it waits for `resume`."""

PAUSE_SECONDS = 10.0
"""How long a connection waits for `resume`."""

Command: TypeAlias = tuple[Statement, Sequence[bytes | None]]
"""A statement and its values in text format."""


class Result(NamedTuple):
    """Rows of the last commands, and the connection if it has more rows to stream."""

    rows: Rows
    streaming: "Connection | None" = None


class Connection:
    """A connection in pipeline mode, for one list of commands at a time.

    The connection is busy until its Sync arrives, even if the request was cancelled before. It
    calls `on_free` then, and `on_lost` once, when the connection ends.

    A streamed statement's rows come in batches. The connection does not read its socket between
    two batches, so the server has to wait for a slow client.
    """

    def __init__(
        self,
        connection: psycopg.AsyncConnection,
        *,
        prepare: bool,
        on_free: Callable[["Connection"], None],
        on_lost: Callable[["Connection"], None],
    ) -> None:
        self._psycopg = connection  # closes the handle when it is collected
        self._pgconn = connection.pgconn
        self._socket = self._pgconn.socket
        self._loop = asyncio.get_running_loop()
        self._on_free = on_free
        self._on_lost = on_lost
        self._prepare = prepare
        self._prepared: set[bytes] = set()
        """Names of the statements that this session has prepared."""
        self._preparing: set[bytes] = set()
        """Names of those that are sent with the commands under way."""
        self.busy = False
        """Whether the server works on commands."""
        self.closing = False
        """Whether the program closes the connection, as opposed to losing it."""
        self.uses = 0
        """How often the connection became free. A change tells a stream that it has ended."""
        self._pending: deque[bytes | None] = deque()
        """One entry per command without a result: the statement's name for a Prepare, else None."""
        self._result: asyncio.Future[Result] | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self._completed = 0
        """The number of commands that the server has carried out."""
        self._first_kept = 0
        """The number of the first command whose rows are part of the result."""
        self._streams = False
        self._rows: Rows = []
        self._batch_bytes = 0
        self._error: ServerError | None = None
        self._pgconn.enter_pipeline_mode()
        self._loop.add_reader(self._socket, self._on_readable)

    @classmethod
    async def open(
        cls,
        conninfo: str,
        *,
        session: Statement | None,
        prepare: bool,
        on_free: Callable[["Connection"], None],
        on_lost: Callable[["Connection"], None],
    ) -> Self:
        """Connect without blocking the loop, and run `session` once. Raises `psycopg.Error`."""
        connection = await psycopg.AsyncConnection.connect(conninfo, autocommit=True)
        try:
            if session is not None:
                await connection.execute(session.sql)
        except BaseException:
            connection.pgconn.finish()
            raise
        return cls(connection, prepare=prepare, on_free=on_free, on_lost=on_lost)

    @property
    def server_version(self) -> int:
        """The server's version as libpq has it: 180006 for 18.6."""
        return self._pgconn.server_version

    @property
    def place(self) -> str:
        """The names of the database and of its host, without any secret."""
        name, host = self._pgconn.db.decode(), self._pgconn.host.decode()
        return f"{name} on {host}"

    @property
    def closed(self) -> bool:
        """Whether the connection has ended."""
        return self._socket < 0

    def send(
        self, commands: Sequence[Command], timeout: float, kept: int = 1
    ) -> asyncio.Future[Result]:
        """Send the commands in one go, and return a future of the rows of the last `kept`.

        Its exception is a `QueryFailed`. Without a result after `timeout` seconds the connection
        drops itself, so a frozen server does not hold up the request.
        """
        self.busy = True
        result = self._expect_result(timeout)
        self._error = None
        self._pending.clear()
        self._preparing.clear()
        self._completed, self._first_kept = 0, len(commands) - kept
        self._streams = commands[-1][0].streamed
        try:
            for statement, values in commands:
                self._send_command(statement, values)
            self._pgconn.pipeline_sync()
            self._request_chunks()
            self._flush()
            self._lose_if_broken()
        except (psycopg.Error, OSError) as error:
            # The server runs nothing before the Sync, which was not sent.
            self._lose(ConnectionLost(str(error), did_not_run=True))
        return result

    def resume(self, timeout: float) -> asyncio.Future[Result]:
        """Read the next batch of a stream, on the same terms as `send`."""
        result = self._expect_result(timeout)
        if self.closed:
            self._settle(ConnectionLost("closed in the middle of a stream"))
        else:
            self._loop.add_reader(self._socket, self._on_readable)
            self._read_results()
        return result

    def close(self) -> None:
        """End the connection. Commands that have no result yet fail."""
        self.closing = True
        self._lose(ConnectionLost("closed by the program"))

    def _expect_result(self, timeout: float) -> asyncio.Future[Result]:
        result: asyncio.Future[Result] = self._loop.create_future()
        self._result = result
        self._rows, self._batch_bytes = [], 0
        self._cancel_deadline()
        self._deadline = self._loop.call_later(timeout, self._on_deadline)
        return result

    def _cancel_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _on_deadline(self) -> None:
        self._lose(ServerUnresponsive("no answer in time"))

    def _send_command(self, statement: Statement, values: Sequence[bytes | None]) -> None:
        if not self._prepare:
            self._pgconn.send_query_params(statement.sql, values)
        else:
            if statement.name not in self._prepared and statement.name not in self._preparing:
                self._pgconn.send_prepare(statement.name, statement.sql)
                self._preparing.add(statement.name)
                self._pending.append(statement.name)
            self._pgconn.send_query_prepared(statement.name, values)
        self._pending.append(None)

    def _flush(self) -> None:
        """Send as much as the socket takes, and the remainder when it takes more."""
        if self._pgconn.flush():
            self._loop.add_writer(self._socket, self._on_writable)

    def _on_writable(self) -> None:
        if self.closed:  # in the same turn of the loop
            return
        self._loop.remove_writer(self._socket)
        try:
            self._flush()
            self._lose_if_broken()
        except psycopg.OperationalError as error:
            self._lose(ConnectionLost(str(error)))

    def _on_readable(self) -> None:
        """Read the input. The end of an idle connection shows here as well."""
        if self.closed:  # in the same turn of the loop
            return
        lost: psycopg.OperationalError | None = None
        try:
            self._pgconn.consume_input()
        except psycopg.OperationalError as error:
            lost = error  # the server may have sent the reason before it closed the connection
        try:
            self._read_results()
        except psycopg.OperationalError as error:
            lost = lost or error  # a stream that broke off cannot be read in chunks any more
        if lost and not self.closed:
            self._lose(self._error or ConnectionLost(str(lost)))
        self._lose_if_broken()

    def _lose_if_broken(self) -> None:
        """End the connection if libpq has closed its socket. The loop would not notice."""
        if not self.closed and self._pgconn.status == pq.ConnStatus.BAD:
            self._lose(self._error or ConnectionLost("the server has ended the session"))

    def _read_results(self) -> None:
        pgconn = self._pgconn
        after_none = False
        while self._result is not None and not pgconn.is_busy():
            result = pgconn.get_result()
            if result is None:  # the end of one command's results, and twice: of all so far
                if after_none:
                    return
                after_none = True
                self._request_chunks()
                continue
            after_none = False
            status = result.status
            if status in {ExecStatus.TUPLES_OK, ExecStatus.COMMAND_OK}:
                self._take_rows(result)
                if prepared := self._pending.popleft():
                    self._prepared.add(prepared)
                else:
                    self._completed += 1
            elif status == ExecStatus.TUPLES_CHUNK:
                self._take_rows(result)
                if self._batch_bytes >= BATCH_BYTES:
                    self._pause()
            elif status == ExecStatus.PIPELINE_SYNC:
                self._finish()
                return
            elif status == ExecStatus.FATAL_ERROR:
                self._error = self._error or self._server_error(result)

    def _request_chunks(self) -> None:
        """Ask libpq for rows in chunks when the streamed statement becomes the current command."""
        if self._streams and len(self._pending) == 1 and self._error is None:
            self._pgconn.set_chunked_rows_mode(CHUNK_ROWS)

    def _take_rows(self, result: pq.abc.PGresult) -> None:
        """Keep the rows if the result has them. A Prepare has none."""
        if self._completed < self._first_kept:
            return
        rows = [result.get_value(row, 0) or b"" for row in range(result.ntuples)]
        self._rows += rows
        if self._streams:
            self._batch_bytes += sum(map(len, rows))

    def _pause(self) -> None:
        """Hand over a batch, and read no more until `resume`."""
        self._loop.remove_reader(self._socket)
        if self._result is None or self._result.cancelled():
            self.close()
        else:
            self._settle(Result(self._rows, self))
            self._deadline = self._loop.call_later(PAUSE_SECONDS, self.close)

    def _server_error(self, result: pq.abc.PGresult) -> ServerError | None:
        sqlstate = result.error_field(DiagnosticField.SQLSTATE)
        if sqlstate is None:
            return None  # libpq's own message about a broken connection
        severity = result.error_field(DiagnosticField.SEVERITY_NONLOCALIZED)
        # If the session ends after all results arrived, it may have committed. Else it did not.
        return ServerError(
            sqlstate.decode(),
            did_not_run=severity == b"ERROR" or bool(self._pending),
            command=self._completed,
        )

    def _finish(self) -> None:
        """Hand over the result. At the Sync, the server has committed everything or nothing."""
        error = self._error
        if error is not None and error.sqlstate in STALE:
            self._lose(error)
            return
        rows, self._rows = self._rows, []
        self.busy = False
        self.uses += 1
        self._settle(error or Result(rows))
        self._on_free(self)

    def _settle(self, outcome: Result | QueryFailed) -> None:
        """Give the outcome to the request, unless it was cancelled."""
        result, self._result = self._result, None
        self._cancel_deadline()
        if result is None or result.done():
            return
        if isinstance(outcome, QueryFailed):
            result.set_exception(outcome)
        else:
            result.set_result(outcome)

    def _lose(self, failure: QueryFailed) -> None:
        if self.closed:
            return
        with suppress(OSError):  # libpq may have closed the socket already
            self._loop.remove_reader(self._socket)
        with suppress(OSError):
            self._loop.remove_writer(self._socket)
        self._socket = -1
        self._pgconn.finish()
        self._on_lost(self)
        self._settle(failure)
