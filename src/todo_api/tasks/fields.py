"""The one table of a task's fields: what a client may send, and what it gets.

The schemas of requests and responses, the order of errors, the defaults of a new task and the
columns of every statement follow from it. `tasks/model.py` has the columns themselves.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PlainValidator,
    StrictBool,
    StringConstraints,
    WithJsonSchema,
)
from pydantic_core import PydanticCustomError

from todo_api.tasks.search import bloom_filter, fold, words

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


class DueDate(NamedTuple):
    """An instant, or a day, which is stored as its first instant in UTC."""

    at: datetime | None = None
    is_day: bool = False


def read_due_date(text: str) -> DueDate:
    """Read a day, or a timestamp with its offset (RFC 3339). Raises `ValueError`."""
    is_day = _DAY.fullmatch(text) is not None
    if not is_day and not _TIMESTAMP.fullmatch(text):
        raise ValueError("neither a day nor a timestamp")
    try:
        instant = datetime.fromisoformat(f"{text}T00:00:00Z" if is_day else text.upper())
        return DueDate(instant.astimezone(UTC), is_day)
    except OverflowError:
        raise ValueError("not in the years 1 to 9999 in UTC") from None


def _due_date(value: object) -> DueDate:
    if value is None:
        return DueDate()
    if not isinstance(value, str):
        raise invalid("wrong_type")
    try:
        return read_due_date(value)
    except ValueError:
        raise invalid("invalid_value") from None


def _undocumented_length(schema: dict[str, Any]) -> None:
    """Leave the maximum length to the description.

    JSON Schema and this service count code points, but older versions of zod count UTF-16 units.
    Their schemas with `maxLength` would refuse 200 emoji, which the service accepts.
    """
    del schema["maxLength"]


def text(maximum: int, *rules: Any, minimum: int = 0) -> Any:
    """Return the type of a text without NUL, with a length in code points."""
    length = StringConstraints(strict=True, min_length=minimum, max_length=maximum)
    schema = Field(json_schema_extra=_undocumented_length)
    return Annotated[str, length, schema, AfterValidator(_without_nul), *rules]


# Python and pydantic differ in what white space is. The contract is Python's.
Title = text(TITLE_LENGTH, BeforeValidator(_trim), minimum=1)
Description = text(DESCRIPTION_LENGTH) | None
Status = Literal["incomplete", "complete"]
Priority = Literal["low", "medium", "high"] | None
# Without a format: from a choice of `date` and `date-time`, generators make code that refuses
# offsets, which the service accepts.
_DUE_DATE_SCHEMA = WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "null"}]})
_DueDate = Annotated[Any, PlainValidator(_due_date), _DUE_DATE_SCHEMA]
_INT64: dict[str, Any] = {"format": "int64"}

DERIVED = {"title_key", "description_key", "description_filter"}
"""Columns that follow from another one, for searches and the order by title."""


def _description_columns(text: str | None) -> dict[str, object]:
    """Return the columns that store a description, and what a search reads in place of it."""
    key = text and " ".join(words(text))
    return {
        "description": text,
        "description_key": key,
        "description_filter": bloom_filter(key) if key else None,
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskField:
    """One member of a task."""

    name: str
    description: str
    """What the API description says of it."""
    answer: Any
    """Its type in an answer."""
    example: Any
    """A value in an answer, for the API description."""
    body: Any = None
    """Its type in a request's body. The service sets a field without one."""
    default: Any = None
    """The value in a new task whose request leaves it out, or `...` if there is none."""
    columns: Callable[[Any], Mapping[str, object]] | None = None
    """Returns the columns that store a value. Without it, that is the column of this name."""
    label: str = ""
    """What messages call it, in place of its name."""
    must_be: str = ""
    """The message for a value of a wrong type or a value that is not allowed."""

    def stored(self, value: Any) -> Mapping[str, object]:
        """Return the columns that a value of a body is stored in."""
        return self.columns(value) if self.columns else {self.name: value}


FIELDS = (
    TaskField(
        name="id",
        description="Assigned by the service. Unique among all tasks.",
        answer=Annotated[int, Field(ge=1, json_schema_extra=_INT64)],
        example=42,
    ),
    TaskField(
        name="user_id",
        description="The owner: the token's `sub`.",
        answer=str,
        example="exajExYu2kLr8vQpW3mTz6NcB1dHs5Ga",
    ),
    TaskField(
        name="title",
        description="1 to 255 characters (Unicode code points) without NUL, after the service has "
        "trimmed surrounding white space.",
        answer=str,
        example="Buy groceries",
        body=Title,
        default=...,
        columns=lambda title: {"title": title, "title_key": fold(title)},
        label="Title",
    ),
    TaskField(
        name="description",
        description="At most 5000 characters (Unicode code points) without NUL. Kept exactly "
        "as sent.",
        answer=str | None,
        example="Oat milk, bread",
        body=Description,
        columns=_description_columns,
        label="Description",
    ),
    TaskField(
        name="status",
        description="Whether the task is done.",
        answer=Status,
        example="incomplete",
        body=Status,
        default="incomplete",
        must_be="Invalid status value. Must be incomplete or complete",
    ),
    TaskField(
        name="completed",
        description="Another spelling of `status`. A body may have both only if they agree.",
        answer=bool,
        example=False,
        body=StrictBool,
        default=...,
        columns=lambda completed: {"status": "complete" if completed else "incomplete"},
        must_be="completed must be true or false",
    ),
    TaskField(
        name="priority",
        description="How important the task is.",
        answer=Priority,
        example="high",
        body=Priority,
        must_be="Invalid priority value. Must be low, medium, high or null",
    ),
    TaskField(
        name="due_date",
        description="A day, `2026-12-01`, which comes back as that day; or an RFC 3339 timestamp "
        "with its offset, `2026-12-01T18:00:00+02:00`, which comes back in UTC.",
        answer=Annotated[str | None, _DUE_DATE_SCHEMA],
        example="2026-12-01",
        body=_DueDate,
        default=DueDate(),
        columns=lambda due: {"due_date": due.at, "due_is_day": due.is_day},
        must_be="Invalid due_date. Must be an RFC 3339 timestamp with an offset,"
        " or a date as YYYY-MM-DD",
    ),
    TaskField(
        name="completed_at",
        description="When `status` last became `complete`. Null while it is not.",
        answer=datetime | None,
        example=None,
    ),
    TaskField(
        name="created_at",
        description="When the task was created.",
        answer=datetime,
        example="2026-11-21T12:34:56.123456Z",
    ),
    TaskField(
        name="updated_at",
        description="When the task last changed.",
        answer=datetime,
        example="2026-11-21T12:34:56.123456Z",
    ),
    TaskField(
        name="version",
        description="Changes with every write that changes something; the later of two is higher.",
        answer=Annotated[int, Field(ge=1, json_schema_extra=_INT64)],
        example=7,
    ),
)
"""In the order of the contract: answers show them so, and the first wrong one gives the `error`."""

BY_NAME = {field.name: field for field in FIELDS}
BODY_FIELDS = tuple(field for field in FIELDS if field.body is not None)
DEFAULTS = {
    column: value
    for field in BODY_FIELDS
    if field.default is not ...
    for column, value in field.stored(field.default).items()
}
"""What a new task has in a column that its request leaves out."""

WRITABLE = (*BY_NAME["title"].stored(""), *DEFAULTS)
"""The columns that a client's request can set."""
