"""Erased users: who has left cannot be brought back by a token from before."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

OWNER_HASH = "(SELECT sha256(convert_to(nullif(current_setting('app.user_id', true), ''), 'UTF8')))"


def upgrade() -> None:
    """Make the table of erasures, and the function that every write calls first."""
    op.create_table(
        "erasures",
        # Not the id itself: what remains of a user must not name him.
        sa.Column("user_hash", sa.LargeBinary, primary_key=True),
        sa.Column(
            "erased_at",
            sa.DateTime(timezone=True),
            nullable=False,
            server_default=sa.text("clock_timestamp()"),
        ),
    )
    op.execute("GRANT SELECT, INSERT (user_hash), UPDATE (erased_at) ON erasures TO todo_member")
    op.execute("GRANT DELETE ON users TO todo_member")
    op.execute("ALTER TABLE erasures ENABLE ROW LEVEL SECURITY")
    op.execute(
        "CREATE POLICY erasures_owner ON erasures TO todo_member"
        f" USING (user_hash = {OWNER_HASH}) WITH CHECK (user_hash = {OWNER_HASH})"
    )
    # Each query of a volatile function has a snapshot of its own, so the second one sees an
    # erasure that was committed while the first one waited for the lock.
    op.execute("""
        CREATE FUNCTION begin_write(owner text, issued_at double precision, erasing boolean)
        RETURNS void LANGUAGE plpgsql VOLATILE AS $$
        DECLARE
            lock bigint := hashtextextended(owner, 0);
        BEGIN
            IF erasing THEN
                PERFORM pg_advisory_xact_lock(lock);
            ELSE
                PERFORM pg_advisory_xact_lock_shared(lock);
            END IF;
            -- Ten seconds: the issuer's clock and ours may differ by that (auth/tokens.py).
            PERFORM FROM erasures
                WHERE user_hash = sha256(convert_to(owner, 'UTF8'))
                AND coalesce(to_timestamp(issued_at) < erased_at + interval '10 seconds', true);
            IF FOUND THEN
                RAISE EXCEPTION 'the token is older than the erasure' USING ERRCODE = 'TD401';
            END IF;
        END
        $$
    """)
    op.execute("GRANT EXECUTE ON FUNCTION begin_write TO todo_member")


def downgrade() -> None:
    """Forget the erasures."""
    op.execute("DROP FUNCTION begin_write")
    op.execute("REVOKE DELETE ON users FROM todo_member")
    op.drop_table("erasures")
