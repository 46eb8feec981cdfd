"""Rate limits that all processes share (`RATE_LIMIT_STORE=postgresql`)."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

OWNER_HASH = "(SELECT sha256(convert_to(nullif(current_setting('app.user_id', true), ''), 'UTF8')))"


def upgrade() -> None:
    """Make the table of buckets, and the function that takes one request out of one."""
    op.create_table(
        "rate_limits",
        sa.Column("user_hash", sa.LargeBinary, primary_key=True),
        sa.Column("full_at", sa.DateTime(timezone=True), nullable=False),
        prefixes=["UNLOGGED"],  # after a crash all buckets are full again
    )
    op.execute(
        "GRANT SELECT, INSERT (user_hash, full_at), UPDATE (full_at) ON rate_limits TO todo_member"
    )
    op.execute("ALTER TABLE rate_limits ENABLE ROW LEVEL SECURITY")
    op.execute(
        "CREATE POLICY rate_limits_owner ON rate_limits TO todo_member"
        f" USING (user_hash = {OWNER_HASH}) WITH CHECK (user_hash = {OWNER_HASH})"
    )
    # The same rule as in auth/rate_limits.py. The row's lock makes it exact: requests of one user
    # take their turn, those of others do not wait.
    op.execute("""
        CREATE FUNCTION take_request(owner text, quota integer)
        RETURNS void LANGUAGE plpgsql VOLATILE AS $$
        DECLARE
            step interval := interval '1 minute' / quota;
            moment timestamptz := clock_timestamp();
        BEGIN
            INSERT INTO rate_limits AS bucket (user_hash, full_at)
            VALUES (sha256(convert_to(owner, 'UTF8')), moment + step)
            ON CONFLICT (user_hash) DO UPDATE
            -- Fuller than empty it cannot be, unless the clock was ahead.
            SET full_at = CASE
                WHEN bucket.full_at > moment + interval '1 minute' THEN moment + step
                ELSE greatest(bucket.full_at, moment) + step
            END
            WHERE bucket.full_at > moment + interval '1 minute'
            OR greatest(bucket.full_at, moment) + step <= moment + interval '1 minute';
            IF NOT FOUND THEN
                RAISE EXCEPTION 'too many requests' USING ERRCODE = 'TD429';
            END IF;
        END
        $$
    """)
    op.execute("GRANT EXECUTE ON FUNCTION take_request TO todo_member")


def downgrade() -> None:
    """Forget the buckets."""
    op.execute("DROP FUNCTION take_request")
    op.drop_table("rate_limits")
