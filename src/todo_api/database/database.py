"""The one way to the database: `run(owner, statement, values)`, in one round trip."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Self, TypeAlias

import structlog

from todo_api.database import inspection, row_security
from todo_api.database.address import conninfo
from todo_api.database.connection import Command, Connection, Result
from todo_api.database.failures import (
    CONFLICTS,
    NOTHING_WRITTEN,
    ConnectionRefused,
    QueryFailed,
    ServerError,
    may_repeat,
)
from todo_api.database.inspection import Inspection, Problem, refuse
from todo_api.database.pool import Pool
from todo_api.database.preamble import Preamble
from todo_api.database.statement import Rows, Statement
from todo_api.errors import (
    ApiError,
    DatabaseBusy,
    InternalError,
    StartupError,
    TaskNotFound,
    TooManyRequests,
)
from todo_api.settings import RATE_SECONDS, Settings

log = structlog.get_logger()

GRACE_SECONDS = 1.0
"""How long the server may take to report its own statement timeout."""

Call: TypeAlias = tuple[Statement, Mapping[str, object]]
"""A statement and its values by name."""

_VERSIONS = Statement(
    b"versions",
    b"SELECT json_build_array(id, version) FROM versions_of($1)",
    ("owners",),
    writes=False,
)
_PING = Statement(b"ping", b"SELECT 'ok'", (), writes=False)


class Database:
    """Runs one statement for one owner at a time, on a connection of the pool."""

    def __init__(self, url: str, settings: Settings) -> None:
        self._settings = settings
        self._result_timeout = settings.statement_timeout + GRACE_SECONDS
        self._preamble = Preamble(settings)
        self._uncounted_preamble = Preamble(settings, counted=False)
        self.pool = Pool(
            conninfo(url), settings, self._preamble.session, self._invalidate_readiness
        )
        self._streams = 0
        """The number of `StreamedRows` that are not closed."""
        self._known_ready = False
        """Whether the last `check` passed, and nothing has failed since."""

    async def open(self) -> None:
        """Begin to serve. Raises `StartupError` as `check` does.

        If the database does not answer, it begins all the same. It is not ready then, and recovers
        with the database.
        """
        self.pool.open()
        try:
            await self.check()
        except ApiError as error:
            log.warning("no answer of the database yet", reason=str(error.__cause__ or error))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close every connection, and refuse to make new ones."""
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

        With `continues`, its request has run a statement before, and the rate limit counted it
        then.

        One round trip. Atomic. A read whose connection broke is tried once more, and so is anything
        that the server certainly did not keep. Raises an `ApiError`.
        """
        preamble = self._uncounted_preamble if continues else self._preamble
        commands = self._commands(statement, {"owner": owner, **values}, preamble)
        return (await self._run(commands, writes=statement.writes)).rows

    async def run_batch(
        self, owner: str, first: Sequence[Call], operations: Sequence[Call]
    ) -> Rows:
        """Run writes in one transaction. Return the rows of `operations`, in their order.

        One round trip, all or nothing. If one of them finds nothing to write, this raises
        `TaskNotFound` with its number in `operation`, which is negative for one of `first`.
        """
        before = self._preamble.before(operations[0][0])
        calls = [*([(before, {})] if before else []), *first, *operations]
        commands = [(each, each.bind({"owner": owner, **values})) for each, values in calls]
        try:
            return (await self._run(commands, writes=True, kept=len(operations))).rows
        except InternalError as error:
            failure = error.__cause__
            if not isinstance(failure, ServerError) or failure.sqlstate != NOTHING_WRITTEN:
                raise
            nothing = TaskNotFound()
            nothing.operation = failure.command - (len(calls) - len(operations))
            raise nothing from failure

    async def stream(
        self,
        owner: str,
        statement: Statement,
        values: Mapping[str, object],
        *,
        continues: bool = False,
    ) -> tuple[Rows, "StreamedRows | None"]:
        """Run a streamed statement. Return its first rows, and the others if there are more.

        Still one round trip, because the server goes on to send as the rows are read. A stream
        holds a connection. Streams may hold half of the pool, and one more raises `DatabaseBusy`.
        """
        preamble = self._uncounted_preamble if continues else self._preamble
        commands = self._commands(statement, {"owner": owner, **values}, preamble)
        rows, connection = await self._run(commands, writes=False)
        if connection is None:
            return rows, None
        if self._streams >= max(1, self._settings.pool_size // 2):
            connection.close()
            raise DatabaseBusy
        self._streams += 1
        return rows, StreamedRows(
            connection, self._result_timeout, self._api_error, self._on_stream_closed
        )

    def _on_stream_closed(self) -> None:
        self._streams -= 1

    async def versions(self, owners: list[str]) -> Mapping[str, int]:
        """Return the versions of these owners, without those who have none. Raises an `ApiError`.

        The one query that is not of a single owner. It learns nothing but versions.
        """
        take_role = [inspection.TAKE_ROLE] if self._settings.row_security else []
        statements = [self._preamble.timeouts, *take_role, _VERSIONS]
        try:
            result = await self._attempt(
                [(each, each.bind({"owners": owners})) for each in statements]
            )
        except QueryFailed as failure:
            raise self._api_error(failure) from failure
        return dict(map(json.loads, result.rows))

    async def ping(self) -> None:
        """Ask the database for an answer. Raises an `ApiError`."""
        try:
            await self._attempt([(_PING, [])])
        except QueryFailed as failure:
            raise self._api_error(failure) from failure

    @property
    def server_version(self) -> str:
        """The version of the server, once a connection is open."""
        major, minor = divmod(self.pool.server_version, 10_000)
        return f"{major}.{minor}"

    async def why_not_ready(self) -> str | None:
        """Return why requests cannot be served, or None if they can.

        As long as nothing fails, this does not ask the database again. So a probe does not keep a
        serverless database awake.
        """
        if self._known_ready:
            return None
        try:
            await self.check()
        except ApiError as error:
            log.warning("not ready", reason=str(error.__cause__ or type(error).__name__))
            return _without_answer(error)
        except StartupError as error:
            log.warning("not ready", reason=str(error))
            return "The database is not in order; `todo-api check` says what to do"
        return None

    async def check(self) -> list[Problem]:
        """Check everything that requests rely on (`inspection.py`). Return what may stay.

        Raises `StartupError`, or an `ApiError` with its cause if there is no answer.
        """
        problems = list((await self.inspect()).problems())
        refuse(problems)
        self._known_ready = True
        return problems

    async def inspect(self) -> Inspection:
        """Find out what requests rely on. Raises as `check` does."""
        found = Inspection(await self._ask(inspection.FACTS), self._settings)
        if found.shows_state:
            role = self._settings.row_security
            query = row_security.STATE if role else row_security.STATE_OFF
            found.add_state(await self._ask(query))
        return found

    async def why_not_migrating(self, found: Inspection) -> str | None:
        """Return why the login cannot migrate, or None if it can. Raises as `check` does."""
        return inspection.why_not_migrating(await self._object([(inspection.MIGRATION, [])]), found)

    async def _ask(self, query: Statement) -> Mapping[str, Any]:
        """Run a query as requests do, but without an owner, and as the login if it has to."""
        take_role = [inspection.TAKE_ROLE] if self._settings.row_security else []
        statements = [self._preamble.timeouts, *take_role, query]
        return await self._object([(each, []) for each in statements])

    async def _object(self, commands: Sequence[Command]) -> Mapping[str, Any]:
        """Return the JSON object that the last command selects."""
        try:
            rows, _ = await self._attempt(commands)
        except QueryFailed as failure:
            if failure.api_error is InternalError:
                raise StartupError(
                    f"DATABASE_URL: the database refused the first statement ({failure.sqlstate})"
                ) from failure
            raise self._api_error(failure) from failure
        found: Mapping[str, Any] = json.loads(rows[0])
        return found

    def _invalidate_readiness(self) -> None:
        self._known_ready = False

    async def _run(self, commands: Sequence[Command], *, writes: bool, kept: int = 1) -> Result:
        """Run commands, with a second attempt where that is safe."""
        try:
            return await self._attempt(commands, kept)
        except QueryFailed as failure:
            if not may_repeat(failure, writes=writes):
                raise self._api_error(failure) from failure
            if failure.sqlstate not in CONFLICTS:
                self.pool.close_idle()  # the other connections may have broken with this one
        try:
            return await self._attempt(commands, kept)
        except QueryFailed as failure:
            raise self._api_error(failure) from failure

    async def _attempt(self, commands: Sequence[Command], kept: int = 1) -> Result:
        return await self.pool.run(commands, self._result_timeout, kept)

    def _commands(
        self, statement: Statement, values: Mapping[str, object], preamble: Preamble
    ) -> Sequence[Command]:
        """Return the preamble, the statements to run first, and the statement, with values."""
        before = preamble.before(statement)
        if statement.streamed and preamble.counts:
            # Its transaction locks the user's rate limit, so it must not wait for a slow client.
            statement = replace(statement, streamed=False)
        statements = (*statement.first, statement)
        if before is not None:
            statements = (before, *statements)
        return [(each, each.bind(values)) for each in statements]

    def _api_error(self, failure: QueryFailed) -> ApiError:
        """Return the error that the client gets."""
        if failure.sqlstate and failure.sqlstate.startswith("42"):  # no such table, no right to it
            self._invalidate_readiness()
        if failure.api_error is TooManyRequests:
            return TooManyRequests(math.ceil(RATE_SECONDS / self._settings.rate_limit))
        return failure.api_error()


def _without_answer(error: ApiError) -> str:
    """Return for `/readyz` why the database gave no answer."""
    if isinstance(error.__cause__, ConnectionRefused):
        return "The database does not accept connections"
    if isinstance(error, DatabaseBusy):
        return "No connection to the database is free"
    return "The database does not answer"


class StreamedRows:
    """The rows of a stream after its first ones, in batches. The caller has to close it.

    It reads a batch when the client has taken the one before, so it never holds all rows in memory.
    Raises an `ApiError` if the stream breaks off.
    """

    def __init__(
        self,
        connection: Connection,
        result_timeout: float,
        api_error: Callable[[QueryFailed], ApiError],
        on_close: Callable[[], None],
    ) -> None:
        self._connection: Connection | None = connection
        self._uses = connection.uses
        self._result_timeout = result_timeout
        self._api_error = api_error
        self._on_close = on_close

    def __aiter__(self) -> Self:
        """Iterate over the batches."""
        return self

    async def __anext__(self) -> Rows:
        """Return the next batch."""
        if self._connection is None:
            raise StopAsyncIteration
        try:
            rows, self._connection = await self._connection.resume(self._result_timeout)
        except QueryFailed as failure:
            raise self._api_error(failure) from failure
        return rows

    def close(self) -> None:
        """Drop the rows that were not read."""
        connection = self._connection
        # After its last row or its error, the connection may already serve another request.
        if connection is not None and connection.uses == self._uses:
            connection.close()
        self._on_close()
