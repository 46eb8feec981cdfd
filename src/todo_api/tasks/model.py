"""The tables. Alembic compares the database with these; every statement is built from them."""

from collections.abc import Sequence
from datetime import datetime

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    DateTime,
    ForeignKey,
    Identity,
    Index,
    LargeBinary,
    Text,
)
from sqlalchemy import text as sql
from sqlmodel import Field, SQLModel

from todo_api.tasks.fields import DESCRIPTION_LENGTH, PRIORITIES, STATUSES, TITLE_LENGTH


def _one_of(column: str, values: Sequence[str]) -> str:
    """Return a condition for a CHECK."""
    return f"{column} IN ({', '.join(repr(value) for value in values)})"


EMAIL_LENGTH = 320
"""RFC 3696, erratum 1690: 64 for the local part, 255 for the domain, and the @."""

TOMBSTONE_DAYS = 30
"""How long a deletion is remembered."""


class User(SQLModel, table=True):
    """The owner of tasks, made by their first write. The id is `sub`, exactly as in the token."""

    __tablename__ = "users"

    id: str = Field(primary_key=True, sa_type=Text)
    email: str | None = Field(default=None, sa_type=Text)
    version: int = Field(sa_type=BigInteger)
    """The version of the user's last write (ADR 12). Its row lock puts their writes in order."""
    tokens_from: datetime | None = Field(default=None, sa_type=DateTime(timezone=True))
    """Tokens issued earlier cannot write: the account was erased, and has begun anew (ADR 6)."""
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
    """A restored backup: a user who begins after it gets no version below this one.

    It is about no user, so it needs no row security: requests can only read it.
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
    """A deleted task, remembered for `TOMBSTONE_DAYS`."""

    __tablename__ = "tombstones"

    user_id: str = Field(primary_key=True, sa_type=Text)
    version: int = Field(primary_key=True, sa_type=BigInteger)
    task_id: int = Field(primary_key=True, sa_type=BigInteger)
    deleted_at: datetime = Field(
        sa_type=DateTime(timezone=True),
        sa_column_kwargs={"server_default": sql("now()")},
    )


class Bucket(SQLModel, table=True):
    """A user's rate limit, kept as the time at which all of it will be left again."""

    __tablename__ = "rate_limits"
    __table_args__ = ({"prefixes": ["UNLOGGED"]},)

    user_hash: bytes = Field(primary_key=True, sa_type=LargeBinary)
    full_at: datetime = Field(sa_type=DateTime(timezone=True))


class Task(SQLModel, table=True):
    """One thing to do.

    The primary key starts with the owner: one user's tasks lie together, every access path
    starts with the owner, and the table can be distributed by `user_id` as it is (ADR 3).
    """

    __tablename__ = "tasks"
    __table_args__ = (
        CheckConstraint(f"char_length(title) BETWEEN 1 AND {TITLE_LENGTH}", name="tasks_title"),
        CheckConstraint(
            f"char_length(description) <= {DESCRIPTION_LENGTH}", name="tasks_description"
        ),
        CheckConstraint(_one_of("status", STATUSES), name="tasks_status"),
        CheckConstraint(_one_of("priority", PRIORITIES), name="tasks_priority"),
        # The default order. No column that changes is in an index, so every update is HOT.
        Index("tasks_by_creation", "user_id", "created_at", "id"),
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
    description: str | None = Field(default=None, sa_type=Text)
    status: str = Field(sa_type=Text, sa_column_kwargs={"server_default": sql("'incomplete'")})
    priority: str | None = Field(default=None, sa_type=Text)
    due_date: datetime | None = Field(default=None, sa_type=DateTime(timezone=True))
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
