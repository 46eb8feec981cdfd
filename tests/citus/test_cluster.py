"""Tests that need a cluster: plans, moves of shards, and the owner's name on other nodes."""

import asyncio
import random
import re
import subprocess
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from itertools import permutations
from pathlib import Path
from typing import Any

import httpx2
import psycopg
import pytest
from psycopg.raw_cursor import RawCursor

from api.test_followers import FORGIVE, ROUNDS, play_round
from support.program import command, environment
from support.program import run as run_program
from support.requirements import citus_coordinator
from support.service import SECRET, Service, bearer, running_service, settings
from support.waiting import until
from todo_api.database import row_security
from todo_api.database.preamble import Preamble
from todo_api.database.statement import Statement, encode
from todo_api.tasks import statements
from todo_api.tasks.fields import WRITABLE

citus_coordinator()  # skips the module without a cluster

TERMS = [statements.Terms(if_match=True), statements.Terms(keyed=True)]
HOT = [
    statements.get_task(),
    statements.get_versions(),
    statements.list_tasks(None, "created", "desc"),
    statements.list_tasks("incomplete", "updated", "asc"),
    statements.list_tasks("complete", "priority", "desc"),
    statements.list_tasks(None, "title", "desc"),
    statements.list_tasks(None, "due_date", "asc"),
    statements.find_tasks("created", "desc"),
    statements.find_tasks("due_date", "asc"),
    statements.add_task(),
    *(statements.toggle_task(terms) for terms in TERMS),
    statements.add_task(statements.Terms(keyed=True)),
    statements.remove_task(statements.Terms(if_match=True, keyed=True)),
    statements.forget_answer(),
    statements.forget_answers(),
    *(statements.change_task(frozenset({name})) for name in WRITABLE),
    statements.change_task(frozenset(WRITABLE)),
    statements.toggle_task(),
    statements.remove_task(),
    statements.forget_tombstones(),
    statements.why_not_written(),
]
VALUES: dict[str, object] = {
    "owner": "alice",
    "owner_hash": b"hash",
    "email": None,
    "issued_at": 4_000_000_000,
    "now": 4_000_000_000_000,
    "task_id": 1,
    "known_version": None,
    **dict.fromkeys(("status", "priority", "due_from", "due_before", "limit"), None),
    "without_due_date": False,
    "words": ["x"],
    **{name: [1] for name in statements.RUNS},
    "count": True,
    "after_1": "infinity",
    "after_2": 1,
    "after_3": 1,
    **{f"new_{name}": "x" for name in WRITABLE},
    "new_status": "complete",
    "new_priority": "low",
    "new_due_date": "2030-01-01",
    "new_due_is_day": False,
    "if_match": [1],
    "idempotency_key": "a key",
    "request_hash": b"hash",
}
NODES = [pytest.param(0, id="coordinator"), pytest.param(1, id="worker")]
PAIRS = list(permutations(range(2)))
"""Both orders of the two nodes."""


@pytest.fixture
def nodes(coordinator: str, workers: list[str], sql: psycopg.Connection) -> list[str]:
    """The addresses of the coordinator and of one worker, with empty tables."""
    assert sql
    return [coordinator, workers[0]]


@asynccontextmanager
async def running(nodes: list[str], folder: Path, **values: Any) -> AsyncIterator[list[Service]]:
    """Start one service for each node."""
    async with AsyncExitStack() as stack:
        services = []
        for number, node in enumerate(nodes):
            own_folder = folder / str(number)
            own_folder.mkdir()
            service = running_service(node, own_folder, **values)
            services.append(await stack.enter_async_context(service))
        yield services


@pytest.fixture
async def services(nodes: list[str], short_folder: Path) -> AsyncIterator[list[Service]]:
    """One service on the coordinator, and one on a worker."""
    async with running(nodes, short_folder) as both:
        yield both


@pytest.fixture
def member(database_url: str) -> Iterator[psycopg.Connection]:
    """A transaction with the role of requests. It has not named an owner yet."""
    with psycopg.connect(database_url) as connection:
        connection.execute("SELECT set_config('role', %s, true)", [row_security.ROLE])
        yield connection
        connection.rollback()


def run(connection: psycopg.Connection, statement: Statement) -> list[Any]:
    given = [encode(VALUES[name]) for name in statement.parameters]
    values = [value if value is None else value.decode() for value in given]
    return RawCursor(connection).execute(statement.sql, values).fetchall()


def migrate(*arguments: str, **variables: str) -> str:
    """Run `todo-api migrate`, and return its output."""
    return subprocess.run(
        command("migrate", *arguments),
        env=environment(BETTER_AUTH_SECRET=SECRET, **variables),
        check=True,
        capture_output=True,
        text=True,
    ).stdout


@pytest.mark.parametrize("statement", [pytest.param(s, id=s.name.decode()) for s in HOT])
def test_statement_uses_one_shard(database_url: str, statement: Statement) -> None:
    before = Preamble(settings()).before(statement)
    assert before is not None
    explained = Statement(b"", b"EXPLAIN " + statement.sql, statement.parameters, writes=False)
    with psycopg.connect(database_url) as connection:
        run(connection, before)
        plan = "\n".join(line for (line,) in run(connection, explained))
        connection.rollback()
    assert set(re.findall(r"Task Count: (\d+)", plan)) == {"1"}, plan


async def test_operator_can_repeat_the_migration_with_tasks_stored(
    service: Service, sql: psycopg.Connection, coordinator: str
) -> None:
    task = await service.create("alice")
    query = "SELECT table_name::text, distribution_column, colocation_id FROM citus_tables"
    before = sorted(sql.execute(query).fetchall())
    for _ in range(2):
        migrate("--citus", DATABASE_URL=coordinator)
    assert sorted(sql.execute(query).fetchall()) == before
    kept = await service.request("GET", f"/api/tasks/{task['id']}", "alice")
    assert kept.json() == task


@pytest.mark.parametrize("node", NODES)
def test_login_is_ordinary_and_does_not_propagate_settings(nodes: list[str], node: int) -> None:
    """So the tests below use an ordinary login, without preparation for Citus."""
    with psycopg.connect(nodes[node]) as connection:
        found = connection.execute("""
            SELECT rolsuper, rolbypassrls, current_setting('citus.propagate_set_commands')
            FROM pg_roles WHERE rolname = current_user
        """).fetchall()
    assert found == [(False, False, "none")]


async def test_member_sees_only_the_named_owner(
    service: Service, member: psycopg.Connection
) -> None:
    for user in ("alice", "bob", "carol"):
        tasks = [await service.create(user) for _ in range(2)]
        await service.request("DELETE", f"/api/tasks/{tasks[0]['id']}", user)
    queries = [f"SELECT DISTINCT user_id FROM {table}" for table in ("tasks", "tombstones")]  # noqa: S608  constants
    queries.append("SELECT id FROM users")
    for query in queries:
        assert member.execute(query).fetchall() == []
    member.rollback()
    member.execute("SELECT set_config('role', %s, true)", [row_security.ROLE])
    for user in ("alice", "bob"):
        member.execute("SELECT name_owner(%s)", [user])
        for query in queries:
            assert member.execute(query).fetchall() == [(user,)]


async def test_member_can_write_only_for_the_named_owner(
    service: Service, sql: psycopg.Connection, member: psycopg.Connection
) -> None:
    task = await service.create("bob")
    member.execute("SELECT name_owner('alice')")
    for write in ("UPDATE tasks SET title = 'stolen'", "DELETE FROM tasks"):
        assert member.execute(write).rowcount == 0
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        member.execute("INSERT INTO tasks (user_id, title, version) VALUES ('bob', 'x', 1)")
    stored = sql.execute("SELECT id, title FROM tasks").fetchall()
    assert stored == [(task["id"], task["title"])]


async def test_services_on_both_nodes_show_the_same_tasks(services: list[Service]) -> None:
    tasks = [await services[number % 2].create("alice") for number in range(4)]
    await services[0].create("bob")
    for service in services:
        listed = (await service.request("GET", "/api/tasks", "alice")).json()
        assert sorted(task["id"] for task in listed) == sorted(task["id"] for task in tasks)
        foreign = await service.request("GET", f"/api/tasks/{tasks[0]['id']}", "bob")
        assert foreign.status_code == 404


@pytest.mark.parametrize(("erasing", "other"), PAIRS)
@pytest.mark.parametrize("is_known", [True, False])
async def test_every_node_refuses_a_token_from_before_an_erasure(
    services: list[Service],
    sql: psycopg.Connection,
    erasing: int,
    other: int,
    *,
    is_known: bool,
) -> None:
    """This includes a process that just wrote for this user and does not check erasures first."""
    old = bearer("alice", iat=int(time.time()) - 60)
    if is_known:
        for service in services:
            await service.create("alice")
    gone = await services[erasing].request("DELETE", "/api/account", headers=old)
    assert gone.status_code == 204
    for service in (services[other], services[erasing]):
        refused = await service.client.post("/api/tasks", headers=old, json={"title": "x"})
        assert refused.status_code == 401
    assert sql.execute("SELECT FROM users").fetchall() == []
    assert sql.execute("SELECT FROM tasks").fetchall() == []


async def test_follower_ends_with_the_tasks_of_all_nodes(
    services: list[Service], sql: psycopg.Connection, nodes: list[str]
) -> None:
    """Writers and followers use both nodes in turn, while a transaction stays open."""
    chance = random.Random(16)  # noqa: S311  a repeatable test
    clients = [each.client for each in services]
    with psycopg.connect(nodes[1]) as held:
        held.execute("SELECT pg_current_xact_id()")
        for number in range(ROUNDS):
            sql.execute(FORGIVE)
            await play_round(clients, f"user-{number % 7}", chance)


async def test_nodes_share_a_rate_limit(nodes: list[str], short_folder: Path) -> None:
    limit = {"rate_limit": 4, "rate_limit_store": "postgresql"}
    async with running(nodes, short_folder, **limit) as services:
        statuses = [
            (await service.request("GET", "/api/tasks", "alice")).status_code
            for service in services * 3
        ]
        assert statuses == [200, 200, 200, 200, 429, 429]
        for service in services:
            assert (await service.request("GET", "/api/tasks", "bob")).status_code == 200


@dataclass
class Writer:
    """A client that does each kind of write in turn, and records the acknowledged writes."""

    service: Service
    user: str
    versions: list[int] = field(default_factory=list)
    """The versions of the acknowledged writes, in order."""
    tasks: dict[int, int] = field(default_factory=dict)
    """The expected version of each task."""
    deleted: set[int] = field(default_factory=set)
    statuses: Counter[int] = field(default_factory=Counter)
    ended: bool = False

    async def work(self) -> None:
        while not self.ended:
            created = await self._write("POST", "/api/tasks", {"title": "x"})
            if created is None:
                continue
            task_id = created["id"]
            path = f"/api/tasks/{task_id}"
            await self._write("PUT", path, {"title": "y"}, task_id)
            await self._write("PATCH", f"{path}/complete", None, task_id)
            if len(self.tasks) > 5:
                await self._delete(next(iter(self.tasks)))

    async def _write(
        self, verb: str, path: str, body: dict[str, Any] | None, task_id: int | None = None
    ) -> dict[str, Any] | None:
        answer = await self._send(verb, path, body)
        if answer.status_code not in {200, 201}:
            self.tasks.pop(task_id or 0, None)  # the task's state is unknown now
            return None
        task: dict[str, Any] = answer.json()
        self.versions.append(task["version"])
        self.tasks[task["id"]] = task["version"]
        return task

    async def _delete(self, task_id: int) -> None:
        del self.tasks[task_id]
        if (await self._send("DELETE", f"/api/tasks/{task_id}", None)).status_code == 204:
            self.deleted.add(task_id)

    async def _send(self, verb: str, path: str, body: dict[str, Any] | None) -> httpx2.Response:
        answer = await self.service.client.request(verb, path, headers=bearer(self.user), json=body)
        self.statuses[answer.status_code] += 1
        assert answer.status_code in {200, 201, 204, 503}, answer.text
        if answer.status_code == 503:
            assert int(answer.headers["retry-after"]) > 0
        return answer


@asynccontextmanager
async def writing(writers: list[Writer]) -> AsyncIterator[None]:
    """Keep the writers running inside the block."""
    async with asyncio.TaskGroup() as group:
        for writer in writers:
            group.create_task(writer.work())
        try:
            await progress(writers)
            yield
            await progress(writers)
        finally:
            for writer in writers:
                writer.ended = True


async def progress(writers: list[Writer]) -> None:
    """Wait until each writer has one more acknowledged write."""
    before = [len(writer.versions) for writer in writers]
    await until(
        lambda: all(len(w.versions) > count for w, count in zip(writers, before, strict=True))
    )


def move(url: str, user: str, mode: str) -> None:
    """Move a user's shards to the other worker."""
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(
            """
            SELECT citus_move_shard_placement(
                shardid, nodename, nodeport, other_name, other_port, %s
            )
            FROM citus_shards, LATERAL (
                SELECT node.nodename, node.nodeport FROM pg_dist_node AS node
                WHERE groupid > 0 AND (node.nodename, node.nodeport)
                    <> (citus_shards.nodename, citus_shards.nodeport)
                LIMIT 1
            ) AS other (other_name, other_port)
            WHERE shardid = get_shard_id_for_distribution_column('users', %s::text)
            """,
            [mode, user],
        )


def commits_are_synchronous(sql: psycopg.Connection) -> bool:
    """Return whether all workers commit synchronously. Citus waits only for written WAL."""
    query = "SELECT DISTINCT result FROM run_command_on_workers('SHOW synchronous_commit')"
    return sql.execute(query).fetchall() == [("on",)]


@pytest.mark.parametrize("mode", ["block_writes", "force_logical"])
async def test_writes_continue_while_shards_move(
    services: list[Service], sql: psycopg.Connection, coordinator: str, mode: str
) -> None:
    if mode == "force_logical" and not commits_are_synchronous(sql):
        pytest.skip("Citus loses the latest writes, because synchronous_commit is off")
    users = [f"user {number}" for number in range(4)]
    writers = [Writer(service, user) for user in users for service in services]
    async with writing(writers):
        for user in users[:2] * 2:  # there and back
            await asyncio.to_thread(move, coordinator, user, mode)
            await progress(writers)
    stored: dict[int, int] = dict(sql.execute("SELECT id, version FROM tasks").fetchall())
    for writer in writers:
        lost = {t: (v, stored.get(t)) for t, v in writer.tasks.items() if stored.get(t) != v}
        assert lost == {}
        assert not writer.deleted & stored.keys()
        assert writer.versions == sorted(set(writer.versions))
    for user in users:
        versions = [v for writer in writers if writer.user == user for v in writer.versions]
        assert len(set(versions)) == len(versions)


def test_repeated_import_counts_what_it_finds(tmp_path: Path, database_url: str) -> None:
    """The cluster counts each row of a repeated insert, and it returns only those that are new."""
    (tmp_path / "tasks.jsonl").write_text('{"title": "a"}\n{"title": "b"}\n')
    said = [
        run_program(tmp_path, "import", "ann", "tasks.jsonl", DATABASE_URL=database_url).stdout
        for _ in range(2)
    ]
    assert said == [
        "Imported 2 tasks, 0 were there already.\n",
        "Imported 0 tasks, 2 were there already.\n",
    ]
