"""The routes: six operations on tasks and the end of an account, in two families of paths.

A handler's signature says what it needs. FastAPI reads it for the OpenAPI document; `TaskRoute`
supplies it once the owner is known: path and query first, then the body.
"""

import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from inspect import signature
from typing import Annotated, Any, get_args
from urllib.parse import parse_qsl

import jiter
from fastapi import Path, Query, Security
from fastapi.security import HTTPBearer
from starlette.requests import Request
from starlette.responses import Response

from todo_api.auth.owner import Authenticator, Owner, PrivateRoute
from todo_api.errors import BadRequest
from todo_api.http.answers import Error, array_answer, json_answer
from todo_api.http.body import read_object
from todo_api.tasks.owned_tasks import OwnedTasks
from todo_api.tasks.schemas import (
    CHANGEABLE,
    MAXIMUM_ID,
    Completion,
    NewTask,
    Task,
    TaskChange,
    TaskQuery,
    read,
)

Tasks = Annotated[OwnedTasks, Security(HTTPBearer(bearerFormat="JWT", scheme_name="bearer"))]
"""The tasks that the bearer token opens."""

TaskId = Annotated[int, Path(alias="id", ge=1, le=MAXIMUM_ID)]


async def list_tasks(tasks: Tasks, query: Annotated[TaskQuery, Query()]) -> Response:
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


_DEFAULT = Completion()


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


async def delete_account(tasks: Tasks) -> Response:
    """Erase the user and all their tasks. Tokens issued before cannot write any more."""
    await tasks.erase_owner()
    return Response(status_code=204)


Reader = Callable[[Request], Awaitable[Any]]


async def _read_request(request: Request) -> Request:
    return request


async def _read_task_id(request: Request) -> int:
    """Read an id as the server writes it: plain decimal digits, from 1 to 2^63 - 1."""
    text = request.path_params["id"]
    if not re.fullmatch(r"[1-9][0-9]{0,18}", text) or int(text) > MAXIMUM_ID:
        raise BadRequest("Invalid task ID")
    return int(text)


_ALLOWED: Mapping[str, tuple[str, ...]] = {
    "status": get_args(TaskQuery.model_fields["status"].annotation),
    "sort": get_args(TaskQuery.model_fields["sort"].annotation),
    "order": ("asc", "desc"),
}
_EVERYTHING = TaskQuery()


async def _read_query(request: Request) -> TaskQuery:
    """Read the list's parameters: each at most once, no others, only the values allowed."""
    query = request.scope["query_string"]
    if not query:
        return _EVERYTHING
    given: dict[str, str] = {}
    for name, value in parse_qsl(query.decode("latin-1"), keep_blank_values=True):
        if name not in _ALLOWED:
            raise BadRequest("Unknown query parameter. Allowed are status, sort and order")
        if name in given:
            raise BadRequest(f"The query parameter {name} must be given at most once")
        if value not in _ALLOWED[name]:
            raise BadRequest(f"Invalid {name} value. Must be {_one_of(_ALLOWED[name])}")
        given[name] = value
    return TaskQuery.model_validate(given)


def _one_of(values: tuple[str, ...]) -> str:
    return f"{', '.join(values[:-1])} or {values[-1]}"


async def _read_new_task(request: Request) -> NewTask:
    return read(NewTask, await _read_body(request))


async def _read_change(request: Request) -> TaskChange:
    change = read(TaskChange, await _read_body(request))
    if change.model_fields_set.isdisjoint(CHANGEABLE):
        raise BadRequest("At least one field must be provided")
    return change


async def _read_body(request: Request) -> dict[str, Any]:
    body = await read_object(request)
    if body is None:
        raise BadRequest("Body must be a JSON object")
    return body


async def _read_completion(request: Request) -> Completion:
    return read(Completion, await read_object(request) or {})


_READERS: Mapping[str, Reader] = {
    "request": _read_request,
    "task_id": _read_task_id,
    "query": _read_query,
    "task": _read_new_task,
    "change": _read_change,
    "completion": _read_completion,
}
"""How each parameter of a handler is read."""


class TaskRoute(PrivateRoute):
    """A private route whose handler gets the owner's tasks and what its signature names."""

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        self._open_tasks: Callable[[Owner], OwnedTasks] = options.pop("open_tasks")
        super().__init__(path, endpoint, **options)
        _, *names = signature(endpoint).parameters
        self._readers = [_READERS[name] for name in names]

    async def answer(self, request: Request, owner: Owner) -> Response:
        """Read what the handler needs, in the order of its signature, and call it."""
        arguments = [await reader(request) for reader in self._readers]
        response: Response = await self.endpoint(self._open_tasks(owner), *arguments)
        return response


@dataclass(frozen=True)
class _Operation:
    """One row of the contract's table: a verb, the end of its path, its handler, its success."""

    verb: str
    path: str
    handler: Callable[..., Awaitable[Response]]
    user_scoped_handler: Callable[..., Awaitable[Response]]
    name: str
    status: int = 200
    answer: Any = Task


_OPERATIONS = (
    _Operation("GET", "/tasks", list_tasks, list_tasks, "list_tasks", answer=list[Task]),
    _Operation("POST", "/tasks", create_task, create_task, "create_task", 201),
    _Operation("GET", "/tasks/{id}", get_task, get_task, "get_task"),
    _Operation("PUT", "/tasks/{id}", change_task, change_task, "change_task"),
    _Operation("DELETE", "/tasks/{id}", delete_task, delete_task, "delete_task", 204, None),
    _Operation("PATCH", "/tasks/{id}/complete", toggle_task, complete_task, "complete_task"),
    _Operation("DELETE", "/account", delete_account, delete_account, "delete_account", 204, None),
)
_USER_ID = {
    "name": "user_id",
    "in": "path",
    "required": True,
    "description": "The token's `sub`; another user's is 403.",
    "schema": {"type": "string"},
}


def task_routes(
    authenticator: Authenticator, open_tasks: Callable[[Owner], OwnedTasks]
) -> list[TaskRoute]:
    """Return the token-scoped routes, which win where a path fits both families, and the others."""
    made = {"authenticator": authenticator, "open_tasks": open_tasks}
    token_scoped = [
        _route("/api", operation, operation.handler, operation.name, **made)
        for operation in _OPERATIONS
    ]
    user_scoped = [
        _route(
            "/api/{user_id}",
            operation,
            operation.user_scoped_handler,
            operation.name.replace("_", "_user_", 1),
            openapi_extra={"parameters": [_USER_ID]},
            **made,
        )
        for operation in _OPERATIONS
    ]
    return token_scoped + user_scoped


def _responses(path: str, operation: _Operation) -> dict[int | str, dict[str, Any]]:
    """Document which errors an operation can have, and the header of what it creates."""
    has_body = operation.verb in {"POST", "PUT", "PATCH"}
    possible = {
        400: "{id}" in path or has_body or operation.verb == "GET",
        401: True,
        403: "{user_id}" in path,
        404: "{id}" in path,
        413: has_body,
        415: has_body,
        429: True,
        500: True,
        503: True,
    }
    documented: dict[int | str, dict[str, Any]] = {
        status: {"model": Error} for status, is_possible in possible.items() if is_possible
    }
    if operation.status == HTTPStatus.CREATED:
        location = {"required": True, "schema": {"type": "string"}}
        documented[operation.status] = {"headers": {"Location": location}}
    return documented


def _route(
    prefix: str,
    operation: _Operation,
    handler: Callable[..., Awaitable[Response]],
    name: str,
    **options: Any,
) -> TaskRoute:
    return TaskRoute(
        prefix + operation.path,
        handler,
        name=name,
        operation_id=name,
        methods=[operation.verb],
        status_code=operation.status,
        response_model=operation.answer,
        responses=_responses(prefix + operation.path, operation),
        tags=["tasks"],
        **options,
    )
