"""The one table of a task's fields: what a client may send, and what it gets.

The schemas of requests and responses, the order of errors, the defaults of a new task and the
columns of every statement follow from it. `tasks/model.py` has the columns themselves.
"""

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    StrictBool,
    StringConstraints,
    WithJsonSchema,
)
from pydantic_core import PydanticCustomError

TITLE_LENGTH = 255
DESCRIPTION_LENGTH = 5000
"""Lengths of texts are in code points."""

MAXIMUM_ID = 2**63 - 1

STATUSES = ("incomplete", "complete")
PRIORITIES = ("low", "medium", "high")

_DAY = re.compile(r"\d{4}-\d{2}-\d{2}", re.ASCII)
_TIMESTAMP = re.compile(
    r"\d{4}-\d{2}-\d{2}T(?:[01]\d|2[0-3]):[0-5]\d:[0-5]\d(?:\.\d{1,6})?"
    r"(?:Z|[+-](?:[01]\d|2[0-3]):[0-5]\d)",
    re.ASCII | re.IGNORECASE,
)


def invalid(code: str) -> PydanticCustomError:
    """Return the error of a validator, with one of the codes of `tasks/schemas.py`."""
    return PydanticCustomError(code, "")


def _trim(value: object) -> object:
    return value.strip() if isinstance(value, str) else value


def _without_nul(text: str) -> str:
    """Refuse NUL, which PostgreSQL cannot store."""
    if "\0" in text:
        raise invalid("invalid_text")
    return text


def _due_date(value: object) -> datetime | None:
    if value is None:
        return None
    if not isinstance(value, str):
        raise invalid("wrong_type")
    if _DAY.fullmatch(value):
        value += "T00:00:00Z"
    elif not _TIMESTAMP.fullmatch(value):
        raise invalid("invalid_value")
    try:
        return datetime.fromisoformat(value.upper()).astimezone(UTC)
    except (ValueError, OverflowError):  # no such day, or not in the years 1 to 9999 in UTC
        raise invalid("invalid_value") from None


def _documented(pattern: re.Pattern[str]) -> str:
    """Return a pattern for JSON Schema, which has no flags."""
    either_case = pattern.pattern.replace("T(", "[Tt](").replace("Z|", "[Zz]|")
    return f"^{either_case}$"


Title = Annotated[
    str,
    StringConstraints(strict=True, min_length=1, max_length=TITLE_LENGTH),
    Field(json_schema_extra={"pattern": r"\S"}),
    AfterValidator(_without_nul),
    # Python and pydantic differ in what white space is. The contract is Python's.
    BeforeValidator(_trim),
]
Description = (
    Annotated[
        str,
        StringConstraints(strict=True, max_length=DESCRIPTION_LENGTH),
        AfterValidator(_without_nul),
    ]
    | None
)
Status = Literal["incomplete", "complete"]
Priority = Literal["low", "medium", "high"] | None
DueDate = Annotated[
    datetime | None,
    BeforeValidator(_due_date),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "format": "date-time", "pattern": _documented(_TIMESTAMP)},
                {"type": "string", "format": "date", "pattern": _documented(_DAY)},
                {"type": "null"},
            ]
        }
    ),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskField:
    """One member of a task."""

    name: str
    description: str
    """What the API description says of it."""
    answer: Any
    """Its type in an answer."""
    body: Any = None
    """Its type in a request's body. The service sets a field without one."""
    default: object = None
    """The value in a new task whose request leaves it out."""
    is_column: bool = True
    label: str = ""
    """What messages call it, in place of its name."""
    must_be: str = ""
    """The message for a value of a wrong type or a value that is not allowed."""


FIELDS = (
    TaskField(
        name="id",
        description="Assigned by the service. Unique among all tasks.",
        answer=Annotated[int, Field(ge=1, le=MAXIMUM_ID)],
    ),
    TaskField(
        name="user_id",
        description="The owner: the token's `sub`.",
        answer=str,
    ),
    TaskField(
        name="title",
        description="The service trims surrounding white space.",
        answer=str,
        body=Title,
        label="Title",
    ),
    TaskField(
        name="description",
        description="Kept exactly as sent.",
        answer=str | None,
        body=Description,
        label="Description",
    ),
    TaskField(
        name="status",
        description="Whether the task is done.",
        answer=Status,
        body=Status,
        default="incomplete",
        must_be="Invalid status value. Must be incomplete or complete",
    ),
    TaskField(
        name="completed",
        description="Another spelling of `status`.",
        answer=bool,
        body=StrictBool,
        is_column=False,
        must_be="completed must be true or false",
    ),
    TaskField(
        name="priority",
        description="How important the task is.",
        answer=Priority,
        body=Priority,
        must_be="Invalid priority value. Must be low, medium, high or null",
    ),
    TaskField(
        name="due_date",
        description="A timestamp with its offset, or a date: midnight UTC.",
        answer=datetime | None,
        body=DueDate,
        must_be="Invalid due_date. Must be an RFC 3339 timestamp with an offset,"
        " or a date as YYYY-MM-DD",
    ),
    TaskField(
        name="completed_at",
        description="When `status` last became complete.",
        answer=datetime | None,
    ),
    TaskField(
        name="created_at",
        description="When the task was created.",
        answer=datetime,
    ),
    TaskField(
        name="updated_at",
        description="When the task last changed.",
        answer=datetime,
    ),
    TaskField(
        name="version",
        description="Changes with every write that changes something; the later of two is higher.",
        answer=Annotated[int, Field(ge=1)],
    ),
)
"""In the order of the contract: answers show them so, and the first wrong one gives the `error`."""

BY_NAME = {field.name: field for field in FIELDS}
BODY_FIELDS = tuple(field for field in FIELDS if field.body is not None)
WRITABLE = tuple(field.name for field in BODY_FIELDS if field.is_column)
"""The columns that a client can set."""

DEFAULTS = {name: BY_NAME[name].default for name in WRITABLE if name != "title"}
"""What a new task has where its request leaves a column out. It always has a title."""
