"""The routes: seven operations on tasks and the end of an account, in two families of paths.

A handler's annotations say what it needs and how that is read. FastAPI makes the OpenAPI document
from the same signature.
"""

import re
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b, sha256
from http import HTTPStatus
from typing import Annotated, Any

import jiter
from fastapi import APIRouter, Body, Header, Path, Query, Security
from fastapi.security import HTTPBearer
from pydantic import WithJsonSchema
from starlette.requests import Request
from starlette.responses import Response

from todo_api.errors import InvalidJson, InvalidTaskId, NothingToChange
from todo_api.http.answers import array_answer, json_answer
from todo_api.http.body import JSON, MAXIMUM_BYTES, MERGE_PATCH, read_body, read_object
from todo_api.http.conditional import EntityTags, read_entity_tags, read_idempotency_key
from todo_api.http.long_poll import ended_early, step_aside
from todo_api.http.openapi import error_responses, references
from todo_api.http.routing import PrivateRoute, Reads
from todo_api.tasks import changes, schemas
from todo_api.tasks.batch import BATCH_BYTES, Batch, BatchAnswer, read_batch
from todo_api.tasks.changes import Changes, Cursor
from todo_api.tasks.fields import BY_NAME, MAXIMUM_ID
from todo_api.tasks.owned_tasks import Condition, OwnedTasks, Retry, version_of
from todo_api.tasks.query import cursor_after, next_link, read_task_query

REVALIDATED = {"Cache-Control": "private, no-cache"}
"""Lets a browser keep an answer, and ask each time whether it is still true."""

bearer = HTTPBearer(bearerFormat="JWT", scheme_name="bearer")
"""Documents the token. `Authenticator` verifies it."""


async def _read_task_id(request: Request) -> int:
    """Read an id as the service writes it: plain decimal digits, from 1 to 2^63 - 1."""
    text = request.path_params["id"]
    if not re.fullmatch(r"[1-9][0-9]{0,18}", text) or int(text) > MAXIMUM_ID:
        raise InvalidTaskId
    return int(text)


async def _read_if_match(request: Request) -> list[int] | None:
    tags = read_entity_tags(request, "If-Match")
    return None if tags is None else tags.versions


async def _read_retry(request: Request) -> Retry | None:
    key = read_idempotency_key(request)
    if key is None:
        return None
    content = await read_body(request)
    identity = b"\0".join([request.method.encode(), request.scope["raw_path"], content])
    return Retry(key, sha256(identity).digest())


async def _read_if_none_match(request: Request) -> EntityTags | None:
    return read_entity_tags(request, "If-None-Match")


async def _read_new_task(request: Request) -> schemas.NewTask:
    return schemas.read(schemas.NewTask, await _read_body(request))


async def _read_change(request: Request) -> schemas.TaskChange:
    media_types = {JSON, MERGE_PATCH} if request.method == "PATCH" else {JSON}
    change = schemas.read(schemas.TaskChange, await _read_body(request, media_types))
    if not change.values():
        raise NothingToChange
    return change


async def _read_batch(request: Request) -> Batch:
    return await read_batch(await _read_body(request, limit=BATCH_BYTES))


async def _read_body(
    request: Request, media_types: Collection[str] = (JSON,), limit: int = MAXIMUM_BYTES
) -> dict[str, Any]:
    body = await read_object(request, media_types, limit)
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
IfMatch = Annotated[
    list[int] | None,
    Header(alias="If-Match", description="Change the task only in this version: its `ETag`."),
    WithJsonSchema({"type": "string", "examples": ['"7"']}),
    Reads(_read_if_match),
]
IfNoneMatch = Annotated[
    EntityTags | None,
    Header(alias="If-None-Match", description="Answer 304 if the `ETag` is still this one."),
    WithJsonSchema({"type": "string", "examples": ['"7"']}),
    Reads(_read_if_none_match),
]
IdempotencyKey = Annotated[
    Retry | None,
    Header(
        alias="Idempotency-Key",
        description="Names this write. A repeat within 24 hours gets the first answer again.",
    ),
    WithJsonSchema({"type": "string", "examples": ["8e03978e-40d5-43dd-bc93-6894a57f9324"]}),
    Reads(_read_retry),
]
TaskQuery = Annotated[schemas.TaskQuery, Query(), Reads(read_task_query)]
ChangesQuery = Annotated[changes.ChangesQuery, Query(), Reads(changes.read_changes_query)]
NewTask = Annotated[schemas.NewTask, Body(), Reads(_read_new_task)]
TaskChange = Annotated[schemas.TaskChange, Body(), Reads(_read_change)]
BatchBody = Annotated[Batch, Body(), Reads(_read_batch)]
StatusChange = Annotated[schemas.StatusChange, Body(), Reads(_read_status)]
Completion = Annotated[schemas.Completion, Body(), Reads(_read_completion)]


def _task_answer(
    task: bytes, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    return json_answer(task, status, {"ETag": f'"{version_of(task)}"', **(headers or {})})


async def list_tasks(
    tasks: Tasks, query: TaskQuery, request: Request, if_none_match: IfNoneMatch = None
) -> Response:
    """List the tasks, all of them unless parameters ask for some."""
    prefix = f'"{blake2b(tasks.owner.id.encode(), digest_size=9).hexdigest()}-'
    known = _known_version(if_none_match, prefix)
    found = await tasks.list(query, known)
    headers = {"ETag": f'{prefix}{found.version}"', **REVALIDATED}
    if found.version == known:
        return Response(status_code=304, headers=headers)
    if found.total is not None:
        headers["X-Total-Count"] = str(found.total)
    shown = found.first[: query.limit]
    if len(shown) < len(found.first):
        headers["Link"] = next_link(request, cursor_after(shown[-1], query, tasks.owner.id))
    return array_answer(shown, found.rest, headers)


def _known_version(tags: EntityTags | None, prefix: str) -> int | None:
    """Return the newest version of a list that the client has, if it is this user's list."""
    known = [
        int(version)
        for tag in ((*tags.strong, *tags.weak) if tags else ())
        if tag.startswith(prefix)
        and re.fullmatch("0|[1-9][0-9]{0,17}", version := tag[len(prefix) : -1])
    ]
    return max(known, default=None)


async def create_task(
    tasks: Tasks, task: NewTask, request: Request, retry: IdempotencyKey = None
) -> Response:
    """Create a task. `Location` is its path, in the family of the request."""
    created = await tasks.add(task.values(), retry)
    location = f"{request.scope['raw_path'].decode('latin-1')}/{jiter.from_json(created)['id']}"
    return _task_answer(created, 201, {"Location": location, **_replayed(retry)})


async def list_changes(tasks: Tasks, query: ChangesQuery, request: Request) -> Response:
    """List what was created, changed or deleted since a cursor, and wait for it if asked."""
    since = Cursor.read(query.since, tasks.owner.id)
    if query.wait is None:
        page = await tasks.changes(since, query.limit)
    else:
        page = await _await_changes(tasks, since, query, request)
    return json_answer(page.shown(tasks.owner.id))


async def _await_changes(
    tasks: OwnedTasks, since: Cursor, query: changes.ChangesQuery, request: Request
) -> changes.ChangesPage:
    """Return the changes as soon as there are any, or none when the wait ends."""
    with (
        tasks.waiters.joined(tasks.owner.id) as waiter,
        ended_early(request, query.wait or 0, waiter.end),
    ):
        page = await tasks.changes(since, query.limit)
        while not page.rows:
            waiter.version = page.cursor.position
            if not await step_aside(request, waiter.wait()):
                break
            page = await tasks.changes(page.cursor, query.limit, again=True)
        return page


async def get_task(tasks: Tasks, task_id: TaskId, if_none_match: IfNoneMatch = None) -> Response:
    """Show one task."""
    task = await tasks.get(task_id)
    tag = f'"{version_of(task)}"'
    if if_none_match is not None and if_none_match.include(tag):
        return Response(status_code=304, headers={"ETag": tag, **REVALIDATED})
    return _task_answer(task, headers=REVALIDATED)


async def change_task(
    tasks: Tasks,
    task_id: TaskId,
    change: TaskChange,
    if_match: IfMatch = None,
    retry: IdempotencyKey = None,
) -> Response:
    """Change the fields that are present and keep the others. Without `If-Match` the last wins."""
    task = await tasks.change(task_id, change.values(), Condition(if_match, retry))
    return _task_answer(task, headers=_replayed(retry))


async def delete_task(
    tasks: Tasks, task_id: TaskId, if_match: IfMatch = None, retry: IdempotencyKey = None
) -> Response:
    """Delete a task."""
    await tasks.remove(task_id, Condition(if_match, retry))
    return Response(status_code=204, headers=_replayed(retry))


_DEFAULT = schemas.Completion()


async def toggle_task(
    tasks: Tasks,
    task_id: TaskId,
    completion: Completion = _DEFAULT,
    if_match: IfMatch = None,
    retry: IdempotencyKey = None,
) -> Response:
    """Toggle a task, or set what the body says outright."""
    condition = Condition(if_match, retry)
    if not completion.model_fields_set:
        task = await tasks.toggle(task_id, condition)
    else:
        task = await tasks.complete(task_id, completed=completion.completed, condition=condition)
    return _task_answer(task, headers=_replayed(retry))


async def complete_task(
    tasks: Tasks,
    task_id: TaskId,
    completion: Completion = _DEFAULT,
    if_match: IfMatch = None,
    retry: IdempotencyKey = None,
) -> Response:
    """Complete a task, or set what the body says outright. A repeat changes nothing."""
    completed = not completion.model_fields_set or completion.completed
    condition = Condition(if_match, retry)
    task = await tasks.complete(task_id, completed=completed, condition=condition)
    return _task_answer(task, headers=_replayed(retry))


async def set_status(
    tasks: Tasks,
    task_id: TaskId,
    change: StatusChange,
    if_match: IfMatch = None,
    retry: IdempotencyKey = None,
) -> Response:
    """Set the status of a task. A repeat changes nothing."""
    values = {"status": change.status}
    task = await tasks.change(task_id, values, Condition(if_match, retry))
    return _task_answer(task, headers=_replayed(retry))


async def run_batch(tasks: Tasks, batch: BatchBody, retry: IdempotencyKey = None) -> Response:
    """Carry out up to 100 operations in order, all of them or none."""
    rows = await tasks.run_batch(await batch.writes(), retry)
    results = b",".join(
        (b'{"task":%b}' if row.startswith(b"{") else b'{"deleted":%b}') % row for row in rows
    )
    return json_answer(b'{"results":[%b]}' % results, headers=_replayed(retry))


def _replayed(retry: Retry | None) -> dict[str, str]:
    return {"Idempotency-Replayed": "true"} if retry and retry.is_replayed else {}


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
    user_scoped_tag: str = "user tasks"


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
        *("POST", "/tasks/batch", run_batch, run_batch, "run_batch"),
        "Write several tasks of the token's user",
        "Write several tasks of the user in the path",
        "What each operation did.",
        answer=BatchAnswer,
    ),
    _Operation(
        *("GET", "/tasks/changes", list_changes, list_changes, "list_changes"),
        "List the changes to the tasks of the token's user",
        "List the changes to the tasks of the user in the path",
        "The changes; an empty array if there are none.",
        answer=Changes,
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
        *("PATCH", "/tasks/{id}", change_task, change_task, "patch_task"),
        "Change a task of the token's user (merge patch)",
        "Change a task of the user in the path (merge patch)",
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
        user_scoped_tag="account",
    ),
)
_USER_ID = {
    "name": "user_id",
    "in": "path",
    "required": True,
    "description": "The token's `sub`. Another user's id is 403.",
    "schema": {"type": "string", "examples": [BY_NAME["user_id"].example]},
}


@cache
def task_router() -> APIRouter:
    """Return the token-scoped routes, which win where a path fits both families, and the others.

    All applications of a process share them, because FastAPI takes 40 ms to make them.
    """
    router = APIRouter(route_class=PrivateRoute)
    for operation in _OPERATIONS:
        _add(
            router,
            "/api",
            operation,
            operation.handler,
            name=operation.name,
            summary=operation.summary,
            tags=[operation.tag],
        )
    for operation in _OPERATIONS:
        _add(
            router,
            "/api/{user_id}",
            operation,
            operation.user_scoped_handler,
            name=operation.name.replace("_", "_user_", 1),
            summary=operation.user_scoped_summary,
            tags=[operation.user_scoped_tag],
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
        **options,
    )


def _responses(path: str, operation: _Operation) -> dict[int | str, dict[str, Any]]:
    """Document which errors an operation can have, and the header of what it creates."""
    has_body = operation.method in {"POST", "PUT", "PATCH"}
    names_task = "{id}" in path or operation.answer is BatchAnswer
    writes_task = operation.method != "GET" and operation.tag == "tasks"
    possible = {
        400: True,
        401: True,
        403: "{user_id}" in path,
        404: names_task,
        410: operation.answer is Changes,
        412: names_task and operation.method != "GET",
        413: has_body or writes_task,  # a key covers the body of a deletion, too
        415: has_body,
        422: writes_task,
        429: True,
        500: True,
        503: True,
    }
    responses = error_responses(*(status for status, can_be in possible.items() if can_be))
    success: dict[str, Any] = {"headers": references(_headers(operation))}
    if operation.path.endswith(("/complete", "/status")):
        success["content"] = {"application/json": {"example": schemas.COMPLETED_TASK}}
    responses[operation.status] = success
    if operation.method == "GET" and operation.answer is not Changes:
        unchanged = {"description": "The `ETag` is still one of those sent in `If-None-Match`."}
        responses[304] = unchanged | {"headers": references(["ETag"])}
    return responses


def _headers(operation: _Operation) -> Iterator[str]:
    """Name the header fields of an operation's success, beside those of every answer."""
    if operation.answer not in {None, BatchAnswer, Changes}:
        yield "ETag"
    if operation.status == HTTPStatus.CREATED:
        yield "Location"
    if operation.method == "GET" and operation.path == "/tasks":
        yield from ("Link", "X-Total-Count")
    if operation.method != "GET" and operation.tag == "tasks":
        yield "Idempotency-Replayed"
