"""What Citus needs beside the schema: distributed tables, and the owner's name on every node.

One command of the operator (`todo-api migrate --citus`), which can be repeated (ADR 13).
"""

import psycopg
from psycopg import sql

from todo_api.database.address import conninfo, reason
from todo_api.errors import StartupError

_DISTRIBUTED = {
    "users": ("id", None),
    "tasks": ("user_id", "users"),
    "tombstones": ("user_id", "users"),
    "rate_limits": ("user_hash", "none"),
}
"""Tables with the column that they are distributed by, and the table whose shards lie beside."""

_REPLICATED = ("erasures", "restorations", "alembic_version")
"""Tables that every node has a copy of. An erasure becomes visible on one node after another: the
mark beside the user's row is there as soon as the row's lock is free. A worker serves only if it
can see the schema's version."""

_ROLE = (
    # Citus opens its connections between nodes as the role that the request has taken.
    "ALTER ROLE todo_member LOGIN",
    # It does not carry grants of columns to the shards (tried with 14.0).
    "GRANT SELECT, INSERT, UPDATE, DELETE ON users, tasks, tombstones TO todo_member",
    "GRANT SELECT, INSERT, UPDATE ON erasures, rate_limits TO todo_member",
)

_FUNCTIONS = (
    # Citus carries SET LOCAL to the shards' nodes, and only from a function inside a function
    # (tried with 14.0). set_config() stays on the node where it is called.
    # Without local execution, because a write that has waited while its shard moved to the worker
    # that it came through would go on with its snapshot from before, and find no task.
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
    # Its planner needs the values, because they choose the shard.
    "CREATE OR REPLACE FUNCTION plan_once() RETURNS text LANGUAGE sql AS $$ SELECT ''::text $$",
)


def statements() -> list[str]:
    """Return what `distribute` runs, in order. Each can be repeated."""
    distributed = [
        _unless_done(table, _create_distributed(table, column, neighbour))
        for table, (column, neighbour) in _DISTRIBUTED.items()
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


def _create_distributed(table: str, column: str, neighbour: str | None) -> str:
    beside = f", colocate_with => '{neighbour}'" if neighbour else ""
    return f"create_distributed_table('{table}', '{column}'{beside})"


def _unless_done(table: str, call: str) -> str:
    return (
        f"SELECT {call} WHERE NOT EXISTS"  # noqa: S608  names of this module
        f" (SELECT FROM pg_dist_partition WHERE logicalrelid = '{table}'::regclass)"
    )
