"""Retries with an idempotency key: they never write twice, and get the first answer again."""

import asyncio
import time
from typing import Any

import httpx2
import psycopg
import pytest

from support.problems import problem
from support.service import Service, bearer
from support.waiting import until, waiting_for_locks
from todo_api.tasks import owned_tasks

JSON = {"Content-Type": "application/json"}
KEY = {"Idempotency-Key": "key-1"}
REUSED = problem(
    "idempotency_key_reused", "This Idempotency-Key was used with another method, path or body"
)
WRITES: list[tuple[str, str, dict[str, Any]]] = [
    ("PUT", "", {"json": {"title": "y"}}),
    ("PATCH", "", {"json": {"title": "y"}}),
    ("PATCH", "/complete", {}),
    ("PATCH", "/status", {"json": {"status": "complete"}}),
    ("DELETE", "", {}),
]


def parts(answer: httpx2.Response) -> tuple[Any, ...]:
    """Return what a replay has to repeat."""
    return (
        answer.status_code,
        answer.content,
        answer.headers.get("etag"),
        answer.headers.get("location"),
    )


@pytest.mark.parametrize("tasks", ["/api/tasks", "/api/alice/tasks"])
async def test_repeated_creation_makes_one_task(
    service: Service, sql: psycopg.Connection, tasks: str
) -> None:
    """Also for a new user, and whatever has happened to the task since."""
    body = {"title": "once"}
    first = await service.request("POST", tasks, "alice", headers=KEY, json=body)
    assert first.status_code == 201
    assert "idempotency-replayed" not in first.headers
    await service.request("DELETE", f"/api/tasks/{first.json()['id']}", "alice")
    again = await service.request("POST", tasks, "alice", headers=KEY, json=body)
    assert parts(again) == parts(first)
    assert again.headers["idempotency-replayed"] == "true"
    assert sql.execute("SELECT count(*) FROM tasks").fetchone() == (0,)


@pytest.mark.parametrize(("verb", "tail", "options"), WRITES)
async def test_repeated_write_happens_once(
    service: Service, verb: str, tail: str, options: dict[str, Any]
) -> None:
    task = await service.create("alice")
    path = f"/api/tasks/{task['id']}"
    first = await service.request(verb, path + tail, "alice", headers=KEY, **options)
    assert first.status_code in {200, 204}
    if verb != "DELETE":
        await service.request("PUT", path, "alice", json={"title": "later"})
    again = await service.request(verb, path + tail, "alice", headers=KEY, **options)
    assert parts(again) == parts(first)
    assert again.headers["idempotency-replayed"] == "true"
    if verb != "DELETE":
        assert (await service.request("GET", path, "alice")).json()["title"] == "later"


@pytest.mark.parametrize(("verb", "tail", "options"), WRITES)
async def test_keyed_write_that_finds_no_task_stores_nothing(
    service: Service, sql: psycopg.Connection, verb: str, tail: str, options: dict[str, Any]
) -> None:
    """The request of a user without tasks leaves no trace of them."""
    answer = await service.request(verb, f"/api/tasks/1{tail}", "alice", headers=KEY, **options)
    assert (answer.status_code, answer.json()["code"]) == (404, "task_not_found")
    assert sql.execute("SELECT id FROM users UNION SELECT user_id FROM answers").fetchall() == []


@pytest.mark.parametrize("body", [{"title": "y"}, {"title": "z"}])
async def test_token_from_before_an_erasure_gets_no_stored_answer(
    service: Service, sql: psycopg.Connection, body: dict[str, str]
) -> None:
    """Nor the error that the key belongs to another request."""
    await service.request("DELETE", "/api/account", "alice")
    sql.execute("UPDATE erasures SET tokens_from = now() - interval '2 seconds'")
    path = f"/api/tasks/{(await service.create('alice'))['id']}"
    first = await service.request("PUT", path, "alice", headers=KEY, json={"title": "y"})
    assert first.status_code == 200
    headers = {**bearer("alice", iat=int(time.time()) - 60), **KEY}
    void = await service.request("PUT", path, headers=headers, json=body)
    assert (void.status_code, void.json()["code"]) == (401, "token_invalid")


async def test_simultaneous_requests_with_one_key_make_one_task(
    service: Service, sql: psycopg.Connection
) -> None:
    async def create() -> httpx2.Response:
        headers = {**bearer("alice"), **KEY}
        return await service.client.post("/api/tasks", headers=headers, json={"title": "x"})

    answers = await asyncio.gather(*(create() for _ in range(50)))
    assert {parts(answer) for answer in answers} == {parts(answers[0])}
    replayed = [answer.headers.get("idempotency-replayed") for answer in answers]
    assert replayed.count("true") == 49
    assert sql.execute("SELECT count(*) FROM tasks").fetchone() == (1,)


async def test_simultaneous_requests_with_one_key_change_the_task_of_a_new_user_once(
    service: Service, sql: psycopg.Connection, database_url: str
) -> None:
    """They find no row of the user to lock, because another process makes it meanwhile."""

    async def change() -> httpx2.Response:
        headers = {**bearer("alice"), **KEY}
        return await service.client.put("/api/tasks/7", headers=headers, json={"title": "y"})

    with psycopg.connect(database_url) as table, psycopg.connect(database_url) as row:
        table.execute("LOCK TABLE answers IN SHARE MODE")
        requests = asyncio.gather(change(), change())
        await until(lambda: waiting_for_locks(sql) == 2)
        sql.execute("INSERT INTO users (id, version) VALUES ('alice', 1)")
        sql.execute(
            "INSERT INTO tasks (user_id, id, title, version)"
            " OVERRIDING SYSTEM VALUE VALUES ('alice', 7, 'x', 1)"
        )
        row.execute("SELECT FROM users FOR UPDATE")
        table.rollback()
        await until(lambda: waiting_for_locks(sql) == 2)
        row.rollback()
        answers = await requests
    assert [answer.status_code for answer in answers] == [200, 200]
    assert parts(answers[0]) == parts(answers[1])
    replayed = [answer.headers.get("idempotency-replayed") for answer in answers]
    assert sorted(replayed, key=str) == [None, "true"]
    assert sql.execute("SELECT title, version FROM tasks").fetchall() == [
        ("y", answers[0].json()["version"])
    ]


async def test_key_of_another_request_is_refused(service: Service, sql: psycopg.Connection) -> None:
    task = await service.create("alice")
    path = f"/api/tasks/{task['id']}"
    await service.request("PUT", path, "alice", headers=KEY, json={"title": "y"})
    others: list[tuple[str, str, dict[str, Any]]] = [
        ("PUT", path, {"json": {"title": "z"}}),
        (
            "PUT",
            path,
            {"content": b'{ "title":"y"}', "headers": JSON},
        ),
        ("PATCH", path, {"json": {"title": "y"}}),
        ("PUT", f"/api/alice/tasks/{task['id']}", {"json": {"title": "y"}}),
        ("POST", "/api/tasks", {"json": {"title": "y"}}),
        ("DELETE", path, {}),
    ]
    for verb, other, options in others:
        headers = {**KEY, **options.pop("headers", {})}
        answer = await service.request(verb, other, "alice", headers=headers, **options)
        assert (answer.status_code, answer.json()) == (422, REUSED), (verb, other)
    assert sql.execute("SELECT title FROM tasks").fetchall() == [("y",)]


async def test_keys_of_two_users_never_meet(service: Service) -> None:
    answers = [
        await service.request("POST", "/api/tasks", user, headers=KEY, json={"title": user})
        for user in ("alice", "bob", "alice", "bob")
    ]
    assert [answer.json()["user_id"] for answer in answers] == ["alice", "bob"] * 2
    assert [answer.json()["title"] for answer in answers] == ["alice", "bob"] * 2


async def test_failure_stores_nothing(service: Service, sql: psycopg.Connection) -> None:
    task = await service.create("alice")
    path = f"/api/tasks/{task['id']}"
    for verb, address, headers, status in (
        ("PUT", "/api/tasks/999999", {}, 404),
        ("PUT", path, {"If-Match": '"1"'}, 412),
    ):
        body = {"title": "y"}
        answer = await service.request(
            verb, address, "alice", headers={**KEY, **headers}, json=body
        )
        assert answer.status_code == status
    assert sql.execute("SELECT count(*) FROM answers").fetchone() == (0,)
    good = await service.request("PUT", path, "alice", headers=KEY, json={"title": "y"})
    assert good.status_code == 200


async def test_erasure_removes_the_keys_of_its_user_alone(
    service: Service, sql: psycopg.Connection
) -> None:
    for user in ("alice", "bob"):
        await service.request("POST", "/api/tasks", user, headers=KEY, json={"title": "x"})
    assert (await service.request("DELETE", "/api/account", "alice")).status_code == 204
    assert sql.execute("SELECT user_id FROM answers").fetchall() == [("bob",)]


async def test_expired_key_is_as_good_as_new(service: Service, sql: psycopg.Connection) -> None:
    body = {"title": "x"}
    first = await service.request("POST", "/api/tasks", "alice", headers=KEY, json=body)
    sql.execute("UPDATE answers SET created_at = now() - interval '24 hours 1 second'")
    second = await service.request("POST", "/api/tasks", "alice", headers=KEY, json=body)
    assert second.json()["id"] != first.json()["id"]
    assert "idempotency-replayed" not in second.headers
    assert sql.execute("SELECT count(*) FROM answers").fetchone() == (1,)


async def test_writes_remove_expired_answers_in_small_steps(
    service: Service, sql: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    await service.request("POST", "/api/tasks", "alice", headers=KEY, json={"title": "x"})
    sql.execute("""
        INSERT INTO answers (user_id, key, request_hash, body, created_at)
        SELECT owner, n, '', '', now() - age FROM generate_series(1, 625) AS n,
        (VALUES ('alice', interval '2 days'), ('bob', interval '2 days')) AS each (owner, age)
    """)
    monkeypatch.setattr(owned_tasks, "WRITES_PER_CLEANING", 1)
    counts = []
    for _ in range(4):
        await service.create("alice")
        query = "SELECT count(*) FROM answers WHERE user_id = 'alice'"
        counts.append(sql.execute(query).fetchone())
    assert counts == [(376,), (126,), (1,), (1,)]
    assert sql.execute("SELECT count(*) FROM answers WHERE user_id = 'bob'").fetchone() == (625,)


@pytest.mark.parametrize("same", ["key-1", '"key-1"', ' "key-1"', "key-1\t"])
async def test_key_is_the_same_with_quotes_and_without(service: Service, same: str) -> None:
    body = {"title": "x"}
    first = await service.request("POST", "/api/tasks", "alice", headers=KEY, json=body)
    headers = [("Idempotency-Key", same)]
    again = await service.request("POST", "/api/tasks", "alice", headers=headers, json=body)
    assert parts(again) == parts(first)


@pytest.mark.parametrize(
    "keys", [[""], ['"'], ['""'], ["a b"], ["x" * 256], ["é"], ["a", "a"], ['"a'], ["a\x7f"]]
)
async def test_invalid_key_is_refused(service: Service, keys: list[str]) -> None:
    headers = [(b"Idempotency-Key", key.encode("latin-1")) for key in keys]
    signed = [(name.encode(), value.encode()) for name, value in bearer("alice").items()]
    answer = await service.client.post(
        "/api/tasks", headers=[*headers, *signed], json={"title": "x"}
    )
    message = "Send one Idempotency-Key of 1 to 255 visible ASCII characters, in quotes or without"
    assert (answer.status_code, answer.json()) == (400, problem("invalid_parameter", message))


async def test_void_token_gets_no_stored_answer(service: Service) -> None:
    body = {"title": "x"}
    await service.request("POST", "/api/tasks", "alice", headers=KEY, json=body)
    await service.request("DELETE", "/api/account", "alice")
    answer = await service.request("POST", "/api/tasks", "alice", headers=KEY, json=body)
    assert answer.status_code == 401
