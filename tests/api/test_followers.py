"""Followers of the feed end with the server's tasks, whatever order transactions commit in."""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx2
import psycopg
import pytest

from support.service import Service, bearer, running_service

ROUNDS = 200
DELAYS = """
    CREATE FUNCTION delay() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        PERFORM pg_sleep(random() * 0.004);
        RETURN NULL;
    END $$;
    CREATE TRIGGER delay AFTER INSERT OR UPDATE OR DELETE ON tasks
        FOR EACH ROW EXECUTE FUNCTION delay();
"""
"""A random delay in the transaction of each write, between its statement and its commit."""


FORGIVE = """
    UPDATE erasures SET tokens_from = now() - interval '1 hour';
    UPDATE users SET tokens_from = NULL;
"""
"""Lets the tests' tokens write again after an erasure."""


class Copy:
    """A client's copy of a user's tasks, brought up to date through any of several processes."""

    def __init__(self, clients: list[httpx2.AsyncClient], user: str, chance: random.Random) -> None:
        self._clients, self._user, self._chance = clients, user, chance
        self.cursor: str | None = None
        self.tasks: dict[int, Any] = {}
        self._last = 0

    async def follow(self) -> None:
        """Ask for the next page until there are no more."""
        more = True
        while more:
            limit = self._chance.choice([1, 2, 3, 200])
            params = {"limit": limit} | ({"since": self.cursor} if self.cursor else {})
            client = self._chance.choice(self._clients)
            answer = await client.get(
                "/api/tasks/changes", params=params, headers=bearer(self._user)
            )
            more = self._take(answer)

    def _take(self, answer: httpx2.Response) -> bool:
        if answer.status_code == 410:
            self.cursor, self.tasks, self._last = None, {}, 0
            return True
        assert answer.status_code == 200, answer.text
        body = answer.json()
        for change in body["changes"]:
            version = change["version"] if "deleted" in change else change["task"]["version"]
            assert version > self._last, "a version came twice or too late"
            self._last = version
            if "deleted" in change:
                self.tasks.pop(change["deleted"], None)
            else:
                self.tasks[change["task"]["id"]] = change["task"]
        self.cursor = body["cursor"]
        return bool(body["more"])


async def write(client: httpx2.AsyncClient, user: str, chance: random.Random) -> None:
    """Create, change or delete something, alone or in a batch, or erase the account."""
    headers = bearer(user)
    listed = await client.get("/api/tasks", params={"limit": 5}, headers=headers)
    ids = [task["id"] for task in listed.json()]
    kind = chance.choice([*("create", "change", "delete", "batch") * 8, "erase"])
    if kind == "erase":
        answer = await client.delete("/api/account", headers=headers)
    elif kind == "create" or not ids:
        answer = await client.post("/api/tasks", json={"title": "x"}, headers=headers)
    elif kind == "change":
        path = f"/api/tasks/{chance.choice(ids)}/complete"
        answer = await client.patch(path, headers=headers)
    elif kind == "delete":
        answer = await client.delete(f"/api/tasks/{chance.choice(ids)}", headers=headers)
    else:
        operations = [
            {"op": "create", "task": {"title": "y"}},
            {"op": "complete", "id": ids[0]},
            {"op": "delete", "id": ids[-1]},
        ]
        answer = await client.post(
            "/api/tasks/batch", json={"operations": operations}, headers=headers
        )
    assert answer.status_code in {200, 201, 204, 401, 404}, answer.text


@pytest.fixture
async def services(database_url: str, short_folder: Path) -> AsyncIterator[list[Service]]:
    """Two processes of the service on one database, as far as the database can tell."""
    async with AsyncExitStack() as stack:
        folders = [short_folder / name for name in "ab"]
        for folder in folders:
            folder.mkdir()
        yield [
            await stack.enter_async_context(running_service(database_url, folder))
            for folder in folders
        ]


async def test_follower_ends_with_the_servers_tasks(
    services: list[Service], sql: psycopg.Connection, database_url: str
) -> None:
    """In each round others write at once, with delays before their commits, and some erase all.

    Meanwhile another transaction stays open, which holds back followers of transaction ids.
    """
    sql.execute(DELAYS)
    chance = random.Random(16)  # noqa: S311  a repeatable test
    clients = [each.client for each in services]
    with psycopg.connect(database_url) as held:
        held.execute("SELECT pg_current_xact_id()")
        for number in range(ROUNDS):
            sql.execute(FORGIVE)
            await play_round(clients, f"user-{number % 7}", chance)


async def play_round(clients: list[httpx2.AsyncClient], user: str, chance: random.Random) -> None:
    """Let three writers and two new followers work at once, then compare the copies."""
    copies = [Copy(clients, user, chance) for _ in range(2)]

    async def writer() -> None:
        for _ in range(chance.randint(1, 4)):
            await write(chance.choice(clients), user, chance)

    async def follower(copy: Copy) -> None:
        for _ in range(3):
            await asyncio.sleep(chance.random() * 0.01)  # a random moment
            await copy.follow()

    await asyncio.gather(*(writer() for _ in range(3)), *map(follower, copies))
    for copy in copies:
        await copy.follow()
        listed = (await clients[0].get("/api/tasks", headers=bearer(user))).json()
        assert copy.tasks == {task["id"]: task for task in listed}
