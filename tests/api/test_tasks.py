"""The six operations on tasks, in both families of paths."""

from datetime import datetime
from itertools import product
from typing import Any

import psycopg
import pytest
from psycopg.rows import dict_row

from support.problems import invalid_fields, problem
from support.service import Service, bearer

FAMILIES = pytest.mark.parametrize("tasks", ["/api/tasks", "/api/alice/tasks"])


def stored(sql: psycopg.Connection, table: str = "tasks") -> list[dict[str, Any]]:
    order = "id" if table == "tasks" else "created_at, id"
    query = f"SELECT * FROM {table} ORDER BY {order}"  # noqa: S608
    return sql.cursor(row_factory=dict_row).execute(query).fetchall()


def moment(text: str) -> datetime:
    return datetime.strptime(text, "%Y-%m-%dT%H:%M:%S.%f%z")


@FAMILIES
async def test_create_returns_the_stored_task(
    service: Service, sql: psycopg.Connection, tasks: str
) -> None:
    response = await service.request("POST", tasks, "alice", json={"title": "  Buy groceries\t"})
    assert response.status_code == 201
    task = response.json()
    (row,) = stored(sql)
    assert response.headers["location"] == f"{tasks}/{row['id']}"
    assert task == {
        "id": row["id"],
        "user_id": "alice",
        "title": "Buy groceries",
        "description": None,
        "status": "incomplete",
        "completed": False,
        "priority": None,
        "due_date": None,
        "completed_at": None,
        "created_at": task["created_at"],
        "updated_at": task["created_at"],
        "version": row["version"],
    }
    assert list(task) == [
        *("id", "user_id", "title", "description", "status", "completed"),
        *("priority", "due_date", "completed_at", "created_at", "updated_at", "version"),
    ]
    assert moment(task["created_at"]) == row["created_at"] == row["updated_at"]
    assert (row["user_id"], row["title"], row["status"]) == (
        *("alice", "Buy groceries", "incomplete"),
    )


@FAMILIES
async def test_create_accepts_every_writable_field(service: Service, tasks: str) -> None:
    given = {
        "title": "Pay rent",
        "description": "  kept\nas sent  ",
        "status": "complete",
        "priority": "high",
        "due_date": "2026-12-01T10:00:00.5+02:00",
    }
    response = await service.request("POST", tasks, "alice", json=given)
    task = response.json()
    assert response.status_code == 201
    assert {**task, **given} == {**task, "due_date": given["due_date"]}
    assert task["due_date"] == "2026-12-01T08:00:00.500000Z"
    assert task["completed"] is True
    read_back = await service.request("GET", response.headers["location"], "alice")
    assert read_back.json() == task


async def test_location_encodes_special_characters_of_the_user_id(service: Service) -> None:
    response = await service.request("POST", "/api/auth0%7Cä/tasks", "auth0|ä", json={"title": "x"})
    assert response.status_code == 201
    assert response.headers["location"].startswith("/api/auth0%7C%C3%A4/tasks/")
    again = await service.request("GET", response.headers["location"], "auth0|ä")
    assert again.json() == response.json()


async def test_user_id_with_a_slash_works_encoded_in_the_path(service: Service) -> None:
    response = await service.request("POST", "/api/a%2Fb/tasks", "a/b", json={"title": "x"})
    assert response.status_code == 201
    assert response.headers["location"].startswith("/api/a%2Fb/tasks/")
    assert (await service.request("GET", "/api/a/b/tasks", "a/b")).status_code == 404


async def test_first_write_creates_the_user_and_later_writes_keep_the_row(
    service: Service, sql: psycopg.Connection
) -> None:
    await service.request("GET", "/api/tasks", "alice")
    assert stored(sql, "users") == []
    first = bearer("alice", email="a@example.com")
    for headers in (first, bearer("alice", email="other@example.com")):
        response = await service.request("POST", "/api/tasks", headers=headers, json={"title": "x"})
        assert response.status_code == 201
    (user,) = stored(sql, "users")
    assert (user["id"], user["email"]) == ("alice", "a@example.com")


@pytest.mark.parametrize("email", [None, 5, ["a@b"], "a\0b", "x" * 400, ""])
async def test_service_does_not_store_an_invalid_email(
    service: Service, sql: psycopg.Connection, email: object
) -> None:
    response = await service.request(
        "POST", "/api/tasks", headers=bearer("alice", email=email), json={"title": "x"}
    )
    assert response.status_code == 201
    assert stored(sql, "users")[0]["email"] is None


async def test_two_users_can_share_an_email(service: Service, sql: psycopg.Connection) -> None:
    for user in ("alice", "bob"):
        headers = bearer(user, email="both@example.com")
        await service.request("POST", "/api/tasks", headers=headers, json={"title": "x"})
    assert [user["email"] for user in stored(sql, "users")] == ["both@example.com"] * 2


@FAMILIES
async def test_get_returns_one_task_or_all(service: Service, tasks: str) -> None:
    empty = await service.request("GET", tasks, "alice")
    assert (empty.status_code, empty.content) == (200, b"[]")
    first = await service.create("alice", title="first")
    second = await service.create("alice", title="second")
    assert (await service.request("GET", tasks, "alice")).json() == [second, first]
    one = await service.request("GET", f"{tasks}/{first['id']}", "alice")
    assert (one.status_code, one.json()) == (200, first)


@FAMILIES
async def test_put_changes_only_the_given_fields(
    service: Service, sql: psycopg.Connection, tasks: str
) -> None:
    task = await service.create("alice", description="old", priority="low", due_date="2026-01-02")
    response = await service.request(
        "PUT", f"{tasks}/{task['id']}", "alice", json={"title": "new", "priority": None}
    )
    assert response.status_code == 200
    changed = response.json()
    assert changed == {
        **task,
        "title": "new",
        "priority": None,
        "updated_at": changed["updated_at"],
        "version": changed["version"],
    }
    assert changed["version"] > task["version"]
    assert moment(changed["updated_at"]) > moment(task["updated_at"])
    (row,) = stored(sql)
    assert (row["title"], row["priority"], row["description"]) == ("new", None, "old")
    assert row["version"] == changed["version"]
    assert row["created_at"] == moment(task["created_at"])


@pytest.mark.parametrize("field", ["description", "priority", "due_date"])
async def test_put_null_clears_a_field(service: Service, field: str) -> None:
    task = await service.create("alice", description="d", priority="low", due_date="2026-01-02")
    response = await service.request("PUT", f"/api/tasks/{task['id']}", "alice", json={field: None})
    assert response.json()[field] is None


async def test_put_accepts_a_task_from_a_response(service: Service) -> None:
    task = await service.create("alice", description="d", status="complete")
    sent_back = {**task, "user_id": "bob", "id": 99, "title": "again"}
    response = await service.request("PUT", f"/api/tasks/{task['id']}", "alice", json=sent_back)
    assert response.status_code == 200
    assert response.json() == {
        **task,
        "title": "again",
        "updated_at": response.json()["updated_at"],
        "version": response.json()["version"],
    }


async def test_put_that_changes_nothing_keeps_updated_at(service: Service) -> None:
    task = await service.create("alice", description="d", due_date="2026-01-02T00:00:00Z")
    same = {"title": " Buy groceries ", "description": "d", "due_date": "2026-01-02T01:00:00+01:00"}
    response = await service.request("PUT", f"/api/tasks/{task['id']}", "alice", json=same)
    assert (response.status_code, response.json()) == (200, task)


async def test_updated_at_grows_even_when_the_clock_steps_back(
    service: Service, sql: psycopg.Connection
) -> None:
    task = await service.create("alice")
    sql.execute("UPDATE tasks SET updated_at = now() + interval '1 hour'")
    last = stored(sql)[0]["updated_at"]
    for title in ("a", "b", "c"):
        response = await service.request(
            "PUT", f"/api/tasks/{task['id']}", "alice", json={"title": title}
        )
        assert moment(response.json()["updated_at"]) > last
        last = moment(response.json()["updated_at"])


@FAMILIES
async def test_delete_removes_a_task_once(
    service: Service, sql: psycopg.Connection, tasks: str
) -> None:
    kept = await service.create("alice")
    task = await service.create("alice")
    gone = await service.request("DELETE", f"{tasks}/{task['id']}", "alice")
    assert (gone.status_code, gone.content) == (204, b"")
    assert "content-type" not in gone.headers
    for verb in ("DELETE", "GET"):
        again = await service.request(verb, f"{tasks}/{task['id']}", "alice")
        assert (again.status_code, again.json()) == (
            404,
            problem("task_not_found", "Task not found"),
        )
    assert [row["id"] for row in stored(sql)] == [kept["id"]]


async def test_user_scoped_complete_is_idempotent(service: Service) -> None:
    task = await service.create("alice")
    path = f"/api/alice/tasks/{task['id']}/complete"
    first = (await service.request("PATCH", path, "alice")).json()
    assert (first["status"], first["completed"]) == ("complete", True)
    assert moment(first["updated_at"]) > moment(task["updated_at"])
    unsaid: list[dict[str, Any]] = [{}, {"json": {}}, {"json": {"completed": True}}]
    for options in unsaid:
        repeat = await service.request("PATCH", path, "alice", **options)
        assert (repeat.status_code, repeat.json()) == (200, first)
    undone = (await service.request("PATCH", path, "alice", json={"completed": False})).json()
    assert undone["status"] == "incomplete"


async def test_completed_at_shows_when_the_status_last_became_complete(service: Service) -> None:
    task = await service.create("alice", status="complete")
    assert task["completed_at"] == task["created_at"]
    path = f"/api/tasks/{task['id']}"
    renamed = (await service.request("PUT", path, "alice", json={"title": "x"})).json()
    assert renamed["completed_at"] == task["completed_at"] < renamed["updated_at"]
    again = (await service.request("PUT", path, "alice", json={"status": "complete"})).json()
    assert again == renamed
    reopened = (await service.request("PATCH", f"{path}/complete", "alice")).json()
    assert reopened["completed_at"] is None
    closed = (await service.request("PATCH", f"{path}/complete", "alice")).json()
    assert closed["completed_at"] == closed["updated_at"] > renamed["completed_at"]
    off = (await service.request("PUT", path, "alice", json={"completed": False})).json()
    assert off["completed_at"] is None
    on = (await service.request("PUT", path, "alice", json={"completed": True})).json()
    assert on["completed_at"] == on["updated_at"]
    ignored = {"title": "y", "completed_at": None, "version": 1}
    kept = (await service.request("PUT", path, "alice", json=ignored)).json()
    assert (kept["completed_at"], kept["version"] > on["version"]) == (on["completed_at"], True)


async def test_token_scoped_complete_toggles(service: Service) -> None:
    task = await service.create("alice")
    path = f"/api/tasks/{task['id']}/complete"
    unsaid: list[dict[str, Any]] = [{}, {"json": {}}, {"content": b""}]
    answers = [await service.request("PATCH", path, "alice", **options) for options in unsaid]
    seen = [task, *(answer.json() for answer in answers)]
    assert [each["completed"] for each in seen] == [False, True, False, True]
    times = [each["updated_at"] for each in seen]
    assert times == sorted(set(times))
    for completed in (True, True, False, False):
        said = await service.request("PATCH", path, "alice", json={"completed": completed})
        assert said.json()["completed"] is completed


@pytest.mark.parametrize("tasks", ["/api/tasks", "/api/alice/tasks"])
@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"completed": None}, "completed must be true or false"),
        ({"completed": 1}, "completed must be true or false"),
        ({"completed": "true"}, "completed must be true or false"),
        ({"completed": True, "id": 1}, "Unknown field: id"),
        ({"title": "x"}, "Unknown field: title"),
        ([], "Body must be a JSON object"),
        (None, "Body must be a JSON object"),
    ],
)
async def test_complete_refuses_any_other_body(
    service: Service, tasks: str, body: object, message: str
) -> None:
    task = await service.create("alice")
    content = b"null" if body is None else None
    response = await service.request(
        "PATCH",
        f"{tasks}/{task['id']}/complete",
        "alice",
        headers={"Content-Type": "application/json"},
        **({"content": content} if content else {"json": body}),
    )
    assert (response.status_code, response.json()["error"]) == (400, message)
    unchanged = await service.request("GET", f"/api/tasks/{task['id']}", "alice")
    assert unchanged.json() == task


NO_IDS = [
    *("0", "-1", "abc", "1.0", "1e3", "1_0", "007", "+1", "%201", "0x1", "%D9%A1", "null"),
    *("9223372036854775808", "1" + "0" * 30, "9" * 5000, "1%00", "%25", "%ff", "1;x", "tasks"),
]


@pytest.mark.parametrize("verb", ["GET", "PUT", "DELETE", "PATCH"])
async def test_service_refuses_an_id_that_is_not_plain_decimal(
    service: Service, verb: str, subtests: pytest.Subtests
) -> None:
    tail = "/complete" if verb == "PATCH" else ""
    body = {"json": {"title": "x"}} if verb == "PUT" else {}
    for task_id, tasks in product(NO_IDS, ("/api/tasks", "/api/alice/tasks")):
        with subtests.test(f"{tasks}/{task_id}"):
            response = await service.request(verb, f"{tasks}/{task_id}{tail}", "alice", **body)
            assert (response.status_code, response.json()) == (
                400,
                problem("invalid_task_id", "Invalid task ID"),
            )


@pytest.mark.parametrize("task_id", ["2147483648", "9223372036854775807"])
async def test_unused_id_in_range_gets_404(service: Service, task_id: str) -> None:
    response = await service.request("GET", f"/api/tasks/{task_id}", "alice")
    assert (response.status_code, response.json()) == (
        404,
        problem("task_not_found", "Task not found"),
    )


@pytest.mark.parametrize("tasks", ["/api/tasks", "/api/alice/tasks"])
async def test_status_route_sets_the_status_and_a_repeat_changes_nothing(
    service: Service, tasks: str
) -> None:
    task = await service.create("alice")
    path = f"{tasks}/{task['id']}/status"
    for status in ("complete", "incomplete"):
        first = await service.request("PATCH", path, "alice", json={"status": status})
        again = await service.request("PATCH", path, "alice", json={"status": status})
        assert (first.status_code, first.json()["status"]) == (200, status)
        assert first.json()["version"] > task["version"]
        assert again.json() == first.json()


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({}, "required"),
        ({"status": None}, "wrong_type"),
        ({"status": 1}, "wrong_type"),
        ({"status": "pending"}, "invalid_value"),
    ],
)
async def test_status_route_refuses_other_values(
    service: Service, body: dict[str, object], code: str
) -> None:
    task = await service.create("alice")
    answer = await service.request("PATCH", f"/api/tasks/{task['id']}/status", "alice", json=body)
    message = "Invalid status value. Must be incomplete or complete"
    assert answer.status_code == 400
    assert answer.json() == invalid_fields({"status": message}, {"status": code})
    completed = {"status": "complete", "completed": True}
    other = await service.request(
        "PATCH", f"/api/tasks/{task['id']}/status", "alice", json=completed
    )
    assert other.json()["codes"] == {"completed": "unknown_field"}
