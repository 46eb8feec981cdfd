"""A batch: several writes in one request, read and documented.

The members of an operation are checked here, and its task as in a request of its own.
"""

import asyncio
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    WithJsonSchema,
)
from pydantic_core import PydanticCustomError

from todo_api.errors import ApiError, InvalidBatch, InvalidJson, InvalidTaskId, NothingToChange
from todo_api.tasks.fields import BY_NAME, MAXIMUM_ID
from todo_api.tasks.owned_tasks import Operation
from todo_api.tasks.schemas import (
    COMPLETED_TASK,
    NOT_STORABLE,
    SHOWN_NAME_LENGTH,
    AnswerModel,
    NewTask,
    TaskChange,
    WrittenTask,
    read,
)

MAXIMUM_OPERATIONS = 100
"""The most operations of a batch."""

BATCH_BYTES = 1_048_576
"""The most bytes of the body of a batch."""


EXACT_FLOATS = 2**53
"""Below this, a float stands for one integer (RFC 8259, section 6)."""


def _new_task(given: object) -> NewTask:
    return read(NewTask, _object(given))


def _change(given: object) -> TaskChange:
    change = read(TaskChange, _object(given))
    if not change.values():
        raise NothingToChange
    return change


def _object(given: object) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise PydanticCustomError("not_an_object", "")
    return given


def _integer(given: object) -> object:
    """Accept `7.0`, which JSON Schema calls an integer, where a float is exact."""
    if isinstance(given, float) and given.is_integer() and abs(given) < EXACT_FLOATS:
        return int(given)
    return given


def _version(given: object) -> object:
    """Refuse null, which may be a version that a client has lost."""
    if given is None:
        raise PydanticCustomError("no_version", "")
    return _integer(given)


def _op(name: str) -> Any:
    return Field(description="What to do.", examples=[name])


class _Operation(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    def write(self) -> Operation:
        """Return what the operation writes."""
        raise NotImplementedError


_POSITIVE = WithJsonSchema({"type": "integer", "format": "int64", "minimum": 1})


class _OnTask(_Operation):
    id: Annotated[int, BeforeValidator(_integer), _POSITIVE] = Field(
        ge=1, le=MAXIMUM_ID, description="The task's `id`.", examples=[BY_NAME["id"].example]
    )
    if_match: Annotated[int | None, BeforeValidator(_version), _POSITIVE] = Field(
        default=None,
        ge=1,
        le=MAXIMUM_ID,
        description="Only if the task has this `version`.",
        examples=[7],
    )

    def write(self) -> Operation:
        """Return what the operation writes."""
        if_match = None if self.if_match is None else [self.if_match]
        return Operation(self.id, self.values(), if_match)

    def values(self) -> dict[str, object] | None:
        """Return the columns that the operation sets, or None if it deletes the task."""
        return None


class CreateOperation(_Operation):
    """Create a task."""

    op: Literal["create"] = _op("create")
    task: Annotated[NewTask, BeforeValidator(_new_task)] = Field(
        description="The new task.", examples=[{"title": "Buy groceries"}]
    )

    def write(self) -> Operation:
        """Return what the operation writes."""
        return Operation(None, self.task.values())


class UpdateOperation(_OnTask):
    """Change the fields of a task that are present."""

    op: Literal["update"] = _op("update")
    task: Annotated[TaskChange, BeforeValidator(_change)] = Field(
        description="The fields to change.", examples=[{"priority": "high"}]
    )

    def values(self) -> dict[str, object]:
        """Return the columns of the change."""
        values: dict[str, object] = self.task.values()
        return values


class CompleteOperation(_OnTask):
    """Complete a task."""

    op: Literal["complete"] = _op("complete")

    def values(self) -> dict[str, object]:
        """Return the new status."""
        return {"status": "complete"}


class ReopenOperation(_OnTask):
    """Set a task incomplete."""

    op: Literal["reopen"] = _op("reopen")

    def values(self) -> dict[str, object]:
        """Return the new status."""
        return {"status": "incomplete"}


class DeleteOperation(_OnTask):
    """Delete a task."""

    op: Literal["delete"] = _op("delete")


BatchOperation = Annotated[
    CreateOperation | UpdateOperation | CompleteOperation | ReopenOperation | DeleteOperation,
    Field(discriminator="op"),
]


_OPERATIONS: list[Any] = [
    {"op": "create", "task": {"title": "Buy groceries"}},
    {"op": "complete", "id": BY_NAME["id"].example, "if_match": 7},
]


class Batch(BaseModel):
    """Operations that are carried out in order, all of them or none."""

    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"operations": _OPERATIONS}]}
    )

    operations: list[BatchOperation] = Field(
        min_length=1,
        max_length=MAXIMUM_OPERATIONS,
        description="What to do, one after another.",
        examples=[_OPERATIONS],
    )

    async def writes(self) -> list[Operation]:
        """Return what each operation writes."""
        written = []
        for each in self.operations:
            written.append(each.write())
            await asyncio.sleep(0)  # folding 5,000 characters can take 0.1 s
        return written


_RESULTS: list[Any] = [{"task": COMPLETED_TASK}, {"deleted": 43}]


class DeletedTask(AnswerModel):
    """The result of an operation that deleted a task."""

    deleted: int = Field(
        description="The `id` of the task.", examples=[43], json_schema_extra={"format": "int64"}
    )


class BatchAnswer(AnswerModel):
    """The results of a batch."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"results": _RESULTS}]})

    results: list[WrittenTask | DeletedTask] = Field(
        description="One for each operation, in the same order.", examples=[_RESULTS]
    )


_MEMBERS = {"op", "id", "task", "if_match"}
_OPERATION: TypeAdapter[Any] = TypeAdapter(BatchOperation)
_MESSAGES: Mapping[str, str] = {
    "operation": "An operation must be a JSON object",
    "op": "op must be create, update, complete, reopen or delete",
    "task": "task must be a JSON object",
    "if_match": "if_match must be a version, a whole number above 0",
}
"""The message for each member with a wrong value."""


async def read_batch(body: dict[str, Any]) -> Batch:
    """Validate the body of a batch.

    Raises `InvalidBatch`, or what a request of its own would raise for an operation, with the
    number of the first wrong operation.
    """
    for name in body.keys() - {"operations"}:
        raise _unknown(name)
    given = body.get("operations")
    if not isinstance(given, list) or not 1 <= len(given) <= MAXIMUM_OPERATIONS:
        raise InvalidBatch
    operations = []
    for number, each in enumerate(given):
        operations.append(_read_numbered(number, each))
        await asyncio.sleep(0)  # a mebibyte takes long enough to hold up other requests
    return Batch.model_construct(operations=operations)


def _read_numbered(number: int, given: object) -> Any:
    try:
        _check_members(given)
        return _OPERATION.validate_python(given)
    except ValidationError as error:
        problem = _problem(error.errors(include_url=False)[0])
    except ApiError as error:
        problem = error
    problem.operation = number
    raise problem


def _check_members(given: object) -> None:
    """Refuse the first unknown member. pydantic would collect thousands of them."""
    if isinstance(given, dict) and (unknown := given.keys() - _MEMBERS):
        raise _unknown(next(name for name in given if name in unknown))


def _problem(error: Any) -> ApiError:
    """Return our error for the first thing that pydantic found wrong with an operation."""
    kind = error["type"]
    if kind.startswith("union_tag"):
        return InvalidBatch(_MESSAGES["op"])
    if not error["loc"][1:]:
        return InvalidBatch(_MESSAGES["operation"])
    name = str(error["loc"][1])
    if kind == "missing":
        return InvalidBatch(f"{name} is required")
    if kind == "extra_forbidden":
        return _unknown(name)
    return InvalidTaskId() if name == "id" else InvalidBatch(_MESSAGES[name])


def _unknown(name: str) -> ApiError:
    if "\0" in name:
        return InvalidJson(f"Body is not valid JSON: {NOT_STORABLE}")
    return InvalidBatch(f"Unknown member: {name[:SHOWN_NAME_LENGTH]}")
