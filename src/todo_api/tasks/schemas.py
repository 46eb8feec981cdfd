"""What a client may send and what it gets.

pydantic reads the bodies and FastAPI documents them from the same classes; the messages are the
contract's, word for word.
"""

import re
import sys
from datetime import UTC, datetime
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    RootModel,
    SkipValidation,
    ValidationError,
    WithJsonSchema,
)

from todo_api.errors import InvalidFields
from todo_api.tasks.model import (
    DESCRIPTION_LENGTH,
    PRIORITIES,
    STATUSES,
    TITLE_LENGTH,
    WRITABLE,
)

MAXIMUM_ID = 2**63 - 1
FIELD_ORDER = (
    "id",
    "user_id",
    "title",
    "description",
    "status",
    "completed",
    "priority",
    "due_date",
    "completed_at",
    "created_at",
    "updated_at",
    "version",
)
"""The order of the contract: the first field that is wrong gives the `error`."""

CHANGEABLE = {*WRITABLE, "completed"}
"""The members of a body that change something."""

INVALID_STATUS = "Invalid status value. Must be incomplete or complete"
INVALID_PRIORITY = "Invalid priority value. Must be low, medium, high or null"
INVALID_DUE_DATE = (
    "Invalid due_date. Must be an RFC 3339 timestamp with an offset, or a date as YYYY-MM-DD"
)
NO_NUL = "must not contain the NUL character"

_TIMESTAMP = re.compile(
    r"\d{4}-\d{2}-\d{2}T(?:[01]\d|2[0-3]):[0-5]\d:[0-5]\d(?:\.\d{1,6})?"
    r"(?:Z|[+-](?:[01]\d|2[0-3]):[0-5]\d)",
    re.ASCII | re.IGNORECASE,
)
_DATE = re.compile(r"\d{4}-\d{2}-\d{2}", re.ASCII)


def _documented(pattern: re.Pattern[str]) -> str:
    """Return a pattern for JSON Schema, which has no flags."""
    either_case = pattern.pattern.replace("T(", "[Tt](").replace("Z|", "[Zz]|")
    return f"^{either_case}$"


def _title(value: object, when_empty: str) -> str:
    if value is None:
        raise ValueError(when_empty)
    if not isinstance(value, str):
        raise ValueError("Title must be a string")  # noqa: TRY004  pydantic collects ValueErrors
    title = value.strip()
    if not title:
        raise ValueError(when_empty)
    if len(title) > TITLE_LENGTH:
        raise ValueError(f"Title must be {TITLE_LENGTH} characters or less")
    if "\0" in title:
        raise ValueError(f"Title {NO_NUL}")
    return title


def _new_title(value: object) -> str:
    return _title(value, "Title is required")


def _changed_title(value: object) -> str:
    return _title(value, "Title cannot be empty")


def _description(value: object) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str):
        raise ValueError("Description must be a string or null")  # noqa: TRY004
    if len(value) > DESCRIPTION_LENGTH:
        raise ValueError(f"Description must be {DESCRIPTION_LENGTH} characters or less")
    if "\0" in value:
        raise ValueError(f"Description {NO_NUL}")
    return value


def _status(value: object) -> str:
    if not isinstance(value, str) or value not in STATUSES:
        raise ValueError(INVALID_STATUS)
    return value


def _completed(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError("completed must be true or false")  # noqa: TRY004
    return value


def _priority(value: object) -> str | None:
    if value is not None and (not isinstance(value, str) or value not in PRIORITIES):
        raise ValueError(INVALID_PRIORITY)
    return value


def _due_date(value: object) -> datetime | None:
    if value is None:
        return None
    if not isinstance(value, str):
        raise ValueError(INVALID_DUE_DATE)  # noqa: TRY004
    if _DATE.fullmatch(value):
        value += "T00:00:00Z"
    elif not _TIMESTAMP.fullmatch(value):
        raise ValueError(INVALID_DUE_DATE)
    try:
        return datetime.fromisoformat(value.upper()).astimezone(UTC)
    except (ValueError, OverflowError):  # no such day, or not in the years 1 to 9999 in UTC
        raise ValueError(INVALID_DUE_DATE) from None


def _ignored(value: object) -> object:
    """Even what is ignored must mean the same to every parser (RFC 8259, sections 6 and 8)."""
    if isinstance(value, str) and "\0" in value:
        raise ValueError(f"Text {NO_NUL}")
    if isinstance(value, int | float) and not abs(value) <= sys.float_info.max:
        raise ValueError("Number out of range")
    if isinstance(value, dict | list):
        for member in value:
            _ignored(member)
    if isinstance(value, dict):
        _ignored(list(value.values()))
    return value


_SPACE = r"\t-\r\x1C-\x20\x85\xA0\u1680\u2000-\u200A\u2028\u2029\u202F\u205F\u3000"
"""What `str.strip` removes, as a class of a regular expression in the dialect of JSON Schema."""

_TITLE_SCHEMA = WithJsonSchema(
    {
        "type": "string",
        "pattern": rf"^[{_SPACE}]*[^\x00{_SPACE}]"
        rf"([^\x00]{{0,{TITLE_LENGTH - 2}}}[^\x00{_SPACE}])?[{_SPACE}]*$",
        "description": f"Surrounding white space is trimmed; 1 to {TITLE_LENGTH} characters after.",
        "examples": ["Buy groceries"],
    }
)
NewTitle = Annotated[str, BeforeValidator(_new_title), _TITLE_SCHEMA]
ChangedTitle = Annotated[str, BeforeValidator(_changed_title), _TITLE_SCHEMA]
Description = Annotated[
    str | None,
    BeforeValidator(_description),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "maxLength": DESCRIPTION_LENGTH, "pattern": r"^[^\u0000]*$"},
                {"type": "null"},
            ]
        }
    ),
]
StatusValue = Annotated[Literal["incomplete", "complete"], BeforeValidator(_status)]
Completed = Annotated[
    bool, BeforeValidator(_completed), Field(description="Another spelling of `status`.")
]
Priority = Annotated[Literal["low", "medium", "high"] | None, BeforeValidator(_priority)]
DueDate = Annotated[
    datetime | None,
    BeforeValidator(_due_date),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "format": "date-time", "pattern": _documented(_TIMESTAMP)},
                {"type": "string", "format": "date", "pattern": _documented(_DATE)},
                {"type": "null"},
            ],
            "description": "A timestamp with its offset, or a date: midnight UTC.",
        }
    ),
]
_TEXT = {"type": "string", "pattern": r"^[^\x00]*$"}
_NUMBER = {"type": "number", "minimum": -sys.float_info.max, "maximum": sys.float_info.max}


def _without_nul(schema: dict[str, Any]) -> None:
    """Document the names of members, too."""
    for each in schema["anyOf"]:
        if each.get("type") == "object":
            each["propertyNames"] = _TEXT


class Json(
    RootModel[
        Annotated[float, WithJsonSchema(_NUMBER)]
        | Annotated[str, WithJsonSchema(_TEXT)]
        | bool
        | list["Json"]
        | dict[str, "Json"]
        | None
    ]
):
    """Any value that means the same to every parser."""

    model_config = ConfigDict(json_schema_extra=_without_nul)


Ignored = Annotated[
    Json,
    SkipValidation,
    BeforeValidator(_ignored),
    Field(default=None, description="Set by the server; ignored here."),
]


def _without_defaults(schema: dict[str, Any]) -> None:
    """Document no default for what is simply left out."""
    for member in schema["properties"].values():
        member.pop("default", None)


_IN_AGREEMENT = {
    "anyOf": [
        {"properties": {"status": {"const": status}, "completed": {"const": completed}}}
        for status, completed in (("incomplete", False), ("complete", True))
    ]
}
_SOMETHING_TO_CHANGE = {"anyOf": [{"required": [name]} for name in (*WRITABLE, "completed")]}


def _document_task(schema: dict[str, Any]) -> None:
    """Say what no single member can: which of them go together."""
    _without_defaults(schema)
    schema["allOf"] = [_IN_AGREEMENT]
    schema["examples"] = [{"title": "Pay rent", "priority": "high", "due_date": "2026-12-01"}]


def _document_change(schema: dict[str, Any]) -> None:
    _document_task(schema)
    schema["allOf"].append(_SOMETHING_TO_CHANGE)


class TaskInput(BaseModel):
    """What a body may say of a task."""

    model_config = ConfigDict(extra="forbid", json_schema_extra=_document_task)

    id: Ignored
    user_id: Ignored
    completed_at: Ignored
    created_at: Ignored
    updated_at: Ignored
    version: Ignored
    title: str
    description: Description = None
    status: StatusValue = "incomplete"
    completed: Completed = False
    priority: Priority = None
    due_date: DueDate = None

    def values(self) -> dict[str, object]:
        """Return the columns that were given, `completed` as the `status` it spells."""
        given = self.model_fields_set
        values = {name: getattr(self, name) for name in WRITABLE if name in given}
        if "completed" in given:
            values["status"] = "complete" if self.completed else "incomplete"
        return values


class NewTask(TaskInput):
    """The body of a POST."""

    title: NewTitle


class TaskChange(TaskInput):
    """The body of a PUT: the fields to change."""

    model_config = ConfigDict(json_schema_extra=_document_change)

    title: ChangedTitle = ""


class Completion(BaseModel):
    """The optional body of a PATCH …/complete."""

    model_config = ConfigDict(extra="forbid", json_schema_extra=_without_defaults)

    completed: Completed = False


class TaskQuery(BaseModel):
    """The parameters of a list."""

    model_config = ConfigDict(extra="forbid")

    status: Literal["all", "incomplete", "pending", "complete", "completed"] = "all"
    sort: Literal["created", "updated", "title", "due_date", "priority"] = "created"
    order: Annotated[
        Literal["asc", "desc"] | None,
        WithJsonSchema({"type": "string", "enum": ["asc", "desc"]}),
    ] = Field(
        default=None,
        description="created, updated and priority: desc; title and due_date: asc.",
    )


class Task(BaseModel):
    """A task, as every answer shows it."""

    model_config = ConfigDict(
        extra="forbid", json_schema_serialization_defaults_required=True, frozen=True
    )

    id: int = Field(ge=1, le=MAXIMUM_ID)
    user_id: str
    title: str
    description: str | None
    status: Literal["incomplete", "complete"]
    completed: bool
    priority: Literal["low", "medium", "high"] | None
    due_date: datetime | None
    completed_at: datetime | None = Field(description="When `status` last became complete.")
    created_at: datetime
    updated_at: datetime
    version: int = Field(
        ge=1,
        description="Changes with every write that changes something; the later of two is higher.",
    )


Body = TypeVar("Body", bound=BaseModel)


def read(model: type[Body], body: dict[str, Any]) -> Body:
    """Validate a body. Raises `InvalidFields` with all that is wrong with its fields at once."""
    wrong: dict[str, str] = {}
    validated = None
    try:
        validated = model.model_validate(body)
    except ValidationError as error:
        for each in error.errors(include_url=False, include_input=False):
            name = str(each["loc"][0])
            wrong[name] = _message(name, each)
    if "status" not in wrong and _disagree(body.get("status"), body.get("completed")):
        wrong["status"] = "status and completed disagree: send one of them"
    if wrong or validated is None:
        raise InvalidFields(dict(sorted(wrong.items(), key=lambda item: _position(item[0]))))
    return validated


def _disagree(status: object, completed: object) -> bool:
    return (
        status in STATUSES
        and isinstance(completed, bool)
        and (status == "complete") is not completed
    )


def _message(name: str, error: Any) -> str:
    if error["type"] == "missing":
        return "Title is required"
    if error["type"] == "extra_forbidden":
        return f"Unknown field: {name[:100]}"
    return str(error["ctx"]["error"])


def _position(name: str) -> int:
    return FIELD_ORDER.index(name) if name in FIELD_ORDER else len(FIELD_ORDER)
