"""Make room for larger filters, and keep the words of a long description outside its row."""

from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Drop the filters of before, which have other bits. Their tasks are searched without one.

    A program from before this revision writes such filters, so it must not write any more. No such
    program was released.
    """
    # Uncompressed, because a search reads the words if the filter does not rule a task out. The
    # description too, so that it is the longest and leaves the row before the words.
    op.execute("ALTER TABLE tasks ALTER COLUMN description_key SET STORAGE EXTERNAL")
    op.execute("ALTER TABLE tasks ALTER COLUMN description SET STORAGE EXTERNAL")
    op.execute("ALTER TABLE tasks SET (toast_tuple_target = 4080)")
    # After the changes of the table, which lock it: otherwise a writer could meet a deadlock.
    op.execute("UPDATE tasks SET description_filter = NULL WHERE description_filter IS NOT NULL")


def downgrade() -> None:
    """Drop the filters, which the program from before cannot read."""
    op.execute("ALTER TABLE tasks ALTER COLUMN description SET STORAGE EXTENDED")
    op.execute("ALTER TABLE tasks ALTER COLUMN description_key SET STORAGE MAIN")
    op.execute("ALTER TABLE tasks SET (toast_tuple_target = 6000)")
    op.execute("UPDATE tasks SET description_filter = NULL WHERE description_filter IS NOT NULL")
