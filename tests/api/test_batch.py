"""Batches: several writes in one request, all of them or none, and in one round trip."""

import asyncio
import json
from itertools import product
from typing import Any

import httpx2
import psycopg
import pytest

from support.problems import invalid_fields, problem
from support.service import Service, bearer
from todo_api.tasks import owned_tasks
from todo_api.tasks.batch import BATCH_BYTES

KEY = {"Idempotency-Key": "key-1"}
JSON = {"Content-Type": "application/json"}
PATHS = ["/api/tasks/batch", "/api/alice/tasks/batch"]
NO_ARRAY = "operations must be an array of 1 to 100 operations"
OP = "op must be create, update, complete, reopen or delete"
IF_MATCH = "if_match must be a version, a whole number above 0"
CREATE = {"op": "create", "task": {"title": "new"}}


async def batch(
    service: Service, *operations: Any, user: str = "alice", path: str = PATHS[0], **options: Any
) -> httpx2.Response:
    body = {"operations": operations}
    return await service.request("POST", path, user, json=body, **options)


def _json(body: Any) -> bytes:
    return json.dumps(body, ensure_ascii=False).encode()


def stored(sql: psycopg.Connection) -> list[Any]:
    return sql.execute("SELECT id, title, status, version FROM tasks ORDER BY id").fetchall()


def problem_of(number: int, body: dict[str, Any]) -> dict[str, Any]:
    return {**body, "operation": number}


@pytest.mark.parametrize("path", PATHS)
async def test_operations_happen_in_order(
    service: Service, sql: psycopg.Connection, path: str
) -> None:
    one, two, three = [await service.create("alice", title=title) for title in "abc"]
    answer = await batch(
        service,
        {"op": "create", "task": {"title": "new", "priority": "high", "due_date": "2026-12-01"}},
        {"op": "update", "id": one["id"], "task": {"title": "A"}, "if_match": one["version"]},
        {"op": "complete", "id": one["id"]},
        {"op": "complete", "id": two["id"]},
        {"op": "reopen", "id": two["id"]},
        {"op": "delete", "id": three["id"]},
        path=path,
    )
    assert answer.status_code == 200, answer.text
    assert "etag" not in answer.headers
    *results, deleted = answer.json()["results"]
    assert deleted == {"deleted": three["id"]}
    tasks = [result["task"] for result in results]
    assert tasks[0] == {
        **one,
        **{name: tasks[0][name] for name in ("id", "version", "created_at", "updated_at")},
        "title": "new",
        "priority": "high",
        "due_date": "2026-12-01",
    }
    shown = [(task["id"], task["title"], task["status"]) for task in tasks[1:]]
    assert shown == [
        (one["id"], "A", "incomplete"),
        (one["id"], "A", "complete"),
        (two["id"], "b", "complete"),
        (two["id"], "b", "incomplete"),
    ]
    versions = [task["version"] for task in tasks]
    assert versions == sorted({*versions})
    assert versions[0] > three["version"]
    listed = (await service.request("GET", "/api/tasks", "alice")).json()
    assert {task["id"]: task for task in listed} == {task["id"]: task for task in tasks}
    newest = sql.execute("SELECT version FROM users").fetchone()
    assert sql.execute("SELECT task_id, version FROM tombstones").fetchall() == [
        (three["id"], *(newest or ()))
    ]


async def test_batch_of_a_new_user(service: Service) -> None:
    answer = await batch(service, CREATE, CREATE)
    first, second = [result["task"] for result in answer.json()["results"]]
    assert first["version"] + 1 == second["version"]
    assert (await service.create("alice"))["version"] > second["version"]


async def test_integer_may_be_written_as_a_float(service: Service) -> None:
    task = await service.create("alice")
    answer = await batch(
        service, {"op": "delete", "id": float(task["id"]), "if_match": task["version"]}
    )
    assert answer.json() == {"results": [{"deleted": task["id"]}]}


async def test_operation_that_changes_nothing_keeps_the_version(service: Service) -> None:
    task = await service.create("alice")
    answer = await batch(service, {"op": "reopen", "id": task["id"]})
    assert answer.json() == {"results": [{"task": task}]}


FAILING: list[tuple[dict[str, Any], int]] = [
    ({"op": "update", "id": 9999, "task": {"title": "x"}}, 404),
    ({"op": "complete", "id": 9999}, 404),
    ({"op": "delete", "id": 9999, "if_match": 1}, 404),
    ({"op": "update", "task": {"title": "x"}, "if_match": 1}, 412),
    ({"op": "reopen", "if_match": 1}, 412),
    ({"op": "delete", "if_match": 1}, 412),
]
PROBLEMS = {
    404: problem("task_not_found", "Task not found"),
    412: problem("task_changed", "The task has changed"),
}


@pytest.mark.parametrize(("failing", "place", "headers"), [*product(FAILING, (0, 1, 3), ({}, KEY))])
async def test_failing_operation_undoes_the_batch(
    service: Service, sql: psycopg.Connection, failing: Any, place: int, headers: dict[str, str]
) -> None:
    """Wherever it is. The error is its own, with its number."""
    task, other = await service.create("alice"), await service.create("alice", title="other")
    before = stored(sql)
    operation, status = failing
    operations: list[Any] = [
        CREATE,
        {"op": "update", "id": other["id"], "task": {"title": "y"}},
        {"op": "delete", "id": other["id"]},
    ]
    operations.insert(place, {"id": task["id"], **operation})
    answer = await batch(service, *operations, headers=headers)
    assert (answer.status_code, answer.json()) == (status, problem_of(place, PROBLEMS[status]))
    assert answer.headers.get("etag") == (f'"{task["version"]}"' if status == 412 else None)
    assert stored(sql) == before
    assert sql.execute("SELECT count(*) FROM answers").fetchone() == (0,)
    assert sql.execute("SELECT count(*) FROM tombstones").fetchone() == (0,)


async def test_task_is_gone_after_its_deletion_in_the_same_batch(service: Service) -> None:
    task = await service.create("alice")
    answer = await batch(
        service,
        {"op": "delete", "id": task["id"]},
        {"op": "complete", "id": task["id"], "if_match": task["version"]},
    )
    assert (answer.status_code, answer.json()) == (404, problem_of(1, PROBLEMS[404]))
    assert (await service.request("GET", f"/api/tasks/{task['id']}", "alice")).json() == task


async def test_other_users_tasks_do_not_exist(service: Service, sql: psycopg.Connection) -> None:
    task = await service.create("alice")
    before = stored(sql)
    for operation in (
        {"op": "update", "id": task["id"], "task": {"title": "x"}},
        {"op": "update", "id": task["id"], "task": {"title": "x"}, "if_match": task["version"]},
        {"op": "complete", "id": task["id"]},
        {"op": "delete", "id": task["id"]},
    ):
        answer = await batch(service, CREATE, operation, user="bob")
        assert (answer.status_code, answer.json()) == (404, problem_of(1, PROBLEMS[404]))
    assert stored(sql) == before
    answer = await batch(service, CREATE, user="bob", path=PATHS[1])
    assert answer.status_code == 403


INVALID: list[tuple[Any, dict[str, Any]]] = [
    (1, problem("invalid_batch", "An operation must be a JSON object")),
    ([], problem("invalid_batch", "An operation must be a JSON object")),
    (None, problem("invalid_batch", "An operation must be a JSON object")),
    ({}, problem("invalid_batch", OP)),
    ({"op": "drop", "id": 1}, problem("invalid_batch", OP)),
    ({"op": ["create"]}, problem("invalid_batch", OP)),
    ({"op": "create"}, problem("invalid_batch", "task is required")),
    ({"op": "create", "task": []}, problem("invalid_batch", "task must be a JSON object")),
    ({"op": "create", "task": None}, problem("invalid_batch", "task must be a JSON object")),
    (
        {"op": "create", "task": {}},
        invalid_fields({"title": "Title is required"}, {"title": "required"}),
    ),
    (
        {"op": "create", "task": {"title": "a\0", "color": 1}},
        invalid_fields(
            {"title": "Title must not contain the NUL character", "color": "Unknown field: color"},
            {"title": "invalid_text", "color": "unknown_field"},
        ),
    ),
    ({**CREATE, "id": 1}, problem("invalid_batch", "Unknown member: id")),
    ({**CREATE, "x" * 200: 1}, problem("invalid_batch", f"Unknown member: {'x' * 100}")),
    (
        {**CREATE, "a\0": 1},
        problem("invalid_json", "Body is not valid JSON: text with NUL, or a number out of range"),
    ),
    ({"op": "delete"}, problem("invalid_batch", "id is required")),
    *(
        ({"op": "delete", "id": value}, problem("invalid_task_id", "Invalid task ID"))
        for value in ("1", 0, -1, 1.5, True, None, 2**63, [1], 2.0**53, 1e300)
    ),
    *(
        ({"op": "delete", "id": 1, "if_match": value}, problem("invalid_batch", IF_MATCH))
        for value in ('"1"', "1", 0, 1.5, True, None, 2**63, [1])
    ),
    ({"op": "update", "id": 1}, problem("invalid_batch", "task is required")),
    (
        {"op": "update", "id": 1, "task": {"id": 1}},
        problem("nothing_to_change", "At least one field must be provided"),
    ),
    (
        {"op": "update", "id": 1, "task": {"title": None}},
        invalid_fields({"title": "Title cannot be empty"}, {"title": "blank"}),
    ),
    ({"op": "complete", "id": 1, "task": {}}, problem("invalid_batch", "Unknown member: task")),
]


@pytest.mark.parametrize(("operation", "expected"), INVALID)
async def test_malformed_operation_is_named_by_its_number(
    service: Service, sql: psycopg.Connection, operation: Any, expected: dict[str, Any]
) -> None:
    answer = await batch(service, CREATE, operation, CREATE)
    assert (answer.status_code, answer.json()) == (400, problem_of(1, expected))
    assert stored(sql) == []


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, NO_ARRAY),
        ({"operations": []}, NO_ARRAY),
        ({"operations": {"0": CREATE}}, NO_ARRAY),
        ({"operations": None}, NO_ARRAY),
        ({"operations": [CREATE] * 101}, NO_ARRAY),
        ({"operations": [CREATE], "atomic": False}, "Unknown member: atomic"),
    ],
)
async def test_malformed_batch_is_refused(
    service: Service, sql: psycopg.Connection, body: dict[str, Any], message: str
) -> None:
    answer = await service.request("POST", PATHS[0], "alice", json=body)
    assert (answer.status_code, answer.json()) == (400, problem("invalid_batch", message))
    assert stored(sql) == []


async def test_hundred_operations_of_maximal_size_fit(
    service: Service, sql: psycopg.Connection
) -> None:
    """2,600 characters of four bytes each, so that a hundred of them come close to a mebibyte.

    The server answers the first operations before it has read the last, so the client of the tests
    cannot count the round trips.
    """
    task = {"title": "\N{GRINNING FACE}" * 20, "description": "\N{GRINNING FACE}" * 2580}
    content = _json({"operations": [{"op": "create", "task": task}] * 100})
    headers = {**bearer("alice"), **JSON}
    answer = await service.client.post(PATHS[0], content=content, headers=headers)
    assert answer.status_code == 200
    assert [each["task"]["description"] for each in answer.json()["results"]] == [
        task["description"]
    ] * 100
    assert sql.execute("SELECT count(*) FROM tasks").fetchone() == (100,)


async def test_body_over_a_mebibyte_is_refused(service: Service) -> None:
    padding = b" " * (BATCH_BYTES - len(_json({"operations": [CREATE]})))
    fits = await service.request(
        "POST", PATHS[0], "alice", content=_json({"operations": [CREATE]}) + padding, headers=JSON
    )
    assert fits.status_code == 200
    too_large = problem("body_too_large", "Body must be 1048576 bytes or less")
    answer = await service.request(
        "POST",
        PATHS[0],
        "alice",
        content=_json({"operations": [CREATE]}) + padding + b" ",
        headers=JSON,
    )
    assert (answer.status_code, answer.json()) == (413, too_large)
    other = problem("body_too_large", "Body must be 131072 bytes or less")
    answer = await service.request(
        "POST", "/api/tasks", "alice", content=b" " * 131_073, headers=JSON
    )
    assert (answer.status_code, answer.json()) == (413, other)


async def test_path_of_a_batch_has_no_other_method(service: Service) -> None:
    for path, verb in product(PATHS, ("GET", "PUT", "PATCH", "DELETE")):
        answer = await service.request(verb, path, "alice")
        assert (answer.status_code, answer.headers["allow"]) == (405, "OPTIONS, POST")


async def test_repeated_batch_happens_once(service: Service, sql: psycopg.Connection) -> None:
    task = await service.create("alice")
    operations = [
        CREATE,
        {"op": "update", "id": task["id"], "task": {"title": "y"}, "if_match": task["version"]},
        {"op": "delete", "id": task["id"]},
        CREATE,
    ]
    first = await batch(service, *operations, headers=KEY)
    assert first.status_code == 200
    assert "idempotency-replayed" not in first.headers
    before = stored(sql)
    again = await batch(service, *operations, headers=KEY)
    assert (again.status_code, again.content) == (200, first.content)
    assert again.headers["idempotency-replayed"] == "true"
    assert stored(sql) == before
    assert len(before) == 2


async def test_key_of_a_batch_is_no_key_of_another_request(
    service: Service, sql: psycopg.Connection
) -> None:
    reused = problem(
        "idempotency_key_reused", "This Idempotency-Key was used with another method, path or body"
    )
    await batch(service, CREATE, headers=KEY)
    other = {"Idempotency-Key": "key-2"}
    await service.request("POST", "/api/tasks", "alice", headers=other, json={"title": "x"})
    before = stored(sql)
    for answer in (
        await batch(service, CREATE, CREATE, headers=KEY),
        await batch(service, CREATE, headers=KEY, path=PATHS[1]),
        await batch(service, CREATE, headers=other),
        await service.request("POST", "/api/tasks", "alice", headers=KEY, json={"title": "x"}),
    ):
        assert (answer.status_code, answer.json()) == (422, reused)
    assert stored(sql) == before
    assert (await batch(service, CREATE, headers=KEY, user="bob")).status_code == 200


async def test_simultaneous_batches_with_one_key_happen_once(
    service: Service, sql: psycopg.Connection
) -> None:
    async def send() -> httpx2.Response:
        headers = {**bearer("alice"), **KEY}
        body = {"operations": [CREATE] * 3}
        return await service.client.post(PATHS[0], headers=headers, json=body)

    answers = await asyncio.gather(*(send() for _ in range(20)))
    assert {(answer.status_code, answer.content) for answer in answers} == {
        (200, answers[0].content)
    }
    assert len(stored(sql)) == 3


async def test_expired_key_of_a_batch_can_be_used_again(
    service: Service, sql: psycopg.Connection
) -> None:
    await batch(service, CREATE, CREATE, headers=KEY)
    sql.execute("UPDATE answers SET created_at = now() - interval '25 hours'")
    answer = await batch(service, CREATE, headers=KEY)
    assert answer.status_code == 200
    assert sql.execute("SELECT operation FROM answers ORDER BY 1").fetchall() == [(0,), (1,)]


async def test_batches_in_opposite_order_do_not_deadlock(service: Service) -> None:
    tasks = [await service.create("alice") for _ in range(2)]

    async def send(order: int) -> httpx2.Response:
        operations = [
            {"op": op, "id": task["id"]} for op in ("complete", "reopen") for task in tasks[::order]
        ]
        headers = bearer("alice")
        return await service.client.post(PATHS[0], headers=headers, json={"operations": operations})

    answers = await asyncio.gather(*(send(order) for order in (1, -1) * 10))
    assert {answer.status_code for answer in answers} == {200}
    final = [await service.request("GET", f"/api/tasks/{task['id']}", "alice") for task in tasks]
    assert [answer.json()["status"] for answer in final] == ["incomplete"] * 2


async def test_void_token_writes_no_batch(service: Service, sql: psycopg.Connection) -> None:
    await service.create("alice")
    await service.request("DELETE", "/api/account", "alice")
    answer = await batch(service, CREATE)
    assert (answer.status_code, answer.json()["code"]) == (401, "token_invalid")
    assert "operation" not in answer.json()
    assert stored(sql) == []


async def test_batch_removes_what_has_expired(
    service: Service, sql: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owned_tasks, "WRITES_PER_CLEANING", 1)
    await batch(service, CREATE, headers=KEY)
    sql.execute("UPDATE answers SET created_at = now() - interval '25 hours'")
    await batch(service, CREATE)
    assert sql.execute("SELECT count(*) FROM answers").fetchone() == (0,)
