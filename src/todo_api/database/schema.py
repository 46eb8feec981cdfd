"""Which schema a database has, and which one this program is for.

Without Alembic, whose import alone takes a tenth of a start (measured): most starts find the newest
schema and have nothing to migrate.
"""

from pathlib import Path

import psycopg

from todo_api.database.address import conninfo, reason
from todo_api.errors import StartupError

_VERSIONS = Path(__file__).parent / "migrations" / "versions"


def newest() -> str:
    """Return the newest revision that this program knows: files of revisions begin with it."""
    return max(path.name.partition("_")[0] for path in _VERSIONS.glob("[0-9]*.py"))


def current(url: str) -> str | None:
    """Return the database's revision, None where it has none to show. Raises `StartupError`."""
    try:
        with psycopg.connect(conninfo(url, direct=True)) as connection:
            row = connection.execute("SELECT version_num FROM alembic_version").fetchone()
    except (psycopg.errors.UndefinedTable, psycopg.errors.InsufficientPrivilege):
        return None
    except psycopg.Error as error:
        raise StartupError(f"DATABASE_URL: {reason(error)}") from error
    return row[0] if row else None
