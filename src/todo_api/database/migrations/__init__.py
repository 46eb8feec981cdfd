"""The schema's migrations, inside the package so that an installed wheel can run them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext, MigrationInfo
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import Connection, Engine, MetaData, NullPool, create_engine, text
from sqlalchemy.exc import DBAPIError

from todo_api.database.address import conninfo, reason
from todo_api.database.inspection import wrong_encoding
from todo_api.errors import StartupError

ADVISORY_LOCK = 0x70D0_A91
"""The number of the lock that a migration holds. Any fixed number would do."""

LOCK_TIMEOUT = "2s"
"""How long a migration may wait for a table. Requests for the table wait behind it."""


def configuration(connection: Connection | None = None, metadata: MetaData | None = None) -> Config:
    """Return Alembic's configuration, to run on `connection` and compare with `metadata`."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    config.attributes.update(connection=connection, metadata=metadata)
    return config


def migrate(
    url: str, revision: str = "head", applied: Callable[[str], object] = lambda _revision: None
) -> None:
    """Bring the schema to a revision, in one transaction. Raises `StartupError`.

    Calls `applied` with each revision, before the transaction is committed.
    Processes that start together wait for each other. A schema that is newer than this program
    stays as it is, because the old program runs on it during a rolling update.
    """
    engine = _engine(url)

    def on_version_apply(*, step: MigrationInfo, **_: Any) -> None:
        applied(str(step.up_revision_id))

    try:
        with engine.begin() as connection:
            _refuse_other_encoding(connection)
            # A migration may take longer than the login's statements usually may.
            connection.execute(text("SET LOCAL statement_timeout = 0"))
            # A lock of the transaction, because a session's lock does not hold through a pooler.
            connection.execute(text(f"SELECT pg_advisory_xact_lock({ADVISORY_LOCK})"))
            connection.execute(text(f"SET LOCAL lock_timeout = '{LOCK_TIMEOUT}'"))
            if not _is_newer(connection):
                settings = configuration(connection)
                settings.attributes["on_version_apply"] = on_version_apply
                command.upgrade(settings, revision)
    except DBAPIError as error:
        raise StartupError(_explain(error)) from error


def print_sql() -> None:
    """Print the script from an empty database to the newest schema."""
    command.upgrade(configuration(), "head", sql=True)


def _engine(url: str) -> Engine:
    """Return an engine that leaves reading the address to libpq."""
    address = conninfo(url, direct=True)
    return create_engine(
        "postgresql+psycopg://",
        creator=lambda: psycopg.connect(address),
        poolclass=NullPool,
        # A migration that has waited for another one has to see its result.
        isolation_level="READ COMMITTED",
    )


def _refuse_other_encoding(connection: Connection) -> None:
    encoding = connection.execute(text("SHOW server_encoding")).scalar_one()
    if encoding != "UTF8":
        raise StartupError(wrong_encoding(encoding))


def _is_newer(connection: Connection) -> bool:
    """Return whether the database is at a revision that this program does not know."""
    current = MigrationContext.configure(connection).get_current_revision()
    if current is None:
        return False
    try:
        ScriptDirectory.from_config(configuration()).get_revision(current)
    except CommandError:
        return True
    return False


def _explain(error: DBAPIError) -> str:
    """Return one line of advice for the operator, without an address."""
    sqlstate = getattr(error.orig, "sqlstate", None)
    if sqlstate == "25006":  # read_only_sql_transaction
        return (
            "DATABASE_URL: the database is read-only, so its schema cannot be migrated; "
            "migrate its primary, and set AUTO_MIGRATE=off for a read-only copy"
        )
    if sqlstate in {"42501", "3F000"}:  # insufficient_privilege, invalid_schema_name
        return (
            "DATABASE_URL: its user may not make the schema; migrate once as an administrator "
            "(`todo-api migrate --sql` prints the statements) and set AUTO_MIGRATE=off"
        )
    if sqlstate == "55P03":  # lock_not_available
        return "AUTO_MIGRATE: a table was in use for too long; nothing was changed, start again"
    if sqlstate is None:
        return f"DATABASE_URL: {reason(error.orig)}"
    return f"DATABASE_URL: the migration failed and was rolled back ({sqlstate})"
