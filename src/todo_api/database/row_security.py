"""The second lock: PostgreSQL itself shows a request only its owner's rows.

The migration makes the role and the policies. Each request takes the role and names its owner in
the same pipeline as its statement, for that transaction alone: a pooler cannot carry either over
to the next client, and a login with BYPASSRLS (Neon's console roles) does not bypass anything.
"""

from collections.abc import Mapping

from todo_api.database.statement import Statement
from todo_api.errors import StartupError

ROLE = "todo_member"
"""The role without login that requests run as."""

OWNER_SETTING = "app.user_id"
"""The setting that the policies compare `user_id` with."""

POLICIES = {"tasks": "tasks_owner", "users": "users_owner"}
"""The one policy of each table."""


def take_owner(statement_timeout: float, lock_timeout: float) -> Statement:
    """Take the role and name the owner, with the transaction's timeouts in seconds.

    Poolers refuse startup options, hence the timeouts here.
    """
    settings = {
        "role": ROLE,
        "statement_timeout": f"{statement_timeout * 1000:.0f}",
        "lock_timeout": f"{lock_timeout * 1000:.0f}",
    }
    constant = ", ".join(
        f"set_config('{name}', '{value}', true)" for name, value in settings.items()
    )
    sql = f"SELECT {constant}, set_config('{OWNER_SETTING}', $1, true)"
    return Statement(b"take_owner", sql.encode(), ("owner",), writes=False)


def set_timeouts(statement_timeout: float, lock_timeout: float) -> Statement:
    """Set the session's timeouts, for a connection that takes no role."""
    sql = (
        f"SELECT set_config('statement_timeout', '{statement_timeout * 1000:.0f}', false),"
        f" set_config('lock_timeout', '{lock_timeout * 1000:.0f}', false)"
    )
    return Statement(b"set_timeouts", sql.encode(), (), writes=False)


STATE = Statement(
    b"row_security_state",
    # Without a policy a table shows nothing; with another one it may show too much.
    f"""
    SELECT json_build_object(
        'active', bool_and(row_security_active(oid)),
        'policies', (
            SELECT coalesce(json_object_agg(relation.relname, polname), '{{}}')
            FROM pg_policy JOIN pg_class AS relation ON relation.oid = polrelid
            WHERE polrelid IN ({", ".join(f"'{table}'::regclass" for table in POLICIES)})
        )
    )
    FROM pg_class WHERE oid IN ({", ".join(f"'{table}'::regclass" for table in POLICIES)})
    """.encode(),  # noqa: S608  constants of this module
    (),
    writes=False,
)
"""Says, under the role, whether row security is active on every table, and with which policies."""


def check(state: Mapping[str, object]) -> None:
    """Refuse, with `StartupError`, what `STATE` has found if it is not what the migration made."""
    if state["active"] is not True or state["policies"] != POLICIES:
        raise StartupError(
            f"ROW_SECURITY: not active for the role {ROLE}, or its policies were changed; "
            "undo that (`todo-api migrate --sql` prints the intended state) or set ROW_SECURITY=off"
        )
