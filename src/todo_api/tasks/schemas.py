"""The bodies and parameters of requests, and the task of an answer, for pydantic and FastAPI.

They follow from the table of fields. Every message of a wrong field is here or in that table.
"""

import sys
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    ValidationError,
    WithJsonSchema,
    create_model,
)

from todo_api.errors import FieldError, InvalidFields, InvalidJson
from todo_api.tasks.fields import (
    BODY_FIELDS,
    BY_NAME,
    FIELDS,
    STATUSES,
    Status,
    TaskField,
    invalid,
)

_CODES: Mapping[str, str] = {
    "missing": "required",
    "extra_forbidden": "unknown_field",
    "string_type": "wrong_type",
    "bool_type": "wrong_type",
    "string_too_short": "blank",
    "string_too_long": "too_long",
    "literal_error": "invalid_value",
}
"""Our code for each type of error of pydantic. Other types are codes of ours already."""

_MESSAGES: Mapping[str, str] = {
    "required": "{label} is required",
    "blank": "{label} cannot be empty",
    "too_long": "{label} must be {max_length} characters or less",
    "wrong_type": "{label} must be a string{or_null}",
    "invalid_value": "{label} has a form that is not allowed",
    "invalid_text": "{label} must not contain the NUL character",
    "unknown_field": "Unknown field: {label}",
    "conflict": "{label} and completed disagree: send one of them",
}

MAXIMUM_LIMIT = 200
"""The most tasks of a page."""

SEARCH_LENGTH = 200
"""The most characters of a search."""

NOT_STORABLE = "text with NUL, or a number out of range"
"""What JSON can have and this service cannot store."""

SHOWN_NAME_LENGTH = 100
"""How much of an unknown field's name a message shows."""


def _ignored(value: object) -> object:
    """Refuse what parsers read differently (RFC 8259, sections 6 and 8), at any depth."""
    if isinstance(value, str) and "\0" in value:
        raise invalid("invalid_json")
    if isinstance(value, int | float) and not abs(value) <= sys.float_info.max:
        raise invalid("invalid_json")
    if isinstance(value, dict | list):
        for member in value:
            _ignored(member)
    if isinstance(value, dict):
        _ignored(list(value.values()))
    return value


_Ignored = Annotated[Any, BeforeValidator(_ignored), WithJsonSchema({})]


def _document(
    example: Mapping[str, object], **keywords: object
) -> Callable[[dict[str, Any]], None]:
    """Return what adds an example and keywords to a body's JSON Schema.

    It also drops the defaults, because a member that is left out has none.
    """

    def extend(schema: dict[str, Any]) -> None:
        for member in schema["properties"].values():
            member.pop("default", None)
        schema.update(examples=[example], **keywords)

    return extend


def _members(*, required: str | None) -> dict[str, Any]:
    """Return the members of a body, for pydantic's `create_model`."""
    members: dict[str, Any] = {}
    for field in FIELDS:
        default: Any = ... if field.name == required else None
        documented = Field(default, description=field.description, examples=[field.example])
        ignored = Field(None, description="Set by the service; ignored here.")
        members[field.name] = (field.body, documented) if field.body else (_Ignored, ignored)
    return members


class TaskInput(BaseModel):
    """What a body may say of a task."""

    model_config = ConfigDict(extra="forbid")

    def values(self) -> dict[str, object]:
        """Return the columns that the body sets."""
        values: dict[str, object] = {}
        for field in BODY_FIELDS:
            if field.name in self.model_fields_set:
                values |= field.stored(getattr(self, field.name))
        return values


_NEW_TASK = {
    name: BY_NAME[name].example for name in ("title", "description", "priority", "due_date")
}


class NewTask(create_model("NewTask", __base__=TaskInput, **_members(required="title"))):  # type: ignore[misc]  # made from the table
    """A new task. Fields that are left out get their defaults."""

    model_config = ConfigDict(json_schema_extra=_document(_NEW_TASK))


class TaskChange(create_model("TaskChange", __base__=TaskInput, **_members(required=None))):  # type: ignore[misc]  # made from the table
    """The fields to change; at least one that the service does not set itself."""

    model_config = ConfigDict(
        json_schema_extra=_document({"title": "Buy groceries"}, minProperties=1)
    )


class StatusChange(BaseModel):
    """The status that the task shall have."""

    model_config = ConfigDict(extra="forbid", json_schema_extra=_document({"status": "complete"}))

    status: Status = Field(description=BY_NAME["status"].description, examples=["complete"])


class Completion(BaseModel):
    """The body of a completion, which says whether the task shall be complete."""

    model_config = ConfigDict(extra="forbid", json_schema_extra=_document({"completed": True}))

    completed: StrictBool = Field(
        default=False, description="Whether the task is done.", examples=[True]
    )


Sort = Literal["created", "updated", "title", "due_date", "priority"]
Order = Literal["asc", "desc"]


def _shown(kind: str, example: object, **limits: object) -> WithJsonSchema:
    """Document an optional parameter, which is left out and never null."""
    return WithJsonSchema({"type": kind, "examples": [example], **limits})


class TaskQuery(BaseModel):
    """The parameters of a list."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    status: Literal["all", "incomplete", "pending", "complete", "completed"] = Field(
        default="all",
        description="Which tasks. `pending` means `incomplete`, `completed` means `complete`.",
        examples=["incomplete"],
    )
    sort: Sort = Field(
        default="created",
        description="What to sort by. The id breaks ties.",
        examples=["due_date"],
    )
    order: Annotated[Order | None, _shown("string", "desc", enum=["asc", "desc"])] = Field(
        default=None,
        description="The direction. The default of created, updated and priority is desc, of title"
        " and due_date asc. Tasks without a value come last in both.",
    )
    limit: Annotated[int | None, _shown("integer", 20, minimum=1, maximum=MAXIMUM_LIMIT)] = Field(
        default=None, description="The most tasks of an answer. `Link` leads to the next page."
    )
    cursor: Annotated[str | None, _shown("string", "dGhpcyBpcyBvcGFxdWU")] = Field(
        default=None, description="The place of a page, from the `Link` of the page before."
    )
    count: Annotated[bool, _shown("boolean", example=True)] = Field(
        default=False, description="Whether to send `X-Total-Count`."
    )
    q: Annotated[str | None, _shown("string", "milk", minLength=1)] = Field(
        default=None,
        description="Words that title or description must contain, at most 200 characters. Case"
        " and accents do not matter.",
    )
    priority: Annotated[
        Literal["low", "medium", "high", "none"] | None,
        _shown("string", "high", enum=["low", "medium", "high", "none"]),
    ] = Field(default=None, description="Only tasks of this priority.")
    due: Annotated[Literal["none"] | None, _shown("string", "none", enum=["none"])] = Field(
        default=None, description="Only tasks without a due date."
    )
    due_from: Annotated[str | None, _shown("string", "2026-12-01")] = Field(
        default=None, description="Only tasks due at this day or instant, or later."
    )
    due_before: Annotated[str | None, _shown("string", "2026-12-08")] = Field(
        default=None, description="Only tasks due before this day or instant."
    )

    @property
    def is_plain(self) -> bool:
        """Whether only status, sort and order are given, if anything is."""
        return self.model_fields_set <= {"status", "sort", "order"}


class AnswerModel(BaseModel):
    """A part of an answer."""

    model_config = ConfigDict(
        extra="forbid", json_schema_serialization_defaults_required=True, frozen=True
    )


class Task(
    create_model(  # type: ignore[misc]  # made from the table
        "Task",
        __base__=AnswerModel,
        **{
            field.name: (
                field.answer,
                Field(description=field.description, examples=[field.example]),
            )
            for field in FIELDS
        },
    )
):
    """A task, as every answer shows it."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{field.name: field.example for field in FIELDS}]}
    )


COMPLETED_TASK: dict[str, Any] = {
    **{field.name: field.example for field in FIELDS},
    "status": "complete",
    "completed": True,
    "version": 8,
    **dict.fromkeys(("completed_at", "updated_at"), "2026-11-22T08:15:00.000000Z"),
}
"""The example of a task that is done."""


class WrittenTask(AnswerModel):
    """A task that was written, in a batch or in the feed of changes."""

    task: Task = Field(description="The task.", examples=[COMPLETED_TASK])


Body = TypeVar("Body", bound=BaseModel)


def read(model: type[Body], body: dict[str, Any]) -> Body:
    """Validate a body. Raises `InvalidFields` with every wrong field, or `InvalidJson`."""
    wrong: dict[str, FieldError] = {}
    validated = None
    unknown = [name for name in body if name not in BY_NAME]
    for name in unknown[InvalidFields.MAXIMUM_FIELDS :]:  # pydantic is slow with thousands of them
        del body[name]
    try:
        validated = model.model_validate(body)
    except ValidationError as error:
        for each in error.errors(include_url=False):
            name = str(each["loc"][0])
            wrong[name] = _field_error(model, name, each)
    if "status" not in wrong and _disagree(body.get("status"), body.get("completed")):
        message = _MESSAGES["conflict"].format(label="status")
        wrong["status"] = FieldError("conflict", message)
    if wrong or validated is None:
        order = list(BY_NAME)
        position = {name: order.index(name) if name in BY_NAME else len(order) for name in wrong}
        raise InvalidFields(dict(sorted(wrong.items(), key=lambda item: position[item[0]])))
    return validated


def _disagree(status: object, completed: object) -> bool:
    return (
        status in STATUSES
        and isinstance(completed, bool)
        and (status == "complete") is not completed
    )


def _field_error(model: type[BaseModel], name: str, error: Any) -> FieldError:
    """Return the code and the message for what pydantic found wrong with one member."""
    code = _CODES.get(error["type"], error["type"])
    if code == "invalid_json" or "\0" in name:
        raise InvalidJson(f"Body is not valid JSON: {NOT_STORABLE}")
    field = BY_NAME.get(name)
    if field is None or code == "unknown_field":
        shown = name[:SHOWN_NAME_LENGTH]
        return FieldError("unknown_field", _MESSAGES["unknown_field"].format(label=shown))
    if code == "invalid_value" and not isinstance(error["input"], str):
        code = "wrong_type"
    if name == "title" and code == "wrong_type" and error["input"] is None:
        code = "required" if model.model_fields[name].is_required() else "blank"
    return FieldError(code, _message(model, field, code, error))


def _message(model: type[BaseModel], field: TaskField, code: str, error: Any) -> str:
    if field.must_be:
        return field.must_be
    if code == "blank" and model.model_fields[field.name].is_required():
        code = "required"  # the same message for a new task without a title, or with a blank one
    return _MESSAGES[code].format(
        label=field.label,
        max_length=error.get("ctx", {}).get("max_length"),
        or_null="" if field.name == "title" else " or null",
    )
