"""The second lock: PostgreSQL itself shows a request only its owner's rows.

The migration makes the role and the policies. Each request takes the role and names its owner in
the same pipeline as its statement, for that transaction alone: a pooler cannot carry either over
to the next client, and a login with BYPASSRLS (Neon's console roles) does not bypass anything.
"""

from collections.abc import Mapping

from todo_api.database.statement import Statement
from todo_api.errors import StartupError
from todo_api.settings import Settings

ROLE = "todo_member"
"""The role without login that requests run as."""

OWNER_SETTING = "app.user_id"
"""The setting that the policies compare `user_id` with."""

TABLES = ("erasures", "rate_limits", "tasks", "tombstones", "users")
"""The tables with users' rows: under row security, each with the one policy `<table>_owner`."""


class Preamble:
    """What goes out before each statement, in the same transaction.

    Also the timeouts: poolers refuse startup options.
    """

    def __init__(self, settings: Settings) -> None:
        timeouts = settings.statement_timeout, settings.lock_timeout
        # While a client reads many rows the server waits, as long as the request may take.
        timeouts_of_many = settings.request_timeout, settings.lock_timeout
        role = settings.row_security
        counted = settings.rate_limit if settings.rate_limit_store == "postgresql" else 0
        self.counts = counted > 0
        """Whether PostgreSQL counts requests for the rate limit."""
        self._one = _before_one(*timeouts, role=role, quota=counted)
        self._many = _before_many(*timeouts_of_many, role=role, quota=counted)
        self.of_session = None if role else _set_timeouts(*timeouts)
        """What a new connection runs once."""

    def before(self, statement: Statement) -> Statement | None:
        """Return the statement to send before this one, if any."""
        return self._many if statement.many else self._one


def _before_one(*timeouts: float, role: bool, quota: int) -> Statement | None:
    """Take the role and name the owner, with the transaction's timeouts in seconds."""
    if not role and not quota:
        return None
    return _before(b"before_one", quota, _take_owner(*timeouts) if role else "")


def _before_many(*timeouts: float, role: bool, quota: int) -> Statement:
    """Do the same before a statement that reads many rows, with a timeout for that.

    And have them read in the order of an index, by this backend alone, with a plan that is made
    once. At the default price of a random page the planner sorts a user's scattered rows, and
    starts workers for a very long list. Where one user has many more tasks than the others, it
    would plan every list anew.
    """
    planner = (
        "plan_once(), "
        "set_config('random_page_cost', '1.1', true), "
        "set_config('max_parallel_workers_per_gather', '0', true)"
    )
    owner = _take_owner(*timeouts) if role else _timeouts(*timeouts, local="true")
    return _before(b"before_many", quota, owner, planner)


def _before(name: bytes, quota: int, *parts: str) -> Statement:
    """Also take one of the owner's requests, where PostgreSQL counts them (migration 0001)."""
    if quota:
        name += b"_counted"
        parts = (*parts, f"take_request($1, {quota})")
    sql = f"SELECT {', '.join(part for part in parts if part)}"
    return Statement(name, sql.encode(), ("owner",) if "$1" in sql else (), writes=False)


def _set_timeouts(*timeouts: float) -> Statement:
    """Set the session's timeouts, for a connection that takes no role."""
    sql = f"SELECT {_timeouts(*timeouts, local='false')}"
    return Statement(b"set_timeouts", sql.encode(), (), writes=False)


def _take_owner(*timeouts: float) -> str:
    return f"set_config('role', '{ROLE}', true), name_owner($1), " + _timeouts(
        *timeouts, local="true"
    )


def _timeouts(statement_timeout: float, lock_timeout: float, *, local: str) -> str:
    return (
        f"set_config('statement_timeout', '{statement_timeout * 1000:.0f}', {local}), "
        f"set_config('lock_timeout', '{lock_timeout * 1000:.0f}', {local})"
    )


_SESSION = "'isolation', current_setting('transaction_isolation')"
"""What every statement relies on: a write that has waited reads its rows again (ADR 12)."""

_RELATIONS = ", ".join(f"'{table}'::regclass" for table in TABLES)
STATE = Statement(
    b"row_security_state",
    # Without a policy a table shows nothing; with another one it may show too much.
    f"""
    SELECT json_build_object(
        {_SESSION},
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
"""Says, under the role, whether row security is active on every table, and by which policies."""


STATE_OFF = Statement(
    b"row_security_state_off",
    f"""
    SELECT json_build_object(
        {_SESSION},
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
"""Says the same of the login itself, for `ROW_SECURITY=off`, and whether it may use the tables."""


def check(state: Mapping[str, object], *, role: bool) -> None:
    """Refuse, with `StartupError`, what `STATE` or `STATE_OFF` has found if it cannot work."""
    if state["isolation"] != "read committed":
        raise StartupError(
            "DATABASE_URL: transactions are not READ COMMITTED; run `ALTER ROLE` for its user with"
            " `SET default_transaction_isolation = 'read committed'`"
        )
    found = {name: value for name, value in state.items() if name != "isolation"}
    if not role:
        if found != {"active": False, "granted": True}:
            raise StartupError(
                "ROW_SECURITY: off needs a database user that owns the tables, or that may use "
                "them and has BYPASSRLS; give it that, or set ROW_SECURITY=on"
            )
        return
    intended = {
        "active": True,
        "policies": [f"{table}_owner" for table in TABLES],
        "all": len(TABLES),
    }
    if found != intended:
        raise StartupError(
            f"ROW_SECURITY: not active for the role {ROLE}, or its policies were changed; "
            "undo that (`todo-api migrate --sql` prints the intended state) or set ROW_SECURITY=off"
        )
