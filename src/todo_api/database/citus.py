"""`todo-api migrate --citus`: distributes the tables, and has every node learn the owner (ADR 13).

An operator can repeat it.
"""

import psycopg
from psycopg import sql

from todo_api.database.address import conninfo, reason
from todo_api.errors import StartupError

_DISTRIBUTED = {
    "users": ("id", None),
    "tasks": ("user_id", "users"),
    "tombstones": ("user_id", "users"),
    "answers": ("user_id", "users"),
    "rate_limits": ("user_hash", "none"),
}
"""Tables with their distribution column, and the table that they are colocated with."""

_REPLICATED = ("erasures", "restorations", "alembic_version")
"""Reference tables, of which every node has a copy. An erasure becomes visible on one node after
another, and beside the user's row as soon as the row's lock is free. A worker has to see the
schema's version, or it would not serve."""

_ROLE = (
    # Citus connects from node to node as the role that the request has taken.
    "ALTER ROLE todo_member LOGIN",
    # Citus does not copy column grants to the shards (tried with 14.0).
    "GRANT SELECT, INSERT, UPDATE, DELETE ON users, tasks, tombstones, answers TO todo_member",
    "GRANT SELECT, INSERT, UPDATE ON erasures, rate_limits TO todo_member",
)

_FUNCTIONS = (
    # Citus sends SET LOCAL to the nodes of the shards, but only from a function inside a function
    # (tried with 14.0). It does not send set_config().
    # Local execution is off because of a shard that moves to the worker of a waiting write. The
    # write would go on with its snapshot from before the move, and find no task.
    """CREATE OR REPLACE FUNCTION set_owner(owner text) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    SET LOCAL citus.enable_local_execution = off;
    SET LOCAL citus.propagate_set_commands = 'local';
    EXECUTE format('SET LOCAL app.user_id = %L', owner);
END
$$""",
    """CREATE OR REPLACE FUNCTION name_owner(owner text) RETURNS text LANGUAGE plpgsql AS $$
BEGIN
    PERFORM set_owner(owner);
    RETURN owner;
END
$$""",
    # Citus has to plan with the values, because they select the shard.
    "CREATE OR REPLACE FUNCTION plan_once() RETURNS text LANGUAGE sql AS $$ SELECT ''::text $$",
)


def statements() -> list[str]:
    """Return the statements of `distribute`, in order. Each can be repeated."""
    distributed = [
        _unless_done(table, _create_distributed(table, column, colocated))
        for table, (column, colocated) in _DISTRIBUTED.items()
    ]
    replicated = [
        _unless_done(table, f"create_reference_table('{table}')") for table in _REPLICATED
    ]
    return [*_ROLE, *_FUNCTIONS, *distributed, *replicated]


def distribute(url: str) -> None:
    """Distribute the tables of a migrated database. Raises `StartupError`."""
    try:
        with psycopg.connect(conninfo(url, direct=True), autocommit=True) as connection:
            found = connection.execute("SELECT FROM pg_extension WHERE extname = 'citus'")
            if found.fetchone() is None:
                raise StartupError(
                    "DATABASE_URL: the database has no Citus; as its administrator run "
                    "`CREATE EXTENSION citus` on every node and add the workers"
                )
            for statement in statements():
                connection.execute(sql.SQL(statement))
    except psycopg.Error as error:
        why = error.sqlstate or reason(error)
        raise StartupError(f"DATABASE_URL: Citus did not distribute the tables ({why})") from error


def _create_distributed(table: str, column: str, colocated: str | None) -> str:
    option = f", colocate_with => '{colocated}'" if colocated else ""
    return f"create_distributed_table('{table}', '{column}'{option})"


def _unless_done(table: str, call: str) -> str:
    return (
        f"SELECT {call} WHERE NOT EXISTS"  # noqa: S608  names of this module
        f" (SELECT FROM pg_dist_partition WHERE logicalrelid = '{table}'::regclass)"
    )
