"""A real PgBouncer in transaction mode: all users share two sessions, and their rows stay apart."""

import asyncio
import random
from collections import Counter
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import httpx2
import psycopg
import pytest

from support import pooler
from support.listening import Listening, listening
from support.pooler import pooled
from support.requirements import need

need(pooler.missing())

SEED = 20261121
USERS = 64
ROUNDS = 4

follows_prepared_statements = pytest.mark.skipif(
    pooler.version() < pooler.PREPARES_FROM,
    reason="this PgBouncer is older than 1.21 and does not support prepared statements",
)


@pytest.fixture
def owned(sql: psycopg.Connection) -> dict[str, list[int]]:
    """Tasks of every user. The title of each is the name of its user."""
    sql.execute(
        "INSERT INTO users (id, version) SELECT 'user ' || n, 1 FROM generate_series(1, %s) n",
        [USERS],
    )
    rows = sql.execute(
        "INSERT INTO tasks (user_id, title, version) SELECT id, id, 1 FROM users"
        " CROSS JOIN generate_series(1, 8) RETURNING user_id, id"
    ).fetchall()
    tasks: dict[str, list[int]] = {}
    for user, task in rows:
        tasks.setdefault(user, []).append(task)
    return tasks


class Crowd:
    """All users at the same time. It checks the tasks in each answer and counts the statuses."""

    def __init__(self, service: Listening, owned: dict[str, list[int]], rounds: int) -> None:
        self._service = service
        self._rounds = rounds
        self._owned = owned
        self._draw = random.Random(SEED)  # noqa: S311
        self.statuses: Counter[int] = Counter()

    async def come(self) -> None:
        """Send the requests of all users at the same time. Each user sends one at a time."""
        await asyncio.gather(*map(self._use, self._owned))

    async def _use(self, user: str) -> None:
        strangers = [each for each in self._owned if each != user]
        for _ in range(self._rounds):
            own = self._draw.choice(self._owned[user])
            foreign = self._draw.choice(self._owned[self._draw.choice(strangers)])
            await self._ask("GET", "/api/tasks", user)
            await self._ask("PUT", f"/api/tasks/{own}", user, {"description": user})
            await self._ask("GET", f"/api/tasks/{own}", user)
            await self._ask("PATCH", f"/api/tasks/{own}/complete", user)
            await self._ask("PUT", f"/api/tasks/{foreign}", user, {"description": user})

    async def _ask(
        self, verb: str, path: str, user: str, body: dict[str, Any] | None = None
    ) -> None:
        answer = await self._service.request(verb, path, user, json=body)
        self.statuses[answer.status_code] += 1
        if answer.status_code == 200:
            assert owners(answer) == {(user, user)}


def owners(answer: httpx2.Response) -> set[tuple[str, str]]:
    """Return the owner and the title of each task in an answer."""
    said = answer.json()
    tasks = said if isinstance(said, list) else [said]
    return {(task["user_id"], task["title"]) for task in tasks}


def mixed(sql: psycopg.Connection) -> int:
    """Count the tasks that another user has changed."""
    row = sql.execute("SELECT count(*) FROM tasks WHERE description <> user_id").fetchone()
    assert row is not None
    counted: int = row[0]
    return counted


def assert_sessions_are_clean(url: str, size: int) -> None:
    """Check that no session of the pooler still has a role or an owner set."""
    query = "SELECT current_user, current_setting('app.user_id', true), pg_backend_pid()"
    clients = [psycopg.connect(url, prepare_threshold=None) for _ in range(size)]
    rows = [client.execute(query).fetchone() for client in clients]
    for client in clients:
        client.close()
    assert len({row[2] for row in rows if row}) == size
    assert {row[:2] for row in rows if row} <= {("postgres", ""), ("postgres", None)}


@pytest.mark.parametrize(
    ("prepared", "size"),
    [
        pytest.param(False, 2, id="without"),
        pytest.param(True, 2, id="with", marks=follows_prepared_statements),
    ],
)
async def test_users_that_share_two_sessions_see_only_their_own_tasks(
    database_url: str,
    short_folder: Path,
    sql: psycopg.Connection,
    owned: dict[str, list[int]],
    prepared: bool,
    size: int,
) -> None:
    kept = 200 if prepared else 0
    async with (
        pooled(database_url, short_folder, size=size, prepared_statements=kept) as url,
        listening(url, pool_size=16, pool_timeout=30, prepared_statements=prepared) as service,
    ):
        crowd = Crowd(service, owned, ROUNDS)
        await crowd.come()
        assert crowd.statuses == {200: 4 * ROUNDS * USERS, 404: ROUNDS * USERS}
        await service.stop()
        await asyncio.to_thread(assert_sessions_are_clean, url, size)
    assert mixed(sql) == 0


@pytest.mark.parametrize(
    "values",
    [
        pytest.param({"statement_timeout": 0.5}, id="longer than the statement timeout"),
        pytest.param({"request_timeout": 2}, id="longer than the request timeout"),
        pytest.param({"query_wait_timeout": 1}, id="longer than the pooler's wait timeout"),
    ],
)
async def test_service_answers_in_time_during_a_pause_and_recovers(
    database_url: str, short_folder: Path, owned: dict[str, list[int]], values: dict[str, float]
) -> None:
    wait = int(values.pop("query_wait_timeout", 120))
    few = dict(list(owned.items())[:8])
    async with (
        pooled(database_url, short_folder, size=2, query_wait_timeout=wait) as url,
        listening(url, pool_size=4, prepared_statements=False, **values) as service,
    ):
        await Crowd(service, few, 1).come()
        await pooler.command(url, "PAUSE")
        for answer in await asyncio.gather(*(change(service, few, user) for user in few)):
            assert answer.status_code in {500, 503}
            assert list(answer.json()) == ["error", "detail", "code"]
            assert int(answer.headers["retry-after"]) > 0
        await pooler.command(url, "RESUME")
        await until_answered(service)
        await pooler.command(url, "RECONNECT")
        await until_answered(service)
        crowd = Crowd(service, few, 1)
        await crowd.come()
        assert crowd.statuses == {200: 4 * len(few), 404: len(few)}


def change(
    service: Listening, owned: dict[str, list[int]], user: str
) -> Coroutine[Any, Any, httpx2.Response]:
    path = f"/api/tasks/{owned[user][0]}"
    return service.request("PUT", path, user, json={"description": user})


async def until_answered(service: Listening) -> None:
    """Wait until the pool has replaced the connections lost in the pause."""
    for _ in range(100):
        if (await service.request("GET", "/api/tasks", "user 1")).status_code == 200:
            return
    raise AssertionError("the service did not recover")


async def test_wrongly_prepared_statements_do_not_mix_users_tasks(
    database_url: str,
    short_folder: Path,
    sql: psycopg.Connection,
    owned: dict[str, list[int]],
) -> None:
    """A pooler without support for them gives clients sessions with other clients' statements."""
    async with (
        pooled(database_url, short_folder, size=2) as url,
        listening(url, pool_size=16, pool_timeout=30, prepared_statements=True) as service,
    ):
        crowd = Crowd(service, owned, 1)
        await crowd.come()
        assert set(crowd.statuses) <= {200, 404, 500, 503}
        assert crowd.statuses[200] > 0
    assert mixed(sql) == 0
