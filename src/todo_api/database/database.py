"""The one way to the database: `run(owner, statement, values)`, in one round trip."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Self

import structlog

from todo_api.database import row_security
from todo_api.database.address import conninfo
from todo_api.database.connection import (
    STALE,
    Answer,
    AnswerOverdue,
    Command,
    Connection,
    ConnectionLost,
    QueryFailed,
)
from todo_api.database.pool import Pool
from todo_api.database.statement import Rows, Statement
from todo_api.errors import (
    AccountErased,
    ApiError,
    DatabaseBusy,
    DatabaseUnreachable,
    InternalError,
    ServiceUnavailable,
    StartupError,
    StatementTimeout,
    TooManyRequests,
)
from todo_api.settings import RATE_SECONDS, Settings

log = structlog.get_logger()

GRACE = 1.0
"""Seconds that the server gets beyond its own statement timeout to say so."""

ANSWERS: Mapping[str, type[ApiError]] = {
    "TD401": AccountErased,  # ours, raised by begin_owner (migration 0001)
    "57014": StatementTimeout,  # query_canceled: statement_timeout
    "55P03": StatementTimeout,  # lock_not_available: lock_timeout
    "40001": ServiceUnavailable,  # serialization_failure
    "40P01": ServiceUnavailable,  # deadlock_detected
    "25006": ServiceUnavailable,  # read_only_sql_transaction: a failover under way
    # Of Citus: another node is down, and this one goes on to serve others' users. It is not worth
    # a second try, because a commit that the node did not confirm may be kept.
    "08006": ServiceUnavailable,
    "CIINF": ServiceUnavailable,  # of Citus: a shard has moved since the statement was planned
    "53": DatabaseBusy,  # insufficient resources: disk, memory, connections
    "57": DatabaseUnreachable,  # operator intervention: shutdown, crash, starting up
    "08": DatabaseUnreachable,  # connection exception
}
"""What a client hears of an SQLSTATE, by code or by class; anything else is our own fault.
https://www.postgresql.org/docs/current/errcodes-appendix.html"""

TRANSIENT = STALE | {"40001", "40P01", "57P01", "57P02", "57P03", "CIINF"}
"""Worth a second try, on another connection, where nothing was kept of the first."""

_PING = Statement(b"ping", b"SELECT 'ok'", (), writes=False)


class Database:
    """Runs one statement for one owner at a time, on a connection of the pool."""

    def __init__(self, url: str, settings: Settings) -> None:
        self._settings = settings
        self._answer_timeout = settings.statement_timeout + GRACE
        self._preamble = row_security.Preamble(settings)
        uncounted = settings.model_copy(update={"rate_limit": 0})
        self._uncounted_preamble = row_security.Preamble(uncounted)
        self.pool = Pool(conninfo(url), settings, self._preamble.of_session, self._doubt)
        self._reading_on = 0
        self._in_order = False
        """Whether nothing has failed since all that requests rely on was found to be there."""

    async def open(self) -> None:
        """Begin to serve, with a connection if there is one to be had.

        A worker that starts while the database is away begins in doubt, and recovers with it. What
        is there must be in order, though: raises `StartupError` as `check` does.
        """
        self.pool.open()
        try:
            await self.check()
        except DatabaseUnreachable as error:
            log.warning("the database does not answer yet", reason=str(error.__cause__))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close every connection, and make no more."""
        self.pool.close()

    async def run(
        self,
        owner: str,
        statement: Statement,
        values: Mapping[str, object],
        *,
        continues: bool = False,
    ) -> Rows:
        """Run a statement as `owner` and return its rows, each one JSON text.

        `continues` says that its request has run a statement before, and was counted then.

        One round trip. Atomic. Tried once more where that is safe: a read whose connection broke,
        or anything that the server certainly did not keep. Raises one of our `ApiError`s.
        """
        preamble = self._uncounted_preamble if continues else self._preamble
        return (await self._run(statement, {"owner": owner, **values}, preamble)).rows

    async def read(self, owner: str, statement: Statement) -> tuple[Rows, "Rest | None"]:
        """Run a statement that reads many rows: the first ones, and the rest where there is more.

        Still one round trip: the server goes on to send as the rest is read. It holds a connection
        meanwhile, so at most half of them may be reading on; more is `DatabaseBusy`.
        """
        rows, connection = await self._run(statement, {"owner": owner}, self._preamble)
        if connection is None:
            return rows, None
        if self._reading_on >= max(1, self._settings.pool_size // 2):
            connection.close()
            raise DatabaseBusy
        self._reading_on += 1
        return rows, Rest(connection, self._answer_timeout, self._has_read_on)

    def _has_read_on(self) -> None:
        self._reading_on -= 1

    async def _run(
        self, statement: Statement, values: Mapping[str, object], preamble: row_security.Preamble
    ) -> Answer:
        """Try, and once more where that is safe."""
        commands = self._commands(statement, values, preamble)
        try:
            return await self._attempt(commands)
        except QueryFailed as failure:
            if not _may_repeat(failure, statement):
                raise self._answer(failure) from failure
            if failure.sqlstate not in {"40001", "40P01"}:
                self.pool.close_idle()  # whatever ended that connection may have ended them all
        try:
            return await self._attempt(commands)
        except QueryFailed as failure:
            raise self._answer(failure) from failure

    def _answer(self, failure: QueryFailed) -> ApiError:
        """Return what a client hears of a failure."""
        if failure.sqlstate == "TD429":
            return TooManyRequests(math.ceil(RATE_SECONDS / self._settings.rate_limit))
        if failure.sqlstate and failure.sqlstate.startswith("42"):  # no such table, or right
            self._doubt()
        return _answer(failure)

    def _doubt(self) -> None:
        self._in_order = False

    @property
    def server_version(self) -> str:
        """The version of the server, of a database that is open."""
        major, minor = divmod(self.pool.server_version, 10_000)
        return f"{major}.{minor}"

    async def why_not_ready(self) -> str | None:
        """Say why requests cannot be served, if so.

        As long as nothing has failed the last known state is the answer, so that a probe does not
        keep a serverless database awake.
        """
        if self._in_order:
            return None
        try:
            await self.check()
        except DatabaseUnreachable:
            return "The database does not answer"
        except DatabaseBusy:
            return "No connection to the database is free"
        except StartupError as error:
            log.warning("not ready", reason=str(error))
            return "The database is not in order; `todo-api check` says what to do"
        return None

    async def ping(self) -> None:
        """Ask the database for an answer. Raises one of our `ApiError`s."""
        try:
            await self._attempt([(_PING, [])])
        except QueryFailed as failure:
            raise _answer(failure) from failure

    def _commands(
        self,
        statement: Statement,
        values: Mapping[str, object],
        preamble: row_security.Preamble,
    ) -> Sequence[Command]:
        """Put before a statement what has to precede it in the same transaction."""
        before = preamble.before(statement)
        if statement.many and preamble.counts:
            # Its transaction holds the user's bucket: it must not wait for a client to read.
            statement = replace(statement, many=False)
        statements = (*statement.first, statement)
        if before is not None:
            statements = (before, *statements)
        return [(each, each.encode(values)) for each in statements]

    async def _attempt(self, commands: Sequence[Command]) -> Answer:
        return await self.pool.run(commands, self._answer_timeout)

    async def check(self) -> None:
        """Look at what requests rely on: the schema, and row security as it is configured.

        Raises `StartupError`, or `DatabaseUnreachable` with its cause.
        """
        role = self._settings.row_security
        state = row_security.STATE if role else row_security.STATE_OFF
        try:
            rows, _ = await self._attempt(
                self._commands(state, {"owner": ""}, self._uncounted_preamble)
            )
        except QueryFailed as error:
            if type(_answer(error)) is InternalError:
                raise StartupError(_refusal(error)) from error
            raise DatabaseUnreachable from error
        row_security.check(json.loads(rows[0]), role=role)
        self._in_order = True


class Rest:
    """The rows of a long answer that are still to come, in batches. It has to be closed.

    A batch is read when it is asked for, which is when the client has taken the one before: the
    whole is never in memory. Raises one of our `ApiError`s where it breaks off.
    """

    def __init__(
        self, connection: Connection, answer_timeout: float, on_close: Callable[[], None]
    ) -> None:
        self._connection: Connection | None = connection
        self._answers_before = connection.answers_given
        self._answer_timeout = answer_timeout
        self._on_close = on_close

    def __aiter__(self) -> Self:
        """Iterate over the batches."""
        return self

    async def __anext__(self) -> Rows:
        """Return the next rows."""
        if self._connection is None:
            raise StopAsyncIteration
        try:
            rows, self._connection = await self._connection.resume(self._answer_timeout)
        except QueryFailed as failure:
            raise _answer(failure) from failure
        return rows

    def close(self) -> None:
        """Give up what has not been read."""
        connection = self._connection
        # One that has given its answer may already be at work for somebody else.
        if connection is not None and connection.answers_given == self._answers_before:
            connection.close()
        self._on_close()


def _may_repeat(failure: QueryFailed, statement: Statement) -> bool:
    """Tell whether a second try is safe and promises more than the first."""
    if isinstance(failure, AnswerOverdue):
        return False  # the client has waited long enough
    if isinstance(failure, ConnectionLost):
        return failure.did_not_run or not statement.writes
    return failure.did_not_run and failure.sqlstate in TRANSIENT


def _answer(failure: QueryFailed) -> ApiError:
    """Return what a client hears of a failure."""
    if isinstance(failure, AnswerOverdue):
        return StatementTimeout()
    if isinstance(failure, ConnectionLost):
        return DatabaseUnreachable()
    state = failure.sqlstate or ""
    return ANSWERS.get(state, ANSWERS.get(state[:2], InternalError))()


def _refusal(failure: QueryFailed) -> str:
    """Say what an operator has to do about a check that failed."""
    if failure.sqlstate in {"42P01", "42883"}:  # no such table, no such function
        return (
            "DATABASE_URL: the schema is missing, or older than this program; "
            "run `todo-api migrate`, or set AUTO_MIGRATE=on"
        )
    if failure.sqlstate == "22023":
        return (
            f"ROW_SECURITY: there is no role {row_security.ROLE}; run `todo-api migrate`, or "
            "restore the database again after `CREATE ROLE` (docs/operations.md)"
        )
    if failure.sqlstate == "42501":
        return (
            f"ROW_SECURITY: the database user cannot take the role {row_security.ROLE}; as its "
            f"administrator run `GRANT {row_security.ROLE} TO` that user `WITH SET TRUE`, "
            "or set ROW_SECURITY=off"
        )
    return f"DATABASE_URL: the database refused the first statement ({failure.sqlstate})"
