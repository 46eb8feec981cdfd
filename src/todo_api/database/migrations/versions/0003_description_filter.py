"""Add a Bloom filter to long descriptions, so that a search reads only what may match."""

from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column, which tasks from before leave null, and keep more of a task in its row.

    A program from before this revision changes a description and not its filter, so it must not
    write any more. No such program was released.
    """
    op.execute("ALTER TABLE tasks ADD COLUMN description_filter bytea")
    op.execute("ALTER TABLE tasks ALTER COLUMN description_filter SET STORAGE PLAIN")
    # The words of most long descriptions fit uncompressed, and the descriptions go elsewhere.
    op.execute("ALTER TABLE tasks SET (toast_tuple_target = 6000)")
    op.execute(
        "GRANT INSERT (description_filter), UPDATE (description_filter) ON tasks TO todo_member"
    )


def downgrade() -> None:
    """Drop it. Searches then read each description."""
    op.execute("ALTER TABLE tasks SET (toast_tuple_target = 4080)")
    op.execute("ALTER TABLE tasks DROP COLUMN description_filter")
