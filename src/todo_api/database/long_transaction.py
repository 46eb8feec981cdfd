"""A transaction of a command: on a connection of its own, for as long as it takes."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import LiteralString

import psycopg
from psycopg import RawCursor, RawServerCursor
from psycopg.adapt import Loader
from psycopg.rows import scalar_row

from todo_api.database.address import conninfo, reason
from todo_api.database.preamble import Preamble
from todo_api.database.statement import Statement
from todo_api.errors import StartupError
from todo_api.settings import Settings

_NO_TIMEOUTS: Sequence[LiteralString] = (
    "SET LOCAL statement_timeout = 0",
    "SET LOCAL lock_timeout = 0",
    "SET LOCAL idle_in_transaction_session_timeout = 0",
    "SELECT set_config(name, '0', true) FROM pg_settings WHERE name = 'transaction_timeout'",
)
_ERASED = "TD401"
"""The SQLSTATE of `begin_owner` for a token from before the erasure of its user."""


_NO_SCHEMA = (
    *(psycopg.errors.UndefinedTable, psycopg.errors.UndefinedColumn),
    psycopg.errors.UndefinedFunction,
    psycopg.errors.InvalidParameterValue,  # the role is missing too
)


@contextmanager
def long_transaction(
    url: str, outcome: str, *, read_only: bool = False, prepare: bool = True
) -> Iterator[psycopg.Connection]:
    """Yield a connection in a transaction without timeouts, which commits at the end.

    If it is read-only, all of it sees one snapshot. Raises `StartupError` with the reason and the
    `outcome`, such as "nothing was backed up".
    """
    try:
        with (
            psycopg.connect(conninfo(url, direct=True)) as connection,
            _closed_if_stopped(connection),
        ):
            if not prepare:
                connection.prepare_threshold = None
            levels = psycopg.IsolationLevel
            connection.isolation_level = (
                levels.REPEATABLE_READ if read_only else levels.READ_COMMITTED
            )
            connection.read_only = read_only
            lift_timeouts(connection)
            yield connection
    except psycopg.Error as error:
        raise StartupError(_explain(error, outcome)) from error


@contextmanager
def _closed_if_stopped(connection: psycopg.Connection) -> Iterator[None]:
    """Close the connection at a signal, so that PostgreSQL rolls back.

    In the middle of a statement psycopg could not send the rollback, and would log that.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        connection.close()
        raise


def lift_timeouts(connection: psycopg.Connection) -> None:
    """Let the transaction, its statements and their waits take any time."""
    for statement in _NO_TIMEOUTS:
        connection.execute(statement)


def _explain(error: psycopg.Error, outcome: str) -> str:
    place = "DATABASE_URL" if error.sqlstate != _ERASED else "USER"
    if isinstance(error, _NO_SCHEMA):
        why = "the database does not have this program's schema; run `todo-api migrate`"
    elif isinstance(error, psycopg.errors.InsufficientPrivilege):
        why = "its login may not do that; use the one that migrates"
    elif isinstance(error, psycopg.errors.LockNotAvailable):
        why = "a table was in use for too long; try again"
    elif error.sqlstate == _ERASED:
        why = "the account was erased a moment ago; try again in a minute"
    else:
        why = error.sqlstate or reason(error)
    return f"{place}: {outcome}: {why}"


class _Bytes(Loader):
    """Returns a value as PostgreSQL sends it."""

    def load(self, data: "bytes | bytearray | memoryview") -> bytes:
        return bytes(data)


class OwnersTransaction:
    """Runs statements for one owner, under the same row security as a request."""

    def __init__(self, connection: psycopg.Connection, owner: str) -> None:
        self._connection = connection
        self._owner = owner
        connection.adapters.register_loader("json", _Bytes)

    @classmethod
    @contextmanager
    def begin(
        cls, url: str, settings: Settings, owner: str, outcome: str, *, read_only: bool = False
    ) -> "Iterator[OwnersTransaction]":
        """Take the role and name the owner as each request does, but without timeouts."""
        prepare = settings.prepared_statements
        with long_transaction(url, outcome, read_only=read_only, prepare=prepare) as connection:
            mine = cls(connection, owner)
            if preamble := Preamble(settings, counted=False).plain:
                mine.run(preamble, {})
                lift_timeouts(connection)
            yield mine

    def run(self, statement: Statement, values: Mapping[str, object]) -> None:
        """Run a statement."""
        RawCursor(self._connection).execute(statement.sql, self._bound(statement, values))

    def run_many(self, statement: Statement, rows: Sequence[Mapping[str, object]]) -> int:
        """Run a statement once for each row, in one round trip. Return how many rows it returned.

        On Citus the number of rows that it wrote is too high (seen with 14.0.1).
        """
        cursor = RawCursor(self._connection)
        bound = [self._bound(statement, values) for values in rows]
        cursor.executemany(statement.sql, bound, returning=True)
        number = cursor.rowcount
        while cursor.nextset():
            number += cursor.rowcount
        return number

    def stream(self, statement: Statement, values: Mapping[str, object]) -> Iterator[bytes]:
        """Yield the rows of a statement, of which only a few are in memory at a time."""
        with RawServerCursor(self._connection, "rows", row_factory=scalar_row) as cursor:
            cursor.execute(statement.sql, self._bound(statement, values))
            yield from cursor

    def _bound(self, statement: Statement, values: Mapping[str, object]) -> list[str | None]:
        bound = statement.bind({"owner": self._owner, **values})
        return [None if value is None else value.decode() for value in bound]
