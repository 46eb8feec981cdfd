"""Users, their tasks, and the row security that keeps them apart."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

OWNER = "(SELECT nullif(current_setting('app.user_id', true), ''))"
"""The owner that the request named. Afterwards the setting is '' on this connection, not NULL.
As a scalar subquery it is computed once a statement, not once a row."""


def upgrade() -> None:
    """Make the tables, the role that requests take, its grants and its policies."""
    op.create_table(
        "users",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("email", sa.Text),
        _timestamp("created_at"),
        sa.CheckConstraint("char_length(id) BETWEEN 1 AND 255", name="users_id_length"),
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
        sa.Column("description", sa.Text),
        sa.Column("status", sa.Text, nullable=False, server_default=sa.text("'incomplete'")),
        sa.Column("priority", sa.Text),
        sa.Column("due_date", sa.DateTime(timezone=True)),
        _timestamp("created_at"),
        _timestamp("updated_at"),
        sa.CheckConstraint("char_length(title) BETWEEN 1 AND 255", name="tasks_title"),
        sa.CheckConstraint("char_length(description) <= 5000", name="tasks_description"),
        sa.CheckConstraint("status IN ('incomplete', 'complete')", name="tasks_status"),
        sa.CheckConstraint("priority IN ('low', 'medium', 'high')", name="tasks_priority"),
    )
    op.create_index("tasks_by_creation", "tasks", ["user_id", "created_at", "id"])
    op.create_index("tasks_by_status", "tasks", ["user_id", "status", "created_at", "id"])
    _make_role()
    # Column by column what the API does. Nobody can give a task to another user.
    op.execute("GRANT SELECT (id), INSERT (id, email) ON users TO todo_member")
    op.execute(
        "GRANT SELECT, DELETE,"
        " INSERT (user_id, title, description, status, priority, due_date),"
        " UPDATE (title, description, status, priority, due_date, updated_at)"
        " ON tasks TO todo_member"
    )
    for table, column in (("users", "id"), ("tasks", "user_id")):
        op.execute(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY")
        op.execute(
            f"CREATE POLICY {table}_owner ON {table} TO todo_member"
            f" USING ({column} = {OWNER}) WITH CHECK ({column} = {OWNER})"
        )


def downgrade() -> None:
    """Drop the tables. The role stays: it is the cluster's, another database may use it."""
    op.drop_table("tasks")
    op.drop_table("users")


def _timestamp(name: str) -> sa.Column[object]:
    return sa.Column(
        name, sa.DateTime(timezone=True), nullable=False, server_default=sa.text("now()")
    )


def _make_role() -> None:
    """Make the role where it is missing, and let this login take it.

    From PostgreSQL 16 on, who creates a role may not take it without WITH SET TRUE. Two databases
    of one cluster may be migrated at the same moment.
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
                EXECUTE format('GRANT USAGE ON SCHEMA %I TO todo_member', current_schema());
            END IF;
        END
        $$
    """)
