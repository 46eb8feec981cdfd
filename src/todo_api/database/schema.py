"""The schema's version: the one that a database has, and the newest that this program knows.

It does not use Alembic, because most starts have nothing to migrate and its import alone takes a
tenth of a start (measured).
"""

from pathlib import Path

import psycopg

from todo_api.database.address import conninfo, reason
from todo_api.errors import StartupError

_VERSIONS = Path(__file__).parent / "migrations" / "versions"


def known() -> set[str]:
    """Return every revision. The name of a revision's file begins with its number."""
    return {path.name.partition("_")[0] for path in _VERSIONS.glob("[0-9]*.py")}


def newest() -> str:
    """Return the newest revision."""
    return max(known())


def current(url: str) -> str | None:
    """Return the database's revision, or None without one.

    Raises `StartupError`, also if the login may not read it. Such a login cannot migrate either.
    """
    try:
        with psycopg.connect(conninfo(url, direct=True)) as connection:
            row = connection.execute("SELECT version_num FROM alembic_version").fetchone()
    except psycopg.errors.UndefinedTable:
        return None
    except psycopg.errors.InsufficientPrivilege as error:
        raise StartupError(
            "AUTO_MIGRATE: the database user may not read the schema's version, so it cannot"
            " migrate; set AUTO_MIGRATE=off and run `todo-api migrate` as an administrator"
        ) from error
    except psycopg.Error as error:
        raise StartupError(f"DATABASE_URL: {reason(error)}") from error
    return row[0] if row else None
