"""The routes: seven operations on tasks and the end of an account, in two families of paths.

A handler's annotations say what it needs and how that is read. FastAPI makes the OpenAPI document
from the same signature.
"""

import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Annotated, Any, get_args
from urllib.parse import parse_qsl

import jiter
from fastapi import APIRouter, Body, Path, Query, Security
from fastapi.security import HTTPBearer
from starlette.requests import Request
from starlette.responses import Response

from todo_api.auth.owner import Authenticator, Owner
from todo_api.errors import InvalidJson, InvalidParameter, InvalidTaskId, NothingToChange
from todo_api.http.answers import array_answer, json_answer
from todo_api.http.body import read_object
from todo_api.http.openapi import error_responses
from todo_api.http.routing import PrivateRoute, Reads
from todo_api.tasks import schemas
from todo_api.tasks.fields import BY_NAME, FIELDS, MAXIMUM_ID
from todo_api.tasks.owned_tasks import OwnedTasks

bearer = HTTPBearer(bearerFormat="JWT", scheme_name="bearer")
"""Documents the token. `Authenticator` verifies it."""


async def _read_task_id(request: Request) -> int:
    """Read an id as the service writes it: plain decimal digits, from 1 to 2^63 - 1."""
    text = request.path_params["id"]
    if not re.fullmatch(r"[1-9][0-9]{0,18}", text) or int(text) > MAXIMUM_ID:
        raise InvalidTaskId
    return int(text)


_ALLOWED: Mapping[str, tuple[str, ...]] = {
    "status": get_args(schemas.TaskQuery.model_fields["status"].annotation),
    "sort": get_args(schemas.TaskQuery.model_fields["sort"].annotation),
    "order": ("asc", "desc"),
}
_EVERYTHING = schemas.TaskQuery()


async def _read_query(request: Request) -> schemas.TaskQuery:
    """Read the parameters of a list: each at most once, and only the values allowed."""
    query = request.scope["query_string"]
    if not query:
        return _EVERYTHING
    given: dict[str, str] = {}
    for name, value in parse_qsl(query.decode("latin-1"), keep_blank_values=True):
        if name not in _ALLOWED:
            raise InvalidParameter("Unknown query parameter. Allowed are status, sort and order")
        if name in given:
            raise InvalidParameter(f"The query parameter {name} must be given at most once")
        if value not in _ALLOWED[name]:
            raise InvalidParameter(f"Invalid {name} value. Must be {_one_of(_ALLOWED[name])}")
        given[name] = value
    return schemas.TaskQuery.model_validate(given)


def _one_of(values: tuple[str, ...]) -> str:
    return f"{', '.join(values[:-1])} or {values[-1]}"


async def _read_new_task(request: Request) -> schemas.NewTask:
    return schemas.read(schemas.NewTask, await _read_body(request))


async def _read_change(request: Request) -> schemas.TaskChange:
    change = schemas.read(schemas.TaskChange, await _read_body(request))
    if not change.values():
        raise NothingToChange
    return change


async def _read_body(request: Request) -> dict[str, Any]:
    body = await read_object(request)
    if body is None:
        raise InvalidJson("Body must be a JSON object")
    return body


async def _read_status(request: Request) -> schemas.StatusChange:
    return schemas.read(schemas.StatusChange, await _read_body(request))


async def _read_completion(request: Request) -> schemas.Completion:
    return schemas.read(schemas.Completion, await read_object(request) or {})


Tasks = Annotated[OwnedTasks, Security(bearer)]
"""The tasks of the token's user, and no others."""

TaskId = Annotated[
    int,
    Path(
        alias="id",
        ge=1,
        le=MAXIMUM_ID,
        description="The task's `id`, in decimal digits.",
        examples=[BY_NAME["id"].example],
        json_schema_extra={"format": "int64"},
    ),
    Reads(_read_task_id),
]
TaskQuery = Annotated[schemas.TaskQuery, Query(), Reads(_read_query)]
NewTask = Annotated[schemas.NewTask, Body(), Reads(_read_new_task)]
TaskChange = Annotated[schemas.TaskChange, Body(), Reads(_read_change)]
StatusChange = Annotated[schemas.StatusChange, Body(), Reads(_read_status)]
Completion = Annotated[schemas.Completion, Body(), Reads(_read_completion)]


async def list_tasks(tasks: Tasks, query: TaskQuery) -> Response:
    """List all tasks, or those of one status."""
    return array_answer(*await tasks.list(query))


async def create_task(tasks: Tasks, task: NewTask, request: Request) -> Response:
    """Create a task. `Location` is its path, in the family of the request."""
    created = await tasks.add(task.values())
    location = f"{request.scope['raw_path'].decode('latin-1')}/{jiter.from_json(created)['id']}"
    return json_answer(created, 201, {"Location": location})


async def get_task(tasks: Tasks, task_id: TaskId) -> Response:
    """Show one task."""
    return json_answer(await tasks.get(task_id))


async def change_task(tasks: Tasks, task_id: TaskId, change: TaskChange) -> Response:
    """Change the fields that are present and keep the others. The last write wins."""
    return json_answer(await tasks.change(task_id, change.values()))


async def delete_task(tasks: Tasks, task_id: TaskId) -> Response:
    """Delete a task."""
    await tasks.remove(task_id)
    return Response(status_code=204)


_DEFAULT = schemas.Completion()


async def toggle_task(tasks: Tasks, task_id: TaskId, completion: Completion = _DEFAULT) -> Response:
    """Toggle a task, or set what the body says outright."""
    if not completion.model_fields_set:
        return json_answer(await tasks.toggle(task_id))
    return json_answer(await tasks.complete(task_id, completed=completion.completed))


async def complete_task(
    tasks: Tasks, task_id: TaskId, completion: Completion = _DEFAULT
) -> Response:
    """Complete a task, or set what the body says outright. A repeat changes nothing."""
    completed = not completion.model_fields_set or completion.completed
    return json_answer(await tasks.complete(task_id, completed=completed))


async def set_status(tasks: Tasks, task_id: TaskId, change: StatusChange) -> Response:
    """Set the status of a task. A repeat changes nothing."""
    return json_answer(await tasks.change(task_id, {"status": change.status}))


async def delete_account(tasks: Tasks) -> Response:
    """Erase the user and all their tasks. Tokens issued before cannot write any more."""
    await tasks.erase_owner()
    return Response(status_code=204)


Handler = Callable[..., Awaitable[Response]]


@dataclass(frozen=True, slots=True)
class _Operation:
    """One row of the contract's table."""

    method: str
    path: str
    """The end of the path, the same in both families."""
    handler: Handler
    """The handler of the token-scoped route."""
    user_scoped_handler: Handler
    name: str
    summary: str
    user_scoped_summary: str
    result: str
    """What the response of success is."""
    status: int = 200
    answer: Any = schemas.Task
    tag: str = "tasks"


_OPERATIONS = (
    _Operation(
        *("GET", "/tasks", list_tasks, list_tasks, "list_tasks"),
        "List the tasks of the token's user",
        "List the tasks of the user in the path",
        "The tasks; an empty array if there are none.",
        answer=list[schemas.Task],
    ),
    _Operation(
        *("POST", "/tasks", create_task, create_task, "create_task"),
        "Create a task of the token's user",
        "Create a task of the user in the path",
        "The new task.",
        status=201,
    ),
    _Operation(
        *("GET", "/tasks/{id}", get_task, get_task, "get_task"),
        "Show a task of the token's user",
        "Show a task of the user in the path",
        "The task.",
    ),
    _Operation(
        *("PUT", "/tasks/{id}", change_task, change_task, "change_task"),
        "Change a task of the token's user",
        "Change a task of the user in the path",
        "The changed task.",
    ),
    _Operation(
        *("DELETE", "/tasks/{id}", delete_task, delete_task, "delete_task"),
        "Delete a task of the token's user",
        "Delete a task of the user in the path",
        "The task is deleted.",
        status=204,
        answer=None,
    ),
    _Operation(
        *("PATCH", "/tasks/{id}/complete", toggle_task, complete_task, "complete_task"),
        "Toggle a task of the token's user",
        "Complete a task of the user in the path",
        "The task with its new status.",
    ),
    _Operation(
        *("PATCH", "/tasks/{id}/status", set_status, set_status, "set_task_status"),
        "Set the status of a task of the token's user",
        "Set the status of a task of the user in the path",
        "The task with its new status.",
    ),
    _Operation(
        *("DELETE", "/account", delete_account, delete_account, "delete_account"),
        "Erase the token's user",
        "Erase the user in the path",
        "The user and all their tasks are erased.",
        status=204,
        answer=None,
        tag="account",
    ),
)
_COMPLETED = {
    **{field.name: field.example for field in FIELDS},
    "status": "complete",
    "completed": True,
    "version": 8,
    **dict.fromkeys(("completed_at", "updated_at"), "2026-11-22T08:15:00.000000Z"),
}
"""The example of a task that is done."""

_USER_ID = {
    "name": "user_id",
    "in": "path",
    "required": True,
    "description": "The token's `sub`. Another user's id is 403.",
    "schema": {"type": "string", "examples": [BY_NAME["user_id"].example]},
}


def task_router(
    authenticator: Authenticator, open_tasks: Callable[[Owner], OwnedTasks]
) -> APIRouter:
    """Return the token-scoped routes, which win where a path fits both families, and the others."""
    route_class = PrivateRoute.opened_by(authenticator, open_tasks)
    router = APIRouter(route_class=route_class)
    for operation in _OPERATIONS:
        _add(
            router,
            "/api",
            operation,
            operation.handler,
            name=operation.name,
            summary=operation.summary,
        )
    for operation in _OPERATIONS:
        _add(
            router,
            "/api/{user_id}",
            operation,
            operation.user_scoped_handler,
            name=operation.name.replace("_", "_user_", 1),
            summary=operation.user_scoped_summary,
            openapi_extra={"parameters": [_USER_ID]},
        )
    return router


def _add(
    router: APIRouter, prefix: str, operation: _Operation, handler: Handler, **options: Any
) -> None:
    path = prefix + operation.path
    router.add_api_route(
        path,
        handler,
        operation_id=options["name"],
        methods=[operation.method],
        status_code=operation.status,
        response_model=operation.answer,
        response_description=operation.result,
        responses=_responses(path, operation),
        tags=[operation.tag],
        **options,
    )


def _responses(path: str, operation: _Operation) -> dict[int | str, dict[str, Any]]:
    """Document which errors an operation can have, and the header of what it creates."""
    has_body = operation.method in {"POST", "PUT", "PATCH"}
    possible = {
        400: True,
        401: True,
        403: "{user_id}" in path,
        404: "{id}" in path,
        413: has_body,
        415: has_body,
        429: True,
        500: True,
        503: True,
    }
    responses = error_responses(*(status for status, can_be in possible.items() if can_be))
    if operation.method == "PATCH":
        content = {"application/json": {"example": _COMPLETED}}
        responses[operation.status] = {"content": content}
    if operation.status == HTTPStatus.CREATED:
        location = {"$ref": "#/components/headers/Location"}
        responses[operation.status] = {"headers": {"Location": location}}
    return responses
