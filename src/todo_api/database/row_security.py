"""The second lock: PostgreSQL itself shows a request only its owner's rows.

The migration makes the role and the policies. Each request takes the role and names its owner in
the same pipeline as its statement (`preamble.py`), for that transaction only. So a pooler cannot
carry them over to the next client. The policies also bind a login with BYPASSRLS (Neon's console
roles), because the role does not have it.
"""

from collections.abc import Mapping

from todo_api.database.statement import Statement

ROLE = "todo_member"
"""The role without login that requests take."""

OWNER_SETTING = "app.user_id"
"""The setting that the policies compare `user_id` with."""

TABLES = ("answers", "erasures", "rate_limits", "tasks", "tombstones", "users")
"""The tables with users' rows. Each has row security and the one policy `<table>_owner`."""

_RELATIONS = ", ".join(f"to_regclass('{table}')" for table in TABLES)
_VERSION = "'version', (SELECT max(version_num) FROM alembic_version)"
STATE = Statement(
    b"row_security_state",
    # A table without a policy shows nothing, and one with another policy may show too much.
    f"""
    SELECT json_build_object(
        {_VERSION},
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
"""Under the role: the schema's version, whether row security is active on every table, and with
which policies."""

STATE_OFF = Statement(
    b"row_security_state_off",
    f"""
    SELECT json_build_object({_VERSION}, 'active', bool_or(row_security_active(oid)))
    FROM pg_class WHERE oid IN ({_RELATIONS})
    """.encode(),  # noqa: S608  constants of this module
    (),
    writes=False,
)
"""For `ROW_SECURITY=off`: the schema's version, and whether row security binds the login."""

OFF_NEEDS = (
    "ROW_SECURITY: off needs a database user that owns the tables, or that may use "
    "them and has BYPASSRLS; give it that, or set ROW_SECURITY=on"
)


def problem(state: Mapping[str, object], *, role: bool) -> str | None:
    """Return what is wrong with the result of `STATE`, or of `STATE_OFF` without `role`."""
    if not role:
        return OFF_NEEDS if state["active"] else None
    policies = [f"{table}_owner" for table in TABLES]
    if state["active"] and state["policies"] == policies and state["all"] == len(TABLES):
        return None
    return (
        f"ROW_SECURITY: not active for the role {ROLE}, or its policies were changed; "
        "undo that (`todo-api migrate --sql` prints the intended state)"
    )
