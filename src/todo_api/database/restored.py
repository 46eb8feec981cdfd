"""`todo-api restored`: no version is given out twice after a backup or a lossy failover.

Clients know versions that this database has lost, so new versions start above them (ADR 12).
"""

import time

import psycopg

from todo_api.database.address import conninfo, reason
from todo_api.errors import StartupError

MARGIN = 86_400_000
"""Milliseconds between the new versions and the known ones, and the clock. A lost version can be
ahead of both, if a process's clock was wrong by up to a day. It can also be ahead if a user wrote
more often than once a millisecond."""

_KNOWN = (
    "SELECT max(version) FROM users",
    "SELECT max(version) FROM erasures",
    "SELECT max(version) FROM restorations",
)
_LIFT = (
    "UPDATE users SET version = %(floor)s, changes_from = %(floor)s",
    "UPDATE erasures SET version = %(floor)s",
    "INSERT INTO restorations (version) VALUES (%(floor)s)",  # for users who are not in the backup
)


def lift_versions(url: str) -> int:
    """Lift the version of every user, and return the number of users.

    A second run lifts them once more. The login has to own the tables. Raises `StartupError`.
    """
    try:
        with psycopg.connect(conninfo(url, direct=True)) as connection:
            # A user who writes meanwhile has to be lifted above that write, and not be an error.
            connection.isolation_level = psycopg.IsolationLevel.READ_COMMITTED
            connection.execute("SET LOCAL statement_timeout = 0")  # one UPDATE of every user
            return lift(connection)
    except psycopg.Error as error:
        why = error.sqlstate or reason(error)
        raise StartupError(f"DATABASE_URL: no version was lifted ({why})") from error


def lift(connection: psycopg.Connection) -> int:
    """Lift the version of every user in a transaction of the caller's. Return their number."""
    known = [connection.execute(query).fetchall()[0][0] or 0 for query in _KNOWN]
    floor = max(int(time.time() * 1000), *known) + MARGIN
    users, *_ = [connection.execute(statement, {"floor": floor}) for statement in _LIFT]
    return users.rowcount
