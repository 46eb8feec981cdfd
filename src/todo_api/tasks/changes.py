"""The feed of changes: its parameters, its cursor and its answer (ADR 15)."""

import re
from collections.abc import Sequence
from hashlib import blake2b
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema
from starlette.requests import Request

from todo_api.errors import CursorExpired, InvalidParameter
from todo_api.tasks.query import Readers, any_text, number_to, read_parameters
from todo_api.tasks.schemas import COMPLETED_TASK, MAXIMUM_LIMIT, AnswerModel, WrittenTask

MAXIMUM_WAIT = 60
"""The most seconds that a request may wait for a change."""

_DIGEST_BYTES = 12
_CURSOR = re.compile("(0|[1-9][0-9]{0,17})-(0|[1-9][0-9]{0,17})-[0-9a-f]+", re.ASCII)


class ChangesQuery(BaseModel):
    """The parameters of the feed."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    since: Annotated[
        str | None, WithJsonSchema({"type": "string", "examples": ["dGhpcyBpcyBvcGFxdWU"]})
    ] = Field(
        default=None,
        description="The `cursor` of the last answer. Without it, the feed begins with all tasks.",
    )
    limit: int = Field(
        default=MAXIMUM_LIMIT,
        ge=1,
        le=MAXIMUM_LIMIT,
        description="The most changes of an answer.",
        examples=[100],
        json_schema_extra={"format": "int64"},
    )
    wait: Annotated[
        int | None,
        WithJsonSchema(
            {"type": "integer", "format": "int64", "minimum": 1, "maximum": MAXIMUM_WAIT}
            | {"examples": [1]}
        ),
    ] = Field(
        default=None,
        description="The seconds to wait for a change, if there is none yet.",
    )


_READERS: Readers = {
    "since": any_text,
    "limit": number_to(MAXIMUM_LIMIT),
    "wait": number_to(MAXIMUM_WAIT),
}


async def read_changes_query(request: Request) -> ChangesQuery:
    """Read the parameters of the feed. Raises `InvalidParameter`."""
    return ChangesQuery.model_construct(**read_parameters(request, _READERS))


class DeletedSince(AnswerModel):
    """A task that was deleted."""

    deleted: int = Field(
        description="The `id` of the task.", examples=[43], json_schema_extra={"format": "int64"}
    )
    version: int = Field(
        description="The version of the deletion.",
        examples=[9],
        json_schema_extra={"format": "int64"},
    )


_CHANGES: list[Any] = [{"task": COMPLETED_TASK}, {"deleted": 43, "version": 9}]


class Changes(AnswerModel):
    """What has changed since a cursor."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"changes": _CHANGES, "cursor": "dGhpcyBpcyBvcGFxdWU", "more": False}]
        }
    )

    changes: list[WrittenTask | DeletedSince] = Field(
        description="Tasks in their latest state, and deletions, in the order of their versions.",
        examples=[_CHANGES],
    )
    cursor: str = Field(
        description="What to send in `since` next.", examples=["dGhpcyBpcyBvcGFxdWU"]
    )
    more: bool = Field(description="Whether there are more changes already.", examples=[False])


class Cursor(NamedTuple):
    """How far a client's copy of the tasks is."""

    position: int = 0
    """The version up to which it has seen every change. 0 is an empty copy."""
    begun: int = 0
    """The user's version when the copy was begun, or when it was last complete."""

    @classmethod
    def read(cls, text: str | None, user_id: str) -> "Cursor":
        """Read a cursor of this user. Raises `InvalidParameter`.

        The digest is no secret, because a forged cursor could only show its user their own tasks.
        """
        if text is None:
            return cls()
        found = _CURSOR.fullmatch(text)
        cursor = cls(int(found[1]), int(found[2])) if found else cls()
        if cursor.show(user_id) != text:
            raise InvalidParameter("Invalid since value. Must be the cursor of an earlier answer")
        return cursor

    def show(self, user_id: str) -> str:
        """Return the cursor as text."""
        numbers = f"{self.position}-{self.begun}"
        bound = f"changes {numbers} {user_id}".encode()
        return f"{numbers}-{blake2b(bound, digest_size=_DIGEST_BYTES).hexdigest()}"

    def check(self, version: int, changes_from: int) -> None:
        """Raise `CursorExpired` if the copy may have what this user no longer has.

        `version` is the user's, and `changes_from` the least version at which a copy may have been
        begun. An empty copy is always valid.
        """
        if self.position and not changes_from <= self.begun <= version >= self.position:
            raise CursorExpired


class ChangesPage(NamedTuple):
    """A page of the feed. Each row is the JSON text of a task or of a deletion."""

    rows: Sequence[bytes]
    cursor: Cursor
    has_more: bool

    def shown(self, user_id: str) -> bytes:
        """Return the answer as JSON text."""
        changes = b",".join(
            row if row.startswith(b'{"deleted"') else b'{"task":%b}' % row for row in self.rows
        )
        cursor, more = self.cursor.show(user_id).encode(), b"true" if self.has_more else b"false"
        return b'{"changes":[%b],"cursor":"%b","more":%b}' % (changes, cursor, more)
