"""One connection to PostgreSQL, driven straight from the event loop.

libpq's pipeline mode (https://www.postgresql.org/docs/current/libpq-pipeline-mode.html) sends
several commands and one Sync at once; outside a transaction block they form one implicit
transaction, committed at the Sync and rolled back whole on an error. psycopg exposes libpq as
`psycopg.pq`; going through its cursors instead costs two to three times the CPU per request
(ADR 2).
"""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple, Self

import psycopg
from psycopg import pq
from psycopg.pq import DiagnosticField, ExecStatus

from todo_api.database.statement import Rows, Statement

STALE = {
    "26000",  # a prepared statement is gone: somebody said DISCARD ALL
    "0A000",  # a cached plan does not fit a changed table
    "42P05",  # a pooler handed us a session that another client had prepared
}
"""Errors (by SQLSTATE) after which a connection's prepared statements are not what we think."""

CHUNK_ROWS = 64
"""How many rows of a long answer libpq gathers before we look at them."""

BATCH_BYTES = 262_144
"""How much of a long answer is taken in before somebody has to want more."""

PAUSE_SECONDS = 10.0
"""How long a connection waits for somebody to want more."""

Command = tuple[Statement, Sequence[bytes | None]]
"""A statement and its values in text format."""


class Answer(NamedTuple):
    """Rows of the last command, and the connection where there are more of them to come."""

    rows: Rows
    rest: "Connection | None" = None


class QueryFailed(Exception):
    """The commands did not all succeed. `did_not_run`: nothing of them can have been kept."""

    sqlstate: str | None = None
    did_not_run: bool = False


class ServerError(QueryFailed):
    """PostgreSQL answered with an error, and rolled everything back if `did_not_run`."""

    def __init__(self, sqlstate: str, *, did_not_run: bool) -> None:
        # The code alone: the server's words may quote a value, and this goes to the log.
        super().__init__(f"SQLSTATE {sqlstate}")
        self.sqlstate = sqlstate
        self.did_not_run = did_not_run


class ConnectionLost(QueryFailed):
    """The connection broke or was given up. After sending, nobody knows what was kept."""

    def __init__(self, reason: str, *, did_not_run: bool = False) -> None:
        super().__init__(reason)
        self.did_not_run = did_not_run


class AnswerOverdue(ConnectionLost):
    """The server said nothing in time, not even that it had timed out itself."""


class Connection:
    """A connection in pipeline mode, for one batch of commands at a time.

    It is free when its Sync has arrived, not when somebody has stopped waiting: a cancelled
    request leaves the connection busy until the server is done. `on_free` is called then, and
    `on_lost` once, whenever the connection ends.

    A long answer comes in batches, and no faster than it is asked for: between two of them the
    socket is not read, and the server waits.
    """

    def __init__(
        self,
        connection: psycopg.AsyncConnection,
        *,
        prepare: bool,
        on_free: Callable[["Connection"], None],
        on_lost: Callable[["Connection"], None],
    ) -> None:
        self._psycopg = connection  # keeps the handle alive
        self._pgconn = connection.pgconn
        self._socket = self._pgconn.socket
        self._loop = asyncio.get_running_loop()
        self._on_free = on_free
        self._on_lost = on_lost
        self._prepare = prepare
        self.closing = False
        self.answers_given = 0
        """How often it has become free: tells whether it is still at work for somebody."""
        self._prepared: set[bytes] = set()
        self._awaited: deque[bytes | None] = deque()
        """What is still to be answered, in order: a statement to prepare, by name, or a command."""
        self.busy = False
        """Whether commands are under way."""
        self._answer: asyncio.Future[Answer] | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self._in_batches = False
        self._is_batching = False
        self._rows: Rows = []
        self._held = 0
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
    def closed(self) -> bool:
        """Whether the connection has ended."""
        return self._socket < 0

    def send(self, commands: Sequence[Command], timeout: float) -> asyncio.Future[Answer]:
        """Send the commands in one go; the future has the answer to the last one.

        Its exception is a `QueryFailed`. Without an answer after `timeout` seconds the connection
        is dropped: that also holds against a server that is frozen.
        """
        self.busy = True
        answer = self._expect_answer(timeout)
        self._error = None
        self._awaited.clear()
        self._in_batches = commands[-1][0].many
        self._is_batching = False
        try:
            for statement, values in commands:
                self._send_one(statement, values)
            self._pgconn.pipeline_sync()
            self._take_in_batches()
            self._flush()
        except (psycopg.Error, OSError) as error:
            # Nothing is carried out before its Sync, which has not left.
            self._lose(ConnectionLost(str(error), did_not_run=True))
        return answer

    def resume(self, timeout: float) -> asyncio.Future[Answer]:
        """Take in the next batch of a long answer, on the same terms as `send`."""
        answer = self._expect_answer(timeout)
        if self.closed:
            self._settle(ConnectionLost("closed while its answer was being read"))
        else:
            self._loop.add_reader(self._socket, self._on_readable)
            self._read_results()
        return answer

    def _expect_answer(self, timeout: float) -> asyncio.Future[Answer]:
        answer: asyncio.Future[Answer] = self._loop.create_future()
        self._answer = answer
        self._rows, self._held = [], 0
        self._forget_deadline()
        self._deadline = self._loop.call_later(timeout, self._overdue)
        return answer

    def _forget_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def close(self) -> None:
        """End the connection; what is under way fails."""
        self.closing = True
        self._lose(ConnectionLost("closed by the program"))

    def _send_one(self, statement: Statement, values: Sequence[bytes | None]) -> None:
        if not self._prepare:
            self._pgconn.send_query_params(statement.sql, values)
        else:
            if statement.name not in self._prepared:
                self._pgconn.send_prepare(statement.name, statement.sql)
                self._awaited.append(statement.name)
            self._pgconn.send_query_prepared(statement.name, values)
        self._awaited.append(None)

    def _flush(self) -> None:
        """Send what the socket takes; the rest when it takes more."""
        if self._pgconn.flush():
            self._loop.add_writer(self._socket, self._on_writable)

    def _on_writable(self) -> None:
        self._loop.remove_writer(self._socket)
        try:
            self._flush()
        except psycopg.OperationalError as error:
            self._lose(ConnectionLost(str(error)))

    def _on_readable(self) -> None:
        """Take in what has arrived; also notices at once when an idle connection ends."""
        lost: psycopg.OperationalError | None = None
        try:
            self._pgconn.consume_input()
        except psycopg.OperationalError as error:
            lost = error  # what came before the end may still explain it
        self._read_results()
        if lost and not self.closed:
            self._lose(self._error or ConnectionLost(str(lost)))

    def _read_results(self) -> None:
        pgconn = self._pgconn
        at_end = False
        while self._answer is not None and not pgconn.is_busy():
            result = pgconn.get_result()
            if result is None:  # the end of one command's results; twice: of all that arrived
                if at_end:
                    return
                at_end = True
                self._take_in_batches()
                continue
            at_end = False
            status = result.status
            if status in {ExecStatus.TUPLES_OK, ExecStatus.COMMAND_OK}:
                self._take(result)
                if prepared := self._awaited.popleft():
                    self._prepared.add(prepared)
            elif status == ExecStatus.TUPLES_CHUNK:
                self._take(result)
                if self._held >= BATCH_BYTES:
                    self._pause()
            elif status == ExecStatus.PIPELINE_SYNC:
                self._finish()
                return
            elif status == ExecStatus.FATAL_ERROR:
                self._error = self._error or self._server_error(result)

    def _take_in_batches(self) -> None:
        """Ask libpq for chunks of rows: once, when the command's turn has come."""
        if not self._in_batches or self._is_batching:
            return
        if len(self._awaited) == 1 and self._error is None:
            self._is_batching = True
            self._pgconn.set_chunked_rows_mode(CHUNK_ROWS)

    def _take(self, result: pq.abc.PGresult) -> None:
        """Keep the rows, of the last command alone."""
        if len(self._awaited) > 1:
            return
        rows = [result.get_value(row, 0) or b"" for row in range(result.ntuples)]
        self._rows += rows
        if self._in_batches:
            self._held += sum(map(len, rows))

    def _pause(self) -> None:
        """Hand over a batch, and read on when somebody wants more."""
        self._loop.remove_reader(self._socket)
        if self._answer is None or self._answer.cancelled():
            self.close()
        else:
            self._settle(Answer(self._rows, self))
            self._deadline = self._loop.call_later(PAUSE_SECONDS, self.close)

    def _server_error(self, result: pq.abc.PGresult) -> ServerError | None:
        sqlstate = result.error_field(DiagnosticField.SQLSTATE)
        if sqlstate is None:
            return None  # libpq's own words about a broken connection
        severity = result.error_field(DiagnosticField.SEVERITY_NONLOCALIZED)
        # A session that ends after the last command was carried out may have committed it.
        return ServerError(
            sqlstate.decode(),
            did_not_run=severity == b"ERROR" or bool(self._awaited),
        )

    def _finish(self) -> None:
        """The Sync is here: everything sent was committed, or nothing."""
        error = self._error
        if error is not None and error.sqlstate in STALE:
            self._lose(error)
            return
        rows, self._rows = self._rows, []
        self.busy = False
        self.answers_given += 1
        self._settle(error or Answer(rows))
        self._on_free(self)

    def _settle(self, outcome: Answer | QueryFailed) -> None:
        """Tell whoever waits, if he still does."""
        answer, self._answer = self._answer, None
        self._forget_deadline()
        if answer is None or answer.done():
            return
        if isinstance(outcome, QueryFailed):
            answer.set_exception(outcome)
        else:
            answer.set_result(outcome)

    def _overdue(self) -> None:
        self._lose(AnswerOverdue("no answer in time"))

    def _lose(self, failure: QueryFailed) -> None:
        if self.closed:
            return
        self._loop.remove_reader(self._socket)
        self._loop.remove_writer(self._socket)
        self._socket = -1
        self._pgconn.finish()
        self._on_lost(self)
        self._settle(failure)
