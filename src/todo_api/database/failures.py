"""Failures of a statement, and the error that a client gets for each.

    QueryFailed                    the commands did not all succeed
    ├── ServerError                PostgreSQL reported an error, with its SQLSTATE
    └── ConnectionLost             the connection broke, or the program closed it
        ├── ConnectionRefused      PostgreSQL or a pooler did not accept the connection
        └── ServerUnresponsive     the server sent nothing before the deadline

SQLSTATEs: https://www.postgresql.org/docs/current/errcodes-appendix.html
"""

from collections.abc import Mapping

from todo_api.errors import (
    AccountErased,
    ApiError,
    DatabaseBusy,
    DatabaseUnreachable,
    InternalError,
    ServiceUnavailable,
    StatementTimeout,
    TooManyRequests,
)

NOTHING_WRITTEN = "22012"
"""division_by_zero: an operation of a batch has found no task (`_or_failure` in the statements)."""

API_ERRORS: Mapping[str, type[ApiError]] = {
    "TD401": AccountErased,  # ours, raised by begin_owner (migration 0001)
    "TD429": TooManyRequests,  # ours, raised by take_request (migration 0001)
    "57014": StatementTimeout,  # query_canceled: statement_timeout
    "55P03": StatementTimeout,  # lock_not_available: lock_timeout
    "40001": ServiceUnavailable,  # serialization_failure
    "40P01": ServiceUnavailable,  # deadlock_detected
    "25006": ServiceUnavailable,  # read_only_sql_transaction: a failover is under way
    # On Citus: another node is down, and this one still serves other users. A second attempt is not
    # safe, because the other node may have committed without confirming it.
    "08006": ServiceUnavailable,
    "CIINF": ServiceUnavailable,  # on Citus: a shard has moved since the statement was planned
    # internal_error: Citus reports it for a transaction whose node stops. PostgreSQL itself reports
    # it only for its own bugs, and a client can only try again. The log has the code.
    "XX000": ServiceUnavailable,
    "58": ServiceUnavailable,  # system error outside of PostgreSQL: its disk, or a node of Citus
    "53": DatabaseBusy,  # insufficient resources: disk, memory, connections
    # transaction_timeout, if it was set after the start (`inspection.py`)
    "25P04": StatementTimeout,
    "57": DatabaseUnreachable,  # operator intervention: shutdown, crash, starting up
    "08": DatabaseUnreachable,  # connection exception
}
"""The error that a client gets for an SQLSTATE, or for its class (the first two characters).
Any other SQLSTATE is an `InternalError`."""

STALE = {
    "26000",  # a prepared statement is gone, because a client of the pooler ran DISCARD ALL
    "0A000",  # a cached plan does not fit a changed table
    "42P05",  # a pooler gave us a session in which another client had prepared statements
}
"""SQLSTATEs after which a connection's prepared statements are not the ones that we prepared."""

CONFLICTS = {
    "40001",  # serialization_failure
    "40P01",  # deadlock_detected
    # unique_violation: two requests with one idempotency key, where another process has just made
    # the row of their user, which they wanted to lock
    "23505",
}
"""SQLSTATEs of a transaction that collided with another one, on a connection that still works."""

_TRANSIENT = STALE | CONFLICTS | {"57P01", "57P02", "57P03", "57P05", "CIINF"}
"""SQLSTATEs after which a second attempt can succeed."""


class QueryFailed(Exception):
    """The commands did not all succeed. With `did_not_run`, the server kept none of them."""

    sqlstate: str | None = None
    did_not_run: bool = False
    api_error: type[ApiError] = InternalError
    """The error that a client gets."""


class ServerError(QueryFailed):
    """PostgreSQL reported an error. With `did_not_run`, it rolled everything back.

    `command` is the number of the command that failed, from 0.
    """

    def __init__(self, sqlstate: str, *, did_not_run: bool, command: int = 0) -> None:
        # Only the code, because this goes to the log and the server's message may quote a value.
        super().__init__(f"SQLSTATE {sqlstate}")
        self.sqlstate = sqlstate
        self.did_not_run = did_not_run
        self.command = command
        self.api_error = API_ERRORS.get(sqlstate, API_ERRORS.get(sqlstate[:2], InternalError))


class ConnectionLost(QueryFailed):
    """The connection broke or was closed. Without `did_not_run`, a write may have been kept."""

    api_error: type[ApiError] = DatabaseUnreachable

    def __init__(self, reason: str, *, did_not_run: bool = False) -> None:
        super().__init__(reason)
        self.did_not_run = did_not_run


class ConnectionRefused(ConnectionLost):
    """PostgreSQL or a pooler answered, and did not accept the connection. It says why."""

    def __init__(self, reason: str, *, is_full: bool) -> None:
        super().__init__(reason, did_not_run=True)
        self.api_error = DatabaseBusy if is_full else DatabaseUnreachable


class ServerUnresponsive(ConnectionLost):
    """The server sent nothing before the deadline, not even its own timeout."""

    api_error = StatementTimeout


def may_repeat(failure: QueryFailed, *, writes: bool) -> bool:
    """Return whether a second attempt is safe and can succeed."""
    if isinstance(failure, ServerUnresponsive):
        return False  # the client has waited long enough
    if isinstance(failure, ConnectionLost):
        return failure.did_not_run or not writes
    return failure.did_not_run and failure.sqlstate in _TRANSIENT
