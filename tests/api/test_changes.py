"""The feed of changes: a client that follows it has the same tasks as the server."""

import asyncio
from typing import Any

import httpx2
import psycopg
import pytest

from support.problems import problem
from support.service import Service, bearer
from support.waiting import until
from todo_api.tasks import owned_tasks, waiting
from todo_api.tasks.changes import Cursor

PATHS = ["/api/tasks/changes", "/api/alice/tasks/changes"]
EXPIRED = problem(
    "cursor_expired", "The cursor is too old, or from before an erasure: start over, without since"
)
INVALID = problem(
    "invalid_parameter", "Invalid since value. Must be the cursor of an earlier answer"
)


async def changes(
    service: Service, since: str | None = None, user: str = "alice", **parameters: Any
) -> dict[str, Any]:
    """Return an answer of the feed."""
    params = parameters | ({} if since is None else {"since": since})
    response = await service.request("GET", PATHS[0], user, params=params)
    assert response.status_code == 200, response.text
    assert response.headers["cache-control"] == "no-store"
    assert "etag" not in response.headers
    body: dict[str, Any] = response.json()
    assert set(body) == {"changes", "cursor", "more"}
    return body


class Follower:
    """A client with a copy of a user's tasks."""

    def __init__(self, service: Service, user: str = "alice", limit: int = 200) -> None:
        self._service, self._user, self._limit = service, user, limit
        self.cursor: str | None = None
        self.tasks: dict[int, dict[str, Any]] = {}

    async def follow(self) -> list[dict[str, Any]]:
        """Bring the copy up to date, and return what was new."""
        seen = []
        while True:
            page = await changes(self._service, self.cursor, self._user, limit=self._limit)
            self.cursor = page["cursor"]
            seen += page["changes"]
            for change in page["changes"]:
                if "deleted" in change:
                    assert set(change) == {"deleted", "version"}
                    self.tasks.pop(change["deleted"], None)
                else:
                    self.tasks[change["task"]["id"]] = change["task"]
            if not page["more"]:
                return seen

    async def assert_equal(self) -> None:
        listed = await self._service.request("GET", "/api/tasks", self._user)
        assert self.tasks == {task["id"]: task for task in listed.json()}


@pytest.mark.parametrize("limit", [1, 2, 200])
async def test_follower_has_the_same_tasks(service: Service, limit: int) -> None:
    follower = Follower(service, limit=limit)
    assert await follower.follow() == []
    first, second, third = [await service.create("alice", title=title) for title in "abc"]
    assert await follower.follow() == [{"task": task} for task in (first, second, third)]
    await service.request("PUT", f"/api/tasks/{first['id']}", "alice", json={"title": "A"})
    await service.request("PUT", f"/api/tasks/{first['id']}", "alice", json={"title": "AA"})
    await service.request("DELETE", f"/api/tasks/{second['id']}", "alice")
    await service.create("bob")
    seen = await follower.follow()
    assert [change.get("deleted") for change in seen] == [None, second["id"]]
    assert seen[0]["task"]["title"] == "AA"
    await follower.assert_equal()
    operations = [
        {"op": "delete", "id": first["id"]},
        {"op": "create", "task": {"title": "d"}},
        {"op": "complete", "id": third["id"]},
    ]
    body = {"operations": operations}
    await service.request("POST", "/api/tasks/batch", "alice", json=body)
    seen = await follower.follow()
    assert [change.get("version") or change["task"]["version"] for change in seen] == sorted(
        change.get("version") or change["task"]["version"] for change in seen
    )
    assert len(seen) == 3
    await follower.assert_equal()
    assert await follower.follow() == []


async def test_user_who_never_wrote_has_no_changes(service: Service) -> None:
    first = await changes(service)
    assert (first["changes"], first["more"]) == ([], False)
    task = await service.create("alice")
    second = await changes(service, first["cursor"])
    assert second["changes"] == [{"task": task}]


async def test_write_that_changes_nothing_is_no_change(service: Service) -> None:
    task = await service.create("alice")
    cursor = (await changes(service))["cursor"]
    await service.request(
        "PATCH", f"/api/tasks/{task['id']}/status", "alice", json={"status": "incomplete"}
    )
    after = await changes(service, cursor)
    assert after["changes"] == []
    assert (await changes(service, after["cursor"]))["cursor"] == after["cursor"]


async def test_cursor_from_before_an_erasure_is_gone(service: Service) -> None:
    await service.create("alice")
    await service.create("alice")
    complete = (await changes(service))["cursor"]
    partial = (await changes(service, limit=1))["cursor"]
    await service.request("DELETE", "/api/account", "alice")
    for cursor in (complete, partial):
        answer = await service.request("GET", PATHS[0], "alice", params={"since": cursor})
        assert (answer.status_code, answer.json()) == (410, EXPIRED)
    assert (await changes(service))["changes"] == []


async def test_cursor_from_before_a_new_beginning_is_gone(
    service: Service, sql: psycopg.Connection
) -> None:
    await service.create("alice")
    await service.create("alice")
    cursors = [(await changes(service))["cursor"], (await changes(service, limit=1))["cursor"]]
    await service.request("DELETE", "/api/account", "alice")
    sql.execute("UPDATE erasures SET tokens_from = now() - interval '1 hour'")
    new = await service.create("alice")
    for cursor in cursors:
        answer = await service.request("GET", PATHS[0], "alice", params={"since": cursor})
        assert (answer.status_code, answer.json()) == (410, EXPIRED)
    assert (await changes(service))["changes"] == [{"task": new}]


async def test_cursor_from_the_future_is_gone(service: Service, sql: psycopg.Connection) -> None:
    """As after a failover that lost commits."""
    await service.create("alice")
    cursor = (await changes(service))["cursor"]
    sql.execute("UPDATE users SET version = version - 1")
    answer = await service.request("GET", PATHS[0], "alice", params={"since": cursor})
    assert (answer.status_code, answer.json()) == (410, EXPIRED)


async def test_cursor_from_before_forgotten_deletions_is_gone(
    service: Service, sql: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only if a deletion was forgotten that the copy does not know of."""
    task, other = await service.create("alice"), await service.create("alice")
    before = (await changes(service))["cursor"]
    partial = (await changes(service, limit=1))["cursor"]
    await service.request("DELETE", f"/api/tasks/{task['id']}", "alice")
    after = (await changes(service))["cursor"]
    sql.execute("UPDATE tombstones SET version = 5")
    sql.execute("UPDATE users SET changes_from = 0")
    monkeypatch.setattr(owned_tasks, "WRITES_PER_CLEANING", 1)
    await service.request("PUT", f"/api/tasks/{other['id']}", "alice", json={"title": "x"})
    assert sql.execute("SELECT changes_from FROM users").fetchone() == (5,)
    assert sql.execute("SELECT count(*) FROM tombstones").fetchone() == (0,)
    assert len((await changes(service, after))["changes"]) == 1
    # Now as if the deletion had its own version, which both cursors are older than.
    sql.execute("UPDATE users SET changes_from = version - 1")
    for cursor in (before, partial):
        answer = await service.request("GET", PATHS[0], "alice", params={"since": cursor})
        assert (answer.status_code, answer.json()) == (410, EXPIRED)


@pytest.mark.parametrize(
    "cursor",
    [
        "",
        "x",
        "AAAA",
        "=",
        "ä",
        "A" * 4000,
        "\0",
        "null",
        "W10",
        "0-0-00",
        "5-5-",
        "1-1-" + "0" * 24,
    ],
)
async def test_forged_cursor_is_refused(service: Service, cursor: str) -> None:
    answer = await service.request("GET", PATHS[0], "alice", params={"since": cursor})
    assert (answer.status_code, answer.json()) == (400, INVALID)


async def test_cursor_is_of_one_user(service: Service) -> None:
    await service.create("alice")
    await service.create("bob")
    cursor = (await changes(service))["cursor"]
    answer = await service.request("GET", PATHS[0], "bob", params={"since": cursor})
    assert (answer.status_code, answer.json()) == (400, INVALID)
    answer = await service.request("GET", PATHS[1], "bob")
    assert answer.status_code == 403


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("limit=0", "Invalid limit value. Must be a number from 1 to 200"),
        ("limit=201", "Invalid limit value. Must be a number from 1 to 200"),
        ("wait=0", "Invalid wait value. Must be a number from 1 to 60"),
        ("wait=61", "Invalid wait value. Must be a number from 1 to 60"),
        ("wait=1.5", "Invalid wait value. Must be a number from 1 to 60"),
        ("wait=1&wait=2", "The query parameter wait must be given at most once"),
        ("status=all", "Unknown query parameter 'status'. Allowed are since, limit and wait"),
    ],
)
async def test_wrong_parameter_is_refused(service: Service, query: str, message: str) -> None:
    answer = await service.request("GET", f"{PATHS[0]}?{query}", "alice")
    assert (answer.status_code, answer.json()) == (400, problem("invalid_parameter", message))


async def waiting_request(
    service: Service, cursor: str, user: str = "alice", seconds: int = 60
) -> httpx2.Response:
    params = {"since": cursor, "wait": str(seconds)}
    return await service.client.get(PATHS[0], params=params, headers=bearer(user), timeout=70)


def waiters_of(service: Service) -> waiting.Waiters:
    """Return the waiting requests of the application behind a client."""
    transport: Any = service.client._transport
    waiters: waiting.Waiters = transport.app._open_tasks.keywords["waiters"]
    return waiters


async def until_waiting(service: Service, count: int) -> None:
    """Wait until so many requests have found nothing and wait."""
    waiters = waiters_of(service)

    def known() -> int:
        every = [one for of_user in waiters._by_user.values() for one in of_user]
        return len([one for one in every if one.version is not None])

    await until(lambda: known() == count)


async def test_waiting_request_gets_the_change(service: Service) -> None:
    task = await service.create("alice")
    cursor = (await changes(service))["cursor"]
    request = asyncio.create_task(waiting_request(service, cursor))
    await until_waiting(service, 1)
    await service.create("bob")
    await service.request("DELETE", f"/api/tasks/{task['id']}", "alice")
    (change,) = (await request).json()["changes"]
    assert change["deleted"] == task["id"]
    assert waiters_of(service).count == 0


async def test_change_from_before_the_wait_is_answered_at_once(service: Service) -> None:
    cursor = (await changes(service))["cursor"]
    task = await service.create("alice")
    assert (await waiting_request(service, cursor)).json()["changes"] == [{"task": task}]


async def test_waiting_request_gets_a_change_of_another_process(
    service: Service, sql: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting, "POLL_SECONDS", 0.05)
    task = await service.create("alice")
    cursor = (await changes(service))["cursor"]
    request = asyncio.create_task(waiting_request(service, cursor))
    await until_waiting(service, 1)
    with sql.transaction():
        sql.execute("UPDATE users SET version = version + 1")
        sql.execute("UPDATE tasks SET title = 'x', version = version + 1")
    (change,) = (await request).json()["changes"]
    assert (change["task"]["id"], change["task"]["title"]) == (task["id"], "x")


async def test_wait_ends_without_a_change(service: Service) -> None:
    await service.create("alice")
    cursor = (await changes(service))["cursor"]
    answer = await waiting_request(service, cursor, seconds=1)
    assert answer.json() == {"changes": [], "cursor": cursor, "more": False}


async def test_no_query_runs_if_nobody_waits(service: Service) -> None:
    cursor = (await changes(service))["cursor"]
    await waiting_request(service, cursor, seconds=1)
    assert waiters_of(service)._watcher is None


async def test_erasure_ends_the_wait(service: Service) -> None:
    await service.create("alice")
    cursor = (await changes(service))["cursor"]
    request = asyncio.create_task(waiting_request(service, cursor))
    await until_waiting(service, 1)
    await service.request("DELETE", "/api/account", "alice")
    answer = await request
    assert (answer.status_code, answer.json()) == (410, EXPIRED)


async def test_waiting_requests_are_bounded(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting, "MAXIMUM_OF_USER", 2)
    monkeypatch.setattr(waiting, "MAXIMUM_OF_PROCESS", 3)
    cursors = {
        user: (await changes(service, user=user))["cursor"] for user in ("alice", "bob", "carol")
    }
    tasks = [
        asyncio.create_task(waiting_request(service, cursors[user], user))
        for user in ("alice", "alice", "bob")
    ]
    await until_waiting(service, 3)
    answer = await waiting_request(service, cursors["alice"])
    assert (answer.status_code, answer.json()["code"]) == (429, "too_many_waiting")
    assert answer.headers["retry-after"] == "1"
    answer = await waiting_request(service, cursors["carol"], "carol")
    assert (answer.status_code, answer.json()["code"]) == (503, "waiting_is_full")
    for user in ("alice", "bob"):
        created = await service.client.post("/api/tasks", json={"title": "x"}, headers=bearer(user))
        assert created.status_code == 201
    assert {answer.status_code for answer in await asyncio.gather(*tasks)} == {200}


async def test_waiting_requests_hold_no_place_and_no_connection(service: Service) -> None:
    cursor = (await changes(service))["cursor"]
    tasks = [asyncio.create_task(waiting_request(service, cursor)) for _ in range(20)]
    await until_waiting(service, 20)
    transport: Any = service.client._transport
    assert transport.app.limits.in_flight == 0
    await service.create("alice")
    assert {len((await each).json()["changes"]) for each in tasks} == {1}


def test_cursor_survives_the_way_through_a_client() -> None:
    cursor = Cursor(7, 8)
    assert Cursor.read(cursor.show("alice"), "alice") == cursor
