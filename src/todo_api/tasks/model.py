"""The tables. Alembic compares the database with them, and every statement is built from them."""

from collections.abc import Sequence
from datetime import datetime

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    DateTime,
    ForeignKey,
    Identity,
    Index,
    Integer,
    LargeBinary,
    Text,
)
from sqlalchemy import text as sql
from sqlmodel import Field, SQLModel

from todo_api.tasks.fields import DESCRIPTION_LENGTH, PRIORITIES, STATUSES, TITLE_LENGTH


def _one_of(column: str, values: Sequence[str]) -> str:
    """Return the condition of a CHECK that allows only these values."""
    return f"{column} IN ({', '.join(repr(value) for value in values)})"


EMAIL_LENGTH = 320
"""RFC 3696, erratum 1690: 64 for the local part, 255 for the domain, and the @."""

ANSWER_HOURS = 24
"""How long the answer to a write with an idempotency key is stored."""

TOMBSTONE_DAYS = 30
"""How long a tombstone is kept."""


class User(SQLModel, table=True):
    """The owner of tasks. Their first write creates the row. The id is the token's `sub`."""

    __tablename__ = "users"

    id: str = Field(primary_key=True, sa_type=Text)
    email: str | None = Field(default=None, sa_type=Text)
    version: int = Field(sa_type=BigInteger)
    """The version of the user's last write (ADR 12). The row lock puts their writes in order."""
    changes_from: int = Field(
        default=0, sa_type=BigInteger, sa_column_kwargs={"server_default": sql("0")}
    )
    """A client's copy that was begun at an earlier version is refused. It may still have tasks that
    went with an erasure, a restored backup or an expired tombstone (ADR 15)."""
    tokens_from: datetime | None = Field(default=None, sa_type=DateTime(timezone=True))
    """Tokens issued earlier cannot write, because the account was erased before (ADR 6)."""
    created_at: datetime = Field(
        sa_type=DateTime(timezone=True),
        sa_column_kwargs={"server_default": sql("now()")},
    )


class Erasure(SQLModel, table=True):
    """The mark of an erased user, under the SHA-256 of their id.

    It has the time of issue from which a token can write again, and the user's last version.
    """

    __tablename__ = "erasures"

    user_hash: bytes = Field(primary_key=True, sa_type=LargeBinary)
    version: int = Field(sa_type=BigInteger)
    tokens_from: datetime = Field(
        sa_type=DateTime(timezone=True),
        sa_column_kwargs={"server_default": sql("statement_timestamp()")},
    )


class Restoration(SQLModel, table=True):
    """A restored backup. New users start above this version.

    It needs no row security, because it holds no user's data and requests can only read it.
    """

    __tablename__ = "restorations"

    version: int = Field(
        primary_key=True, sa_type=BigInteger, sa_column_kwargs={"autoincrement": False}
    )
    restored_at: datetime = Field(
        sa_type=DateTime(timezone=True),
        sa_column_kwargs={"server_default": sql("now()")},
    )


class Tombstone(SQLModel, table=True):
    """The record of a deleted task, kept for `TOMBSTONE_DAYS`."""

    __tablename__ = "tombstones"

    user_id: str = Field(primary_key=True, sa_type=Text)
    version: int = Field(primary_key=True, sa_type=BigInteger)
    task_id: int = Field(primary_key=True, sa_type=BigInteger)
    deleted_at: datetime = Field(
        sa_type=DateTime(timezone=True),
        sa_column_kwargs={"server_default": sql("now()")},
    )


class Answer(SQLModel, table=True):
    """The answer to a write with an idempotency key, repeated for `ANSWER_HOURS`.

    A batch has one for each of its operations, counted from 1, and number 0 for its request.
    """

    __tablename__ = "answers"
    __table_args__ = (Index("answers_by_age", "user_id", "created_at"),)

    user_id: str = Field(primary_key=True, sa_type=Text)
    key: str = Field(primary_key=True, sa_type=Text)
    operation: int = Field(
        primary_key=True, sa_type=Integer, sa_column_kwargs={"server_default": sql("0")}
    )
    request_hash: bytes = Field(sa_type=LargeBinary)
    """The SHA-256 of method, path and body."""
    body: str = Field(sa_type=Text)
    created_at: datetime = Field(
        sa_type=DateTime(timezone=True),
        sa_column_kwargs={"server_default": sql("now()")},
    )


class Bucket(SQLModel, table=True):
    """A user's rate limit, stored as the time at which the full quota is available again."""

    __tablename__ = "rate_limits"
    __table_args__ = ({"prefixes": ["UNLOGGED"]},)

    user_hash: bytes = Field(primary_key=True, sa_type=LargeBinary)
    full_at: datetime = Field(sa_type=DateTime(timezone=True))


class Task(SQLModel, table=True):
    """One thing to do.

    The primary key starts with the owner, because then one user's tasks lie together and every
    access path starts with the owner. Citus can distribute this table by `user_id` (ADR 3).
    """

    __tablename__ = "tasks"
    __table_args__ = (
        CheckConstraint(f"char_length(title) BETWEEN 1 AND {TITLE_LENGTH}", name="tasks_title"),
        CheckConstraint(
            f"char_length(description) <= {DESCRIPTION_LENGTH}", name="tasks_description"
        ),
        CheckConstraint(_one_of("status", STATUSES), name="tasks_status"),
        CheckConstraint(_one_of("priority", PRIORITIES), name="tasks_priority"),
        CheckConstraint(
            "NOT due_is_day OR (due_date AT TIME ZONE 'UTC')::time = '00:00'", name="tasks_due_day"
        ),
        # The default order. No column that changes is in an index, so every update is HOT.
        Index("tasks_by_creation", "user_id", "created_at", "id"),
        # Only imported tasks are in it, so other writes do not pay for it.
        Index(
            "tasks_by_source",
            "user_id",
            "source",
            unique=True,
            postgresql_where=sql("source IS NOT NULL"),
        ),
    )

    user_id: str = Field(
        primary_key=True,
        sa_type=Text,
        sa_column_args=(ForeignKey("users.id", name="tasks_user", ondelete="CASCADE"),),
    )
    id: int = Field(
        primary_key=True,
        sa_type=BigInteger,
        sa_column_args=(Identity(always=True),),
    )
    title: str = Field(sa_type=Text)
    title_key: str = Field(sa_type=Text, sa_column_kwargs={"server_default": sql("''")})
    """The title folded, for searches and the order by title. The program writes it, so that
    searches and orders are the same for every collation of the server."""
    description: str | None = Field(default=None, sa_type=Text)
    description_key: str | None = Field(default=None, sa_type=Text)
    """The words of the description folded, for searches."""
    description_filter: bytes | None = Field(default=None, sa_type=LargeBinary)
    """A Bloom filter of these words if they are long (`tasks/search.py`)."""
    status: str = Field(sa_type=Text, sa_column_kwargs={"server_default": sql("'incomplete'")})
    priority: str | None = Field(default=None, sa_type=Text)
    due_date: datetime | None = Field(default=None, sa_type=DateTime(timezone=True))
    due_is_day: bool = Field(
        default=False, sa_type=Boolean, sa_column_kwargs={"server_default": sql("false")}
    )
    """Whether `due_date` stands for the whole day that begins then in UTC."""
    completed_at: datetime | None = Field(default=None, sa_type=DateTime(timezone=True))
    created_at: datetime = Field(
        sa_type=DateTime(timezone=True),
        sa_column_kwargs={"server_default": sql("now()")},
    )
    updated_at: datetime = Field(
        sa_type=DateTime(timezone=True),
        sa_column_kwargs={"server_default": sql("now()")},
    )
    version: int = Field(sa_type=BigInteger)
    """The user's version of the last write that changed this task."""
    source: bytes | None = Field(default=None, sa_type=LargeBinary)
    """The SHA-256 of what an imported task was made from, so that a second import makes none
    (`tasks/transfer.py`). It never changes."""
