"""The second lock: PostgreSQL itself shows a request only its owner's rows.

The migration makes the role and the policies. Each request takes the role and names its owner in
the same pipeline as its statement (`preamble.py`), for that transaction only. So a pooler cannot
carry them over to the next client. The policies also bind a login with BYPASSRLS (Neon's console
roles), because the role does not have it.
"""

from collections.abc import Mapping

from todo_api.database.statement import Statement
from todo_api.errors import StartupError

ROLE = "todo_member"
"""The role without login that requests take."""

OWNER_SETTING = "app.user_id"
"""The setting that the policies compare `user_id` with."""

TABLES = ("answers", "erasures", "rate_limits", "tasks", "tombstones", "users")
"""The tables with users' rows. Each has row security and the one policy `<table>_owner`."""

_ISOLATION = "'isolation', current_setting('transaction_isolation')"
"""The isolation level. A write that has waited for a lock has to read its rows again (ADR 12)."""

_RELATIONS = ", ".join(f"'{table}'::regclass" for table in TABLES)
STATE = Statement(
    b"row_security_state",
    # A table without a policy shows nothing, and one with another policy may show too much.
    f"""
    SELECT json_build_object(
        {_ISOLATION},
        'active', bool_and(row_security_active(oid)),
        'policies', (
            SELECT json_agg(polname ORDER BY polname) FROM pg_policy
            WHERE polrelid IN ({_RELATIONS})
            AND pg_get_expr(polqual, polrelid) LIKE '%{OWNER_SETTING}%'
        ),
        'all', (SELECT count(*) FROM pg_policy WHERE polrelid IN ({_RELATIONS}))
    )
    FROM pg_class WHERE oid IN ({_RELATIONS})
    """.encode(),  # noqa: S608  constants of this module
    (),
    writes=False,
)
"""Under the role: whether row security is active on every table, and with which policies."""

STATE_OFF = Statement(
    b"row_security_state_off",
    f"""
    SELECT json_build_object(
        {_ISOLATION},
        'active', bool_or(row_security_active(oid)),
        'granted', bool_and(
            has_table_privilege(oid, 'SELECT') AND has_table_privilege(oid, 'INSERT')
            AND has_table_privilege(oid, 'UPDATE') AND has_table_privilege(oid, 'DELETE')
        )
    )
    FROM pg_class WHERE oid IN ({_RELATIONS})
    """.encode(),  # noqa: S608  constants of this module
    (),
    writes=False,
)
"""For `ROW_SECURITY=off`: whether row security binds the login, and whether it may use the
tables."""


def check(state: Mapping[str, object], *, role: bool) -> None:
    """Raise `StartupError` if requests cannot work with the result of `STATE` or `STATE_OFF`."""
    found = dict(state)
    if found.pop("isolation") != "read committed":
        raise StartupError(
            "DATABASE_URL: transactions are not READ COMMITTED; run `ALTER ROLE` for its user with"
            " `SET default_transaction_isolation = 'read committed'`"
        )
    if not role and found != {"active": False, "granted": True}:
        raise StartupError(
            "ROW_SECURITY: off needs a database user that owns the tables, or that may use "
            "them and has BYPASSRLS; give it that, or set ROW_SECURITY=on"
        )
    policies = [f"{table}_owner" for table in TABLES]
    if role and found != {"active": True, "policies": policies, "all": len(TABLES)}:
        raise StartupError(
            f"ROW_SECURITY: not active for the role {ROLE}, or its policies were changed; "
            "undo that (`todo-api migrate --sql` prints the intended state) or set ROW_SECURITY=off"
        )


def explain(sqlstate: str | None) -> str:
    """Return advice for the operator if `STATE` or `STATE_OFF` fails with this SQLSTATE."""
    if sqlstate in {"42P01", "42883"}:  # undefined_table, undefined_function
        return (
            "DATABASE_URL: the schema is missing, or older than this program; "
            "run `todo-api migrate`, or set AUTO_MIGRATE=on"
        )
    if sqlstate == "22023":  # invalid_parameter_value
        return (
            f"ROW_SECURITY: there is no role {ROLE}; run `todo-api migrate`, or "
            "restore the database again after `CREATE ROLE` (docs/operations.md)"
        )
    if sqlstate == "42501":  # insufficient_privilege
        return (
            f"ROW_SECURITY: the database user cannot take the role {ROLE}; as its "
            f"administrator run `GRANT {ROLE} TO` that user `WITH SET TRUE`, "
            "or set ROW_SECURITY=off"
        )
    return f"DATABASE_URL: the database refused the first statement ({sqlstate})"
