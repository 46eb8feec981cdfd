"""Concurrent requests: writes are linearizable, none is lost, and users see only their own rows."""

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from contextlib import suppress
from typing import Any

import httpx2
import psycopg
import pytest

from support.history import History, Operation
from support.listening import Listening, listening
from support.service import settings
from support.waiting import until
from support.watching import assert_pool_is_whole, backends
from todo_api.database.database import Database
from todo_api.database.statement import Statement

SEED = 20261121


@pytest.fixture
async def service(database_url: str) -> AsyncIterator[Listening]:
    async with listening(database_url, pool_size=8, pool_timeout=30) as running:
        yield running


def operation(kind: Any, invoked: int, answered: int | None, version: str | None) -> Operation:
    """Return an operation whose value is its version in capitals."""
    return Operation(kind, invoked, (version or "open").upper(), version, answered)


LEGAL = [
    [operation("write", 0, 1, "a"), operation("read", 2, 3, "a")],
    # Two concurrent writes in either order. A concurrent read may see a write or not.
    [operation("write", 0, 3, "b"), operation("write", 1, 2, "a"), operation("read", 4, 5, "b")],
    [operation("write", 0, 1, "a"), operation("write", 2, 5, "b"), operation("read", 3, 4, "a")],
    [operation("write", 0, 1, "a"), operation("write", 2, 5, "b"), operation("read", 3, 4, "b")],
    # An open write may have happened, or not.
    [
        operation("write", 0, 1, "a"),
        operation("write", 2, None, None),
        operation("read", 3, 4, "a"),
    ],
    [Operation("write", 0, "A"), operation("read", 1, 2, "a"), operation("read", 3, 4, "a")],
]
ILLEGAL = [
    # A stale read, a read of a later write, an unknown value, and a value that was not written.
    [operation("write", 0, 1, "a"), operation("write", 2, 3, "b"), operation("read", 4, 5, "a")],
    [operation("read", 0, 1, "a"), operation("write", 2, 3, "a")],
    [operation("write", 0, 1, "a"), operation("read", 2, 3, "b")],
    [operation("write", 0, 1, "a"), Operation("read", 2, "B", "a", 3)],
    # The second read is older than the first, a version is lower, and a version is used twice.
    [
        *(operation("write", 0, 1, "a"), operation("write", 2, 9, "b")),
        *(operation("read", 3, 4, "b"), operation("read", 5, 6, "a")),
    ],
    [operation("write", 0, 1, "b"), operation("write", 2, 3, "a")],
    [operation("write", 0, 1, "a"), Operation("write", 2, "B", "a", 3)],
    # A read sees an open write before it began, and an open write happened twice.
    [operation("read", 0, 1, "a"), Operation("write", 2, "A")],
    [Operation("write", 0, "A"), operation("read", 1, 2, "a"), Operation("read", 3, "A", "b", 4)],
]


@pytest.mark.parametrize("operations", LEGAL)
def test_checker_accepts_a_linearizable_history(operations: list[Operation]) -> None:
    assert History(operations).violation() is None


@pytest.mark.parametrize("operations", ILLEGAL)
def test_checker_refuses_a_history_that_is_not_linearizable(operations: list[Operation]) -> None:
    assert History(operations).violation() is not None


class Register:
    """The title of one task, with a history of all reads and writes."""

    def __init__(self, task: dict[str, Any]) -> None:
        self.path = f"/api/tasks/{task['id']}"
        self.history = History()
        first = self.history.invoke("write", task["title"])
        self.history.answer(first, task["title"], task["updated_at"])

    async def write(self, service: Listening, title: str) -> None:
        entry = self.history.invoke("write", title)
        answer = await service.request("PUT", self.path, "alice", json={"title": title})
        self.record(entry, answer)

    async def read(self, service: Listening) -> None:
        entry = self.history.invoke("read")
        self.record(entry, await service.request("GET", self.path, "alice"))

    def record(self, entry: Operation, answer: httpx2.Response) -> None:
        assert answer.status_code == 200, answer.text
        task = answer.json()
        self.history.answer(entry, task["title"], task["updated_at"])

    async def write_and_hang_up(self, service: Listening, title: str, steps: int) -> None:
        """Cancel a write after these steps of the event loop, so that its outcome is unknown."""
        writing = asyncio.create_task(self.write(service, title))
        for _ in range(steps):
            await asyncio.sleep(0)
        writing.cancel()
        with suppress(asyncio.CancelledError):
            await writing


async def test_writes_are_linearizable_while_clients_hang_up(
    service: Listening, sql: psycopg.Connection
) -> None:
    register = Register(await service.create("alice", title="first"))
    draw = random.Random(SEED)  # noqa: S311

    async def write(name: int) -> None:
        for number in range(40):
            title = f"{name}.{number}"
            if draw.random() < 0.1:
                await register.write_and_hang_up(service, title, draw.randrange(1, 30))
            else:
                await register.write(service, title)

    async def read() -> None:
        for _ in range(40):
            await register.read(service)

    await asyncio.gather(*(write(name) for name in range(16)), *(read() for _ in range(4)))
    await until(lambda: not backends(sql, "active"))
    await register.read(service)
    history = register.history
    assert history.open_operations()
    assert history.violation() is None
    (final,) = sql.execute("SELECT title FROM tasks").fetchall()
    assert final[0] == history.operations[-1].value
    await assert_pool_is_whole(service, sql, 8)


async def test_concurrent_writes_to_different_fields_all_survive(service: Listening) -> None:
    task = await service.create("alice")
    path = f"/api/tasks/{task['id']}"
    values: dict[str, list[Any]] = {
        "title": [f"title {number}" for number in range(31)],
        "description": [f"text {number}" for number in range(31)],
        "priority": ["low", "medium", "high"] * 10 + ["low"],
        "due_date": [f"2026-12-{day:02}T00:00:00.000000Z" for day in range(1, 32)],
        "completed": [True, False] * 15 + [True],
    }

    async def write(field: str) -> None:
        for value in values[field]:
            answer = await service.request("PUT", path, "alice", json={field: value})
            # Only this writer writes this field, so every answer shows the value just written.
            assert answer.json()[field] == value

    await asyncio.gather(*map(write, values))
    final = (await service.request("GET", path, "alice")).json()
    assert {field: final[field] for field in values} == {f: v[-1] for f, v in values.items()}


async def test_odd_number_of_concurrent_toggles_completes_the_task(service: Listening) -> None:
    task = await service.create("alice")
    path = f"/api/tasks/{task['id']}"
    answers = await asyncio.gather(
        *(service.request("PATCH", f"{path}/complete", "alice") for _ in range(51))
    )
    seen = sorted((answer.json() for answer in answers), key=lambda each: each["updated_at"])
    assert [each["completed"] for each in seen] == [True, False] * 25 + [True]
    assert len({each["updated_at"] for each in seen} | {task["updated_at"]}) == 52
    assert (await service.request("GET", path, "alice")).json() == seen[-1]


async def test_updated_at_grows_with_every_write_after_the_clock_stepped_back(
    service: Listening, sql: psycopg.Connection
) -> None:
    """The last `updated_at` came from a clock that was a day ahead."""
    task = await service.create("alice")
    sql.execute("UPDATE tasks SET updated_at = now() + interval '1 day'")
    path = f"/api/tasks/{task['id']}"
    before = (await service.request("GET", path, "alice")).json()["updated_at"]
    writes = [
        service.request("PATCH", f"{path}/complete", "alice")
        if number % 2
        else service.request("PUT", path, "alice", json={"title": f"title {number}"})
        for number in range(40)
    ]
    times = [(await each).json()["updated_at"] for each in asyncio.as_completed(writes)]
    assert len(set(times)) == 40
    assert min(times) > before
    assert (await service.request("GET", path, "alice")).json()["updated_at"] == max(times)


async def test_deleted_task_never_comes_back(service: Listening, sql: psycopg.Connection) -> None:
    """Only one of several deletions gets 204, and later writes get 404."""
    for _ in range(10):
        task = await service.create("alice")
        path = f"/api/tasks/{task['id']}"
        deleted = asyncio.Event()

        async def remove(path: str = path, deleted: asyncio.Event = deleted) -> int:
            answer = await service.request("DELETE", path, "alice")
            deleted.set()
            return answer.status_code

        async def write(
            number: int, path: str = path, deleted: asyncio.Event = deleted
        ) -> list[tuple[bool, int]]:
            seen: list[tuple[bool, int]] = []
            while not seen or not seen[-1][0]:
                too_late = deleted.is_set()
                if number % 2:
                    answer = await service.request("PATCH", f"{path}/complete", "alice")
                else:
                    answer = await service.request("PUT", path, "alice", json={"title": "back"})
                seen.append((too_late, answer.status_code))
            return seen

        writing = [asyncio.create_task(write(number)) for number in range(6)]
        removed = await asyncio.gather(*(remove() for _ in range(6)))
        assert Counter(removed) == {204: 1, 404: 5}
        for seen in await asyncio.gather(*writing):
            assert seen[-1] == (True, 404)
            assert {status for _, status in seen} <= {200, 404}
    assert sql.execute("SELECT count(*) FROM tasks").fetchone() == (0,)


async def test_concurrent_creations_get_distinct_ids_and_appear_in_the_list(
    service: Listening, sql: psycopg.Connection
) -> None:
    async def create_and_look(number: int) -> int:
        user = f"user {number % 4}"
        created: int = (await service.create(user, title=f"task {number}"))["id"]
        listed = (await service.request("GET", "/api/tasks", user)).json()
        assert [each["title"] for each in listed if each["id"] == created] == [f"task {number}"]
        return created

    created = await asyncio.gather(*map(create_and_look, range(200)))
    assert len(set(created)) == 200
    stored = sql.execute("SELECT id, user_id, title FROM tasks").fetchall()
    assert sorted(row[0] for row in stored) == sorted(created)
    assert {(user, title) for _, user, title in stored} == {
        (f"user {number % 4}", f"task {number}") for number in range(200)
    }


def seed(sql: psycopg.Connection, users: int, tasks: int) -> dict[str, list[int]]:
    """Insert users with tasks that have the user's name in the title, and return the ids."""
    sql.execute(
        "INSERT INTO users (id, version) SELECT 'user ' || n, 1 FROM generate_series(1, %s) n",
        [users],
    )
    rows = sql.execute(
        "INSERT INTO tasks (user_id, title, version) SELECT id, 'of ' || id, 1 FROM users"
        " CROSS JOIN generate_series(1, %s) RETURNING user_id, id",
        [tasks],
    ).fetchall()
    owned: dict[str, list[int]] = {}
    for user, task in rows:
        owned.setdefault(user, []).append(task)
    return owned


async def hang_up_now_and_then(
    draw: random.Random, request: asyncio.Task[httpx2.Response]
) -> httpx2.Response | None:
    """Wait for the answer, or cancel the request after a few steps of the event loop."""
    if draw.random() < 0.3:
        for _ in range(draw.randrange(1, 40)):
            await asyncio.sleep(0)
        request.cancel()
    try:
        return await request
    except asyncio.CancelledError:
        return None


async def test_clients_that_hang_up_leak_neither_connections_nor_rows(
    database_url: str, sql: psycopg.Connection
) -> None:
    """64 users with 64 tasks each share two connections, and hang up on a third of the requests."""
    owned = seed(sql, 64, 64)
    draw = random.Random(SEED)  # noqa: S311
    cut: list[str] = []

    async def use(service: Listening, user: str) -> None:
        for task in draw.sample(owned[user], 5):
            path = f"/api/tasks/{task}"
            strangers = f"/api/tasks/{draw.choice(owned[draw.choice(sorted(set(owned) - {user}))])}"
            for verb, where, body in (
                ("GET", "/api/tasks", None),
                ("PUT", path, {"description": f"by {user}"}),
                ("GET", strangers, None),
                ("PATCH", f"{path}/complete", None),
            ):
                sending = asyncio.create_task(service.request(verb, where, user, json=body))
                answer = await hang_up_now_and_then(draw, sending)
                if answer is None:
                    cut.append(where)
                elif where == strangers:
                    assert answer.status_code == 404
                else:
                    assert answer.status_code == 200, answer.text
                    assert_own(answer, user)

    async with listening(database_url, pool_size=2, pool_timeout=30) as service:
        await asyncio.gather(*(use(service, user) for user in owned))
        assert len(cut) > 100
        await assert_pool_is_whole(service, sql, 2)
    wrong = "SELECT count(*) FROM tasks WHERE description <> 'by ' || user_id"
    assert sql.execute(wrong).fetchone() == (0,)


def assert_own(answer: httpx2.Response, user: str) -> None:
    """Check that every task in the answer belongs to the user."""
    said = answer.json()
    tasks: Iterable[dict[str, Any]] = said if isinstance(said, list) else [said]
    assert {(each["user_id"], each["title"]) for each in tasks} == {(user, f"of {user}")}
    assert len(said) == 64 or isinstance(said, dict)


WHO = Statement(
    b"who",
    b"SELECT current_user || ' ' || coalesce(current_setting('app.user_id', true), '')"
    b" || coalesce($1::text, '')",
    ("nothing",),
    writes=False,
)


async def test_cancelled_statement_does_not_leave_its_owner_on_the_connection(
    database_url: str,
) -> None:
    database = Database(database_url, settings(pool_size=2, pool_timeout=30))
    await database.open()
    draw = random.Random(SEED)  # noqa: S311

    async def ask(user: str) -> int:
        cancelled = 0
        for _ in range(64):
            asking = asyncio.create_task(database.run(user, WHO, {"nothing": None}))
            if draw.random() < 0.3:
                for _ in range(draw.randrange(5)):
                    await asyncio.sleep(0)
                asking.cancel()
            try:
                assert await asking == [f"todo_member {user}".encode()]
            except asyncio.CancelledError:
                cancelled += 1
        return cancelled

    assert sum(await asyncio.gather(*(ask(f"user-{number}") for number in range(64)))) > 100
    await until(lambda: len(database.pool._idle) == len(database.pool._open))
    bare = [(WHO, WHO.bind({"nothing": None}))]
    answers = await asyncio.gather(*(database._attempt(bare) for _ in range(2)))
    assert [answer.rows for answer in answers] == [[b"postgres "]] * 2
    database.close()


async def test_replica_keeps_every_acknowledged_write_when_it_shuts_down(
    database_url: str, sql: psycopg.Connection
) -> None:
    """Two replicas share one history. Clients of the stopped replica move to the other."""
    created: list[int] = []
    async with listening(database_url) as leaving, listening(database_url) as staying:
        register = Register(await staying.create("alice", title="first"))
        served = Counter[Listening]()

        async def write(name: int) -> None:
            replica = leaving if name % 2 else staying
            number = 0
            while served[staying] < 300:
                number += 1
                try:
                    await register.write(replica, f"{name}.{number}")
                    created.append((await replica.create("bob"))["id"])
                except httpx2.TransportError:
                    assert replica is leaving
                    replica = staying
                served[replica] += 1

        async def shut_down() -> None:
            await until(lambda: served[leaving] > 20 and served[staying] > 20)
            await leaving.stop()

        await asyncio.gather(*(write(name) for name in range(8)), shut_down())
        await register.read(staying)
    assert register.history.violation() is None
    rows = sql.execute("SELECT id FROM tasks WHERE user_id = 'bob'").fetchall()
    stored = {row[0] for row in rows}
    assert len(set(created)) == len(created) > 100
    assert set(created) <= stored
