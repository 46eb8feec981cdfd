"""Users, their tasks, and row security."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

OWNER = "nullif(current_setting('app.user_id', true), '')"
"""The owner that the request named. After the transaction the setting is '', not NULL. It needs no
sub-select, which Citus refuses in a policy."""

OWNER_HASH = f"sha256(convert_to({OWNER}, 'UTF8'))"

POLICIES = {
    "users": f"id = {OWNER}",
    "tasks": f"user_id = {OWNER}",
    "tombstones": f"user_id = {OWNER}",
    "answers": f"user_id = {OWNER}",
    "erasures": f"user_hash = {OWNER_HASH}",
    "rate_limits": f"user_hash = {OWNER_HASH}",
}
"""The condition for the rows that a request may see and write, by table."""


def upgrade() -> None:
    """Make the tables, the role that requests take, its grants, its policies and its functions."""
    _make_tables()
    _make_role()
    _grant()
    for table, condition in POLICIES.items():
        op.execute(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY")
        op.execute(
            f"CREATE POLICY {table}_owner ON {table} TO todo_member"
            f" USING ({condition}) WITH CHECK ({condition})"
        )
    _make_functions()


def downgrade() -> None:
    """Drop everything except the role, because another database of the cluster may use it."""
    for function in ("versions_of", "take_request", "begin_owner", "plan_once", "name_owner"):
        op.execute(f"DROP FUNCTION {function}")
    for table in ("rate_limits", "restorations", "erasures", "answers", "tombstones"):
        op.drop_table(table)
    op.drop_table("tasks")
    op.drop_table("users")


def _make_tables() -> None:
    op.create_table(
        "users",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("email", sa.Text),
        sa.Column("version", sa.BigInteger, nullable=False),
        sa.Column("changes_from", sa.BigInteger, nullable=False, server_default=sa.text("0")),
        sa.Column("tokens_from", sa.DateTime(timezone=True)),
        _timestamp("created_at"),
    )
    op.create_table(
        "tasks",
        sa.Column(
            "user_id",
            sa.Text,
            sa.ForeignKey("users.id", name="tasks_user", ondelete="CASCADE"),
            primary_key=True,
        ),
        sa.Column("id", sa.BigInteger, sa.Identity(always=True), primary_key=True),
        sa.Column("title", sa.Text, nullable=False),
        sa.Column("title_key", sa.Text, nullable=False, server_default=sa.text("''")),
        sa.Column("description", sa.Text),
        sa.Column("description_key", sa.Text),
        sa.Column("status", sa.Text, nullable=False, server_default=sa.text("'incomplete'")),
        sa.Column("priority", sa.Text),
        sa.Column("due_date", sa.DateTime(timezone=True)),
        sa.Column("due_is_day", sa.Boolean, server_default=sa.false(), nullable=False),
        sa.Column("completed_at", sa.DateTime(timezone=True)),
        _timestamp("created_at"),
        _timestamp("updated_at"),
        sa.Column("version", sa.BigInteger, nullable=False),
        sa.CheckConstraint("char_length(title) BETWEEN 1 AND 255", name="tasks_title"),
        sa.CheckConstraint("char_length(description) <= 5000", name="tasks_description"),
        sa.CheckConstraint("status IN ('incomplete', 'complete')", name="tasks_status"),
        sa.CheckConstraint("priority IN ('low', 'medium', 'high')", name="tasks_priority"),
        sa.CheckConstraint(
            "NOT due_is_day OR (due_date AT TIME ZONE 'UTC')::time = '00:00'", name="tasks_due_day"
        ),
    )
    # A search reads these words of each task, so they lie in its row, and long descriptions do not.
    op.execute("ALTER TABLE tasks ALTER COLUMN description_key SET STORAGE MAIN")
    op.execute("ALTER TABLE tasks SET (toast_tuple_target = 4080)")
    op.create_index("tasks_by_creation", "tasks", ["user_id", "created_at", "id"])
    op.create_table(
        "tombstones",
        sa.Column("user_id", sa.Text, primary_key=True),
        sa.Column("version", sa.BigInteger, primary_key=True),
        sa.Column("task_id", sa.BigInteger, primary_key=True),
        _timestamp("deleted_at"),
    )
    op.create_table(
        "answers",
        sa.Column("user_id", sa.Text, primary_key=True),
        sa.Column("key", sa.Text, primary_key=True),
        sa.Column("operation", sa.Integer, primary_key=True, server_default=sa.text("0")),
        sa.Column("request_hash", sa.LargeBinary, nullable=False),
        sa.Column("body", sa.Text, nullable=False),
        _timestamp("created_at"),
    )
    op.create_index("answers_by_age", "answers", ["user_id", "created_at"])
    op.create_table(
        "erasures",
        # A hash instead of the id, because nothing may name an erased user.
        sa.Column("user_hash", sa.LargeBinary, primary_key=True),
        sa.Column("version", sa.BigInteger, nullable=False),
        _timestamp("tokens_from", "statement_timestamp()"),
    )
    op.create_table(
        "restorations",
        sa.Column("version", sa.BigInteger, primary_key=True, autoincrement=False),
        _timestamp("restored_at"),
    )
    op.create_table(
        "rate_limits",
        sa.Column("user_hash", sa.LargeBinary, primary_key=True),
        sa.Column("full_at", sa.DateTime(timezone=True), nullable=False),
        prefixes=["UNLOGGED"],  # after a crash every user has the whole limit again
    )


def _timestamp(name: str, default: str = "now()") -> sa.Column[object]:
    return sa.Column(
        name, sa.DateTime(timezone=True), nullable=False, server_default=sa.text(default)
    )


def _make_role() -> None:
    """Make the role if it is missing, and let this login take it.

    From PostgreSQL 16 on, the creator of a role cannot take it without WITH SET TRUE. A migration
    of another database in the cluster may make the role at the same moment.
    """
    op.execute("""
        DO $$
        DECLARE
            version int := current_setting('server_version_num')::int;
        BEGIN
            IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'todo_member') THEN
                BEGIN
                    CREATE ROLE todo_member NOLOGIN;
                EXCEPTION WHEN duplicate_object OR unique_violation THEN
                    NULL;
                END;
            END IF;
            IF version >= 160000 AND NOT pg_has_role('todo_member', 'SET') THEN
                EXECUTE 'GRANT todo_member TO CURRENT_USER WITH SET TRUE';
            ELSIF version < 160000 AND NOT pg_has_role('todo_member', 'MEMBER') THEN
                GRANT todo_member TO CURRENT_USER;
            END IF;
            IF NOT has_schema_privilege('todo_member', current_schema(), 'USAGE') THEN
                -- Without format(), because Alembic doubles its percent signs in a script.
                EXECUTE 'GRANT USAGE ON SCHEMA ' || quote_ident(current_schema())
                    || ' TO todo_member';
            END IF;
        END
        $$
    """)


def _grant() -> None:
    """Grant each column that the API reads or writes. No user can give a task to another user."""
    granted = {
        "users": "SELECT (id, version, changes_from, tokens_from),"
        " INSERT (id, email, version, changes_from),"
        " UPDATE (version, changes_from, tokens_from), DELETE",
        "tasks": "SELECT, DELETE,"
        " INSERT (user_id, title, title_key, description, description_key, status, priority,"
        " due_date, due_is_day, completed_at, version),"
        " UPDATE (title, title_key, description, description_key, status, priority, due_date,"
        " due_is_day, completed_at, updated_at, version)",
        "tombstones": "SELECT, INSERT (user_id, version, task_id), DELETE",
        "answers": "SELECT, INSERT (user_id, key, operation, request_hash, body), DELETE",
        "erasures": "SELECT, INSERT (user_hash, version, tokens_from),"
        " UPDATE (version, tokens_from)",
        "restorations": "SELECT",
        "rate_limits": "SELECT, INSERT (user_hash, full_at), UPDATE (full_at)",
        # So that a login which only serves can read the version.
        "alembic_version": "SELECT",
    }
    for table, privileges in granted.items():
        op.execute(f"GRANT {privileges} ON {table} TO todo_member")


def _make_functions() -> None:
    # A function instead of a plain set_config, because Citus needs another body (`citus.py`).
    # PostgreSQL inlines it, so the call costs nothing.
    op.execute("""
        CREATE FUNCTION name_owner(owner text) RETURNS text LANGUAGE sql VOLATILE
        AS $$ SELECT set_config('app.user_id', owner, true) $$
    """)
    # A function for the same reason. Citus has to plan with the values, which select the shard.
    op.execute("""
        CREATE FUNCTION plan_once() RETURNS text LANGUAGE sql VOLATILE
        AS $$ SELECT set_config('plan_cache_mode', 'force_generic_plan', true) $$
    """)
    # Each query of a volatile function has its own snapshot. So the query for an erasure sees one
    # that was committed while the INSERT waited for its row.
    op.execute("""
        CREATE FUNCTION begin_owner(
            owner text, address text, issued_at double precision, moment bigint
        )
        RETURNS void LANGUAGE plpgsql VOLATILE AS $$
        DECLARE
            hash bytea := sha256(convert_to(owner, 'UTF8'));
            erasure erasures;
            restored bigint;
        BEGIN
            INSERT INTO users AS u (id, email, version, changes_from)
                VALUES (owner, address, moment, moment)
                ON CONFLICT (id) DO UPDATE SET version = u.version;
            -- A join, so Citus reads the mark on the node that has the user's row.
            SELECT e.* INTO erasure FROM users AS u, erasures AS e
                WHERE u.id = owner AND e.user_hash = hash;
            SELECT max(version) INTO restored FROM restorations;
            UPDATE users AS u SET
                version = greatest(u.version, erasure.version + 1, restored),
                changes_from = greatest(u.changes_from, erasure.version + 1, restored),
                tokens_from = erasure.tokens_from
                WHERE id = owner;
            IF coalesce(to_timestamp(issued_at) < erasure.tokens_from,
                erasure.tokens_from IS NOT NULL)
            THEN
                RAISE EXCEPTION 'the token is older than the erasure' USING ERRCODE = 'TD401';
            END IF;
        END
        $$
    """)
    # The same rule as in auth/rate_limits.py. It is exact because requests of one user wait for
    # the lock on their row. Requests of other users do not wait.
    op.execute("""
        CREATE FUNCTION take_request(owner text, quota integer)
        RETURNS void LANGUAGE plpgsql VOLATILE AS $$
        DECLARE
            hash bytea := sha256(convert_to(owner, 'UTF8'));
            step interval := interval '1 minute' / quota;
            moment timestamptz := clock_timestamp();
            latest timestamptz := moment + interval '1 minute';
            last_with_room timestamptz := latest - step;
        BEGIN
            -- The sum is in UTC, because Citus allows only immutable functions in the update.
            INSERT INTO rate_limits AS bucket (user_hash, full_at)
            VALUES (hash, moment + step)
            ON CONFLICT (user_hash) DO UPDATE
            -- full_at is more than a minute ahead only if the clock was set back.
            SET full_at = CASE
                WHEN bucket.full_at > latest THEN excluded.full_at
                ELSE timezone('UTC', timezone('UTC', greatest(bucket.full_at, moment)) + step)
            END
            WHERE bucket.full_at > latest
            OR greatest(bucket.full_at, moment) <= last_with_room;
            IF NOT FOUND THEN
                RAISE EXCEPTION 'too many requests' USING ERRCODE = 'TD429';
            END IF;
        END
        $$
    """)
    # It runs with the rights of the tables' owner, because row security shows a request only one
    # user. It gives away versions and nothing else.
    op.execute("""
        CREATE FUNCTION versions_of(owners text[]) RETURNS TABLE (id text, version bigint)
        LANGUAGE sql STABLE SECURITY DEFINER SET search_path FROM CURRENT
        AS $$ SELECT u.id, u.version FROM users AS u WHERE u.id = ANY(owners) $$
    """)
    op.execute("REVOKE EXECUTE ON FUNCTION versions_of FROM PUBLIC")
    functions = "name_owner, plan_once, begin_owner, take_request, versions_of"
    op.execute(f"GRANT EXECUTE ON FUNCTION {functions} TO todo_member")
