"""Faults of PostgreSQL: every request gets an answer, and every acknowledged task stays.

The tests use HTTP over a real socket, so they see what a client sees, and not the pool.
"""

import asyncio
import json
import os
import re
import signal
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx2
import psycopg
import pytest
from alembic import command
from structlog.testing import capture_logs

from support.listening import Listening, listening
from support.majors import NEWEST as EMBEDDED_MAJOR
from support.majors import Server
from support.majors import server as any_server
from support.network import Network
from support.own_postgres import OwnPostgres
from support.problems import problem
from support.service import running_service, settings
from support.waiting import LIMIT, until
from support.watching import assert_pool_is_whole, backends, terminate, waiting
from todo_api import server
from todo_api.database import migrations
from todo_api.errors import StartupError

numbers = count(1)

TASK_ROUTES: list[tuple[str, str, dict[str, Any] | None]] = [
    ("GET", "/tasks", None),
    ("POST", "/tasks", {"title": "x"}),
    ("GET", "/tasks/1", None),
    ("PUT", "/tasks/1", {"title": "x"}),
    ("DELETE", "/tasks/1", None),
    ("PATCH", "/tasks/1/complete", None),
    ("DELETE", "/account", None),
]
EVERY_TASK_ROUTE = [
    (verb, prefix + path, body)
    for prefix in ("/api", "/api/alice")
    for verb, path, body in TASK_ROUTES
]
SECRETS = (
    *("postgres", "psycopg", "SQLSTATE", "Traceback", ".s.PGSQL", "127.0.0.1"),
    *("/tmp", "/dev/shm"),  # noqa: S108 - where the tests' databases are
)


@pytest.fixture(scope="module")
def own_postgres() -> Iterator[OwnPostgres]:
    with TemporaryDirectory(prefix="t-") as folder:
        postgres = OwnPostgres(Path(folder))
        yield postgres
        postgres.stop()


@pytest.fixture
def own(own_postgres: OwnPostgres) -> Iterator[OwnPostgres]:
    """A server that tests may damage. It runs again afterwards."""
    own_postgres.start()
    yield own_postgres
    own_postgres.start()


@pytest.fixture
def own_url(own: OwnPostgres) -> str:
    """A migrated database on that server, only for this test."""
    name = f"own_{next(numbers)}"
    execute(own.url, f"CREATE DATABASE {name} TEMPLATE migrated STRATEGY FILE_COPY")
    return own.at(name)


@pytest.fixture
async def service(database_url: str) -> AsyncIterator[Listening]:
    async with listening(database_url, pool_size=2, lock_timeout=0.3) as running:
        yield running


@pytest.fixture
def guest(sql: psycopg.Connection, database_url: str) -> Iterator[str]:
    """The address for an ordinary login, because limits do not apply to the administrator."""
    name = f"guest_{next(numbers)}_{os.getpid()}"
    sql.execute(f"CREATE ROLE {name} LOGIN IN ROLE todo_member")
    yield database_url.replace("postgres@", f"{name}@")
    terminate(sql)
    sql.execute(f"DROP ROLE {name}")


def execute(url: str, statement: str) -> list[tuple[Any, ...]]:
    with psycopg.connect(url, autocommit=True) as connection:
        cursor = connection.execute(statement)
        return cursor.fetchall() if cursor.description else []


def role_of(url: str) -> str:
    return url.removeprefix("postgresql://").partition("@")[0]


def assert_error(answer: httpx2.Response, *statuses: int) -> None:
    """Check the shape of an error after which the client may try again."""
    assert answer.status_code in statuses, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert int(answer.headers["retry-after"]) > 0
    assert answer.headers["x-request-id"]
    assert "Origin" in answer.headers["vary"]
    assert list(answer.json()) == ["error", "detail", "code"]
    assert answer.json()["error"]
    for secret in SECRETS:
        assert secret not in answer.text


def every_route(service: Listening) -> list[Any]:
    return [
        service.request(verb, path, "alice", json=body) for verb, path, body in EVERY_TASK_ROUTE
    ]


async def change(service: Listening, task: dict[str, Any], title: str) -> httpx2.Response:
    path, owner = f"/api/tasks/{task['id']}", task["user_id"]
    return await service.request("PUT", path, owner, json={"title": title})


@contextmanager
def locked(url: str, task: dict[str, Any]) -> Iterator[psycopg.Connection]:
    """Lock the task's row in another session."""
    with psycopg.connect(url) as holder:
        holder.execute("SELECT FROM tasks WHERE id = %s FOR UPDATE", [task["id"]])
        yield holder


class Load:
    """Clients that create tasks all the time, and the ids of acknowledged tasks."""

    def __init__(self, service: Listening) -> None:
        self._service = service
        self.acknowledged: list[int] = []
        self._ended = False

    async def _create(self) -> None:
        while not self._ended:
            answer = await self._service.request("POST", "/api/tasks", "alice", json={"title": "x"})
            if answer.status_code == 201:
                self.acknowledged.append(answer.json()["id"])
            else:
                assert_error(answer, 500, 503)

    async def acknowledges(self, more: int) -> None:
        """Wait for this number of new acknowledged tasks, or until a client fails."""
        enough = len(self.acknowledged) + more
        await until(
            lambda: len(self.acknowledged) >= enough or any(each.done() for each in self._clients)
        )

    @asynccontextmanager
    async def going_on(self) -> AsyncIterator[None]:
        """Keep the clients running inside the block."""
        self._clients = [asyncio.create_task(self._create()) for _ in range(8)]
        try:
            yield
        finally:
            self._ended = True
            await asyncio.gather(*self._clients)

    def lost(self, url: str) -> set[int]:
        """Return the acknowledged tasks that are not stored."""
        return set(self.acknowledged) - {row[0] for row in execute(url, "SELECT id FROM tasks")}


async def test_clients_do_not_notice_terminated_idle_connections(
    service: Listening, sql: psycopg.Connection
) -> None:
    """Reads and writes both succeed, and each write happens once."""
    task = await service.create("alice")
    for _ in range(3):
        await asyncio.gather(*(service.request("GET", "/api/tasks", "alice") for _ in range(10)))
        assert terminate(sql) > 0
        answers = await asyncio.gather(
            service.request("POST", "/api/tasks", "bob", json={"title": "x"}),
            service.request("GET", "/api/tasks", "alice"),
            change(service, task, "y"),
        )
        assert [answer.status_code for answer in answers] == [201, 200, 200]
    assert sql.execute("SELECT count(*) FROM tasks WHERE user_id = 'bob'").fetchone() == (3,)
    await assert_pool_is_whole(service, sql, 2)


async def test_stopped_server_fails_only_requests_that_need_it(
    own: OwnPostgres, own_url: str
) -> None:
    async with listening(own_url) as service:
        await service.create("alice")
        await asyncio.to_thread(own.stop)
        with capture_logs() as logs:
            answers = await asyncio.gather(*every_route(service))
        for answer in answers:
            assert_error(answer, 500)
            assert answer.json() == problem("database_unreachable", "Internal server error")
        failures = [entry for entry in logs if entry["event"] != "request"]
        assert {entry["event"] for entry in failures} == {"request failed"}
        assert Counter(entry["request_id"] for entry in failures) == Counter(
            answer.headers["x-request-id"] for answer in answers
        )
        assert str(own.access_rules.parent) not in json.dumps(logs)
        await assert_served_without_a_database(service)
        unready = await service.request("GET", "/readyz")
        assert_error(unready, 503)
        assert unready.json() == problem("not_ready", "The database does not answer")
        await asyncio.to_thread(own.start)
        assert (await service.request("GET", "/readyz")).json() == {"status": "ready"}
        assert (await service.request("GET", "/api/tasks", "alice")).status_code == 200


async def assert_served_without_a_database(service: Listening) -> None:
    """Check the answers that need no database: 400, 401, 403, 404, 405 and public pages."""
    for verb, path, body in EVERY_TASK_ROUTE:
        assert (await service.request(verb, path, json=body)).status_code == 401
        if path.startswith("/api/alice"):
            assert (await service.request(verb, path, "mallory", json=body)).status_code == 403
    for verb, path, expected in (
        ("POST", "/api/tasks", 400),
        ("PUT", "/api/tasks/1", 400),
        ("GET", "/api/tasks/none", 400),
        ("GET", "/api/tasks?sort=size", 400),
        ("GET", "/api/nothing/here", 404),
        ("POST", "/api/tasks/1", 405),
        ("GET", "/livez", 200),
        ("GET", "/health", 200),
        ("GET", "/docs", 200),
        ("GET", "/openapi.json", 200),
    ):
        answer = await service.request(verb, path, "alice", json={} if expected == 400 else None)
        assert answer.status_code == expected, path


async def test_restart_under_load_keeps_every_acknowledged_task(
    own: OwnPostgres, own_url: str
) -> None:
    async with listening(own_url) as service:
        load = Load(service)
        async with load.going_on():
            await load.acknowledges(50)
            await asyncio.to_thread(own.stop)
            await asyncio.to_thread(own.start)
            await load.acknowledges(50)
        with psycopg.connect(own_url, autocommit=True) as sql:
            await assert_pool_is_whole(service, sql, 4)
    assert not load.lost(own_url)


@pytest.mark.parametrize("number", [signal.SIGQUIT, signal.SIGKILL])
async def test_crash_under_load_keeps_every_acknowledged_task(
    own: OwnPostgres, own_url: str, number: signal.Signals
) -> None:
    async with listening(own_url) as service:
        load = Load(service)
        async with load.going_on():
            await load.acknowledges(100)
            await asyncio.to_thread(own.crash, number)
            await asyncio.to_thread(own.start)
            await load.acknowledges(20)
    assert not load.lost(own_url)


async def test_frozen_backend_fails_only_its_own_request(
    database_url: str, sql: psycopg.Connection
) -> None:
    async with listening(database_url, pool_size=2, statement_timeout=2) as service:
        task = await service.create("alice")
        with locked(database_url, task) as holder:
            changing = asyncio.create_task(change(service, task, "y"))
            await until(lambda: waiting(sql) == 1)
            (frozen,) = backends(sql, "active")
            os.kill(frozen, signal.SIGSTOP)
            try:
                holder.rollback()
                for _ in range(20):
                    answer = await service.request("GET", "/api/tasks", "alice")
                    assert answer.status_code == 200
                # PostgreSQL would have ended the statement after 2 s. The service waits 1 s more.
                assert_error(await changing, 503)
            finally:
                os.kill(frozen, signal.SIGCONT)
        await until(lambda: frozen not in backends(sql))
        await assert_pool_is_whole(service, sql, 2)


async def test_creation_without_a_reply_from_postgresql_is_stored_once(
    database_url: str, short_folder: Path, sql: psycopg.Connection
) -> None:
    """Without the reply to COMMIT, the outcome is unknown, so the service does not repeat it."""
    async with running_service(database_url, short_folder) as service:
        service.wire.cut_answers = True
        creating = asyncio.create_task(
            service.request("POST", "/api/tasks", "alice", json={"title": "once"})
        )
        await until(lambda: service.wire.answers_cut > 0)
        service.wire.cut_answers = False  # a repeated write would succeed
        assert_error(await creating, 500)
        listed = await service.client.get("/readyz")
        assert listed.status_code == 200
        assert sql.execute("SELECT title FROM tasks").fetchall() == [("once",)]
        await service.create("alice", title="next")


async def test_pool_replaces_idle_connections_that_were_reset(
    database_url: str, sql: psycopg.Connection
) -> None:
    async with Network(database_url) as network, listening(network.url) as service:
        await service.create("alice")
        assert network.cut() > 0
        answers = await asyncio.gather(
            *(service.request("GET", "/api/tasks", "alice") for _ in range(10))
        )
        assert {answer.status_code for answer in answers} == {200}
        # Writes are not repeated, so the service must notice the reset before it sends the write.
        assert network.cut() > 0
        await until(lambda: not backends(sql))
        created = await service.request("POST", "/api/tasks", "alice", json={"title": "x"})
        assert created.status_code == 201
    assert execute(database_url, "SELECT count(*) FROM tasks") == [(2,)]


async def test_service_repeats_only_reads_after_a_reset(
    database_url: str, sql: psycopg.Connection
) -> None:
    """A write gets 500 and is not repeated, because it may already have happened."""
    async with Network(database_url) as network, listening(network.url) as service:
        task = await service.create("alice")
        with psycopg.connect(database_url) as holder:
            holder.execute("LOCK TABLE tasks IN ACCESS EXCLUSIVE MODE")
            reading = asyncio.create_task(service.request("GET", "/api/tasks", "alice"))
            writing = asyncio.create_task(change(service, task, "y"))
            await until(lambda: waiting(sql) == 2)
            network.cut()
            assert_error(await writing, 500)
            await until(lambda: waiting(sql) == 3)  # the two cut statements, and the repeated read
            holder.rollback()
        assert (await reading).status_code == 200


async def test_service_gives_up_in_time_on_one_byte_per_second(database_url: str) -> None:
    async with (
        Network(database_url) as network,
        listening(network.url, statement_timeout=1, pool_size=1) as service,
    ):
        await service.create("alice")
        network.pace = 1.0
        assert_error(await service.request("GET", "/api/tasks", "alice"), 503)
        network.pace = None
        assert (await service.request("GET", "/api/tasks", "alice")).status_code == 200


async def test_service_waits_for_a_database_that_wakes_up_slowly(database_url: str) -> None:
    """Neon accepts the connection at once, and answers after it wakes up."""
    async with Network(database_url) as network, listening(network.url) as service:
        network.cut()
        network.awake.clear()
        accepted = network.connections
        asking = [
            asyncio.create_task(service.request("GET", "/api/tasks", "alice")) for _ in range(4)
        ]
        await until(lambda: network.connections > accepted)
        asyncio.get_running_loop().call_later(2, network.awake.set)
        assert (await service.request("GET", "/livez")).status_code == 200
        assert (await service.request("GET", "/api/tasks")).status_code == 401
        assert not any(each.done() for each in asking)
        assert {answer.status_code for answer in await asyncio.gather(*asking)} == {200}


async def test_service_gives_up_in_time_on_a_database_that_never_wakes_up(
    database_url: str,
) -> None:
    """After a timeout, the service does not connect again, because the client has waited enough."""
    async with (
        Network(database_url) as network,
        listening(network.url, connect_timeout=0.4, pool_size=2, pool_timeout=0.3) as service,
    ):
        network.cut()
        network.awake.clear()
        accepted = network.connections
        answers = await asyncio.gather(
            *(service.request("GET", "/api/tasks", "alice") for _ in range(20))
        )
        assert {answer.status_code for answer in answers} == {500, 503}
        for answer in answers:
            assert_error(answer, 500, 503)
        assert network.connections - accepted == 2
        assert_error(await service.request("GET", "/readyz"), 503)
        network.awake.set()
        assert (await service.request("GET", "/api/tasks", "alice")).status_code == 200


async def test_unresolvable_host_gets_500_and_is_not_logged() -> None:
    with capture_logs() as logs:
        async with listening("postgresql://u:hunter2@nowhere.invalid/x") as service:
            answers = await asyncio.gather(
                *(service.request("GET", "/api/tasks", "alice") for _ in range(8)),
                service.request("GET", "/livez"),
            )
            for answer in answers[:-1]:
                assert_error(answer, 500)
            assert answers[-1].status_code == 200
            assert_error(await service.request("GET", "/readyz"), 503)
    assert len([entry for entry in logs if entry["event"] == "request failed"]) == 8
    for secret in ("hunter2", "nowhere"):
        assert secret not in json.dumps(logs)


async def test_service_recovers_when_its_login_may_connect_again(
    guest: str, sql: psycopg.Connection
) -> None:
    async with listening(guest, pool_size=4) as service:
        await service.create("alice")
        sql.execute(f"ALTER ROLE {role_of(guest)} CONNECTION LIMIT 0")
        terminate(sql)
        await until(lambda: not backends(sql))
        for answer in await asyncio.gather(*every_route(service)):
            assert_error(answer, 500, 503)
        assert_error(await service.request("GET", "/readyz"), 503)
        sql.execute(f"ALTER ROLE {role_of(guest)} CONNECTION LIMIT 1")
        answers = await asyncio.gather(
            *(service.request("GET", "/api/tasks", "alice") for _ in range(30))
        )
        for answer in answers:
            if answer.status_code != 200:
                assert_error(answer, 500, 503)
        assert 200 in {answer.status_code for answer in answers}
        sql.execute(f"ALTER ROLE {role_of(guest)} CONNECTION LIMIT -1")
        await assert_pool_is_whole(service, sql, 4)


FULL = """
CREATE FUNCTION full_disk() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'could not extend file' USING ERRCODE = 'disk_full';
END $$;
CREATE TRIGGER full_disk AFTER INSERT OR UPDATE OR DELETE ON tasks
    FOR EACH ROW EXECUTE FUNCTION full_disk()
"""
"""Simulates a full disk: the same statements fail with the same SQLSTATE."""


async def test_service_refuses_writes_but_reads_on_a_full_disk(
    service: Listening, sql: psycopg.Connection
) -> None:
    task = await service.create("alice")
    sql.execute(FULL)
    for answer in await asyncio.gather(*every_write(service, task)):
        assert_error(answer, 503)
    listed = await service.request("GET", "/api/tasks", "alice")
    assert (listed.status_code, listed.json()) == (200, [task])
    sql.execute("DROP TRIGGER full_disk ON tasks")
    assert (await change(service, task, "y")).status_code == 200
    await assert_pool_is_whole(service, sql, 2)


def every_write(service: Listening, task: dict[str, Any]) -> list[Any]:
    path = f"/api/tasks/{task['id']}"
    return [
        service.request("POST", "/api/tasks", "alice", json={"title": "x"}),
        service.request("PUT", path, "alice", json={"title": "y"}),
        service.request("PATCH", f"{path}/complete", "alice"),
        service.request("DELETE", path, "alice"),
        service.request("DELETE", "/api/account", "alice"),
    ]


async def test_service_refuses_writes_but_reads_on_a_read_only_database(
    service: Listening, sql: psycopg.Connection
) -> None:
    task = await service.create("alice")
    name = sql.info.dbname
    sql.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    terminate(sql)
    for answer in await asyncio.gather(*every_write(service, task)):
        assert_error(answer, 503)
    for path in ("/api/tasks", f"/api/tasks/{task['id']}"):
        assert (await service.request("GET", path, "alice")).status_code == 200
    sql.execute(f"ALTER DATABASE {name} RESET default_transaction_read_only")
    terminate(sql)
    assert (await change(service, task, "y")).status_code == 200


@pytest.mark.parametrize("limits", [(5.0, 0.3), (0.3, 5.0)], ids=["lock", "statement"])
async def test_timeout_gets_503_and_keeps_the_connection(
    database_url: str, sql: psycopg.Connection, limits: tuple[float, float]
) -> None:
    statement, lock = limits
    async with listening(
        database_url, pool_size=2, statement_timeout=statement, lock_timeout=lock
    ) as service:
        held, free = await service.create("alice"), await service.create("bob")
        with locked(database_url, held):
            changing = asyncio.create_task(change(service, held, "y"))
            await until(lambda: waiting(sql) == 1)
            used = backends(sql)
            for title in ("a", "b", "c"):
                assert (await change(service, free, title)).status_code == 200
            assert_error(await changing, 503)
            assert (await service.request("GET", "/api/tasks", "alice")).status_code == 200
        assert (await change(service, held, "z")).json()["title"] == "z"
        assert used <= backends(sql)
        await assert_pool_is_whole(service, sql, 2)


SLOW = """
CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_sleep(0.02);
    RETURN NEW;
END $$;
CREATE TRIGGER slow BEFORE INSERT ON tasks FOR EACH ROW EXECUTE FUNCTION slow()
"""


async def test_service_answers_two_hundred_clients_with_two_connections(
    database_url: str, sql: psycopg.Connection
) -> None:
    """Each task is created, or refused without a write. Only acknowledged tasks are stored."""
    sql.execute(SLOW)
    async with listening(database_url, pool_size=2, pool_timeout=0.5) as service:
        answers = await asyncio.gather(
            *(
                service.request("POST", "/api/tasks", f"user {number}", json={"title": "x"})
                for number in range(200)
            )
        )
        statuses = Counter(answer.status_code for answer in answers)
        for answer in answers:
            if answer.status_code != 201:
                assert_error(answer, 503)
        assert set(statuses) == {201, 503}
        assert sql.execute("SELECT count(*) FROM tasks").fetchone() == (statuses[201],)
        await assert_pool_is_whole(service, sql, 2)


async def test_service_repeats_a_deadlock_victim_or_answers_503(
    database_url: str, sql: psycopg.Connection
) -> None:
    """An administrator locks an erasure's rows in the other order, and is not the victim."""
    async with listening(database_url, lock_timeout=3) as service:
        for _ in range(3):
            task = await service.create("alice")
        with psycopg.connect(database_url) as admin:
            admin.execute("SET deadlock_timeout = '1min'")
            admin.execute("UPDATE tasks SET priority = 'low' WHERE id = %s", [task["id"]])
            erasing = asyncio.create_task(service.request("DELETE", "/api/account", "alice"))
            await until(lambda: waiting(sql) == 1)
            # This waits for the erasure until PostgreSQL aborts it. Then the service repeats it.
            await asyncio.to_thread(
                admin.execute, "UPDATE users SET email = 'a@example.com' WHERE id = 'alice'"
            )
            admin.commit()
        answer = await erasing
        if answer.status_code != 204:  # the repeated erasure was a victim too
            assert_error(answer, 503)
        count_all = "SELECT count(*) FROM tasks UNION ALL SELECT count(*) FROM users"
        left = [row[0] for row in sql.execute(count_all)]
        assert left == ([0, 0] if answer.status_code == 204 else [3, 1])
        await until(lambda: deadlocks(sql) > 0)
        again = await service.request("DELETE", "/api/account", "alice")
        assert again.status_code == 204
    assert [row[0] for row in sql.execute(count_all)] == [0, 0]


def deadlocks(sql: psycopg.Connection) -> int:
    query = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
    row = sql.execute(query).fetchone()
    assert row is not None
    counted: int = row[0]
    return counted


@contextmanager
def with_password(own: OwnPostgres, role: str) -> Iterator[None]:
    """Make the server require a password from this login."""
    rules = own.access_rules
    before = rules.read_text()
    rules.write_text(f"local all {role} scram-sha-256\n{before}")
    reload(own)
    try:
        yield
    finally:
        rules.write_text(before)
        reload(own)


def reload(own: OwnPostgres) -> None:
    execute(own.url, "SELECT pg_reload_conf()")


def refuses(url: str) -> bool:
    with suppress(psycopg.OperationalError):
        psycopg.connect(url).close()
        return False
    return True


SMALL_SESSIONS = 3
NO_SESSIONS = {
    "remaining connection slots are reserved for roles with the SUPERUSER attribute",
    "sorry, too many clients already",  # sessions that are being refused count as well
}


@pytest.fixture
def small() -> Iterator[Server]:
    """A migrated server with room for few sessions."""
    with any_server(EMBEDDED_MAJOR) as running:
        migrations.migrate(running.url)
        execute(running.url, "CREATE ROLE guest LOGIN IN ROLE todo_member")
        running.stop()
        running.start(
            max_connections=str(SMALL_SESSIONS + 2),
            superuser_reserved_connections="2",
            max_wal_senders="0",
        )
        yield running


@contextmanager
def full(url: str) -> Iterator[ExitStack]:
    """Take every session that an ordinary login can have on the small server."""
    with ExitStack() as sessions:
        taken = 0
        while taken < SMALL_SESSIONS:
            with suppress(psycopg.OperationalError):  # one that has just ended is still counted
                sessions.enter_context(psycopg.connect(url))
                taken += 1
        yield sessions


async def test_full_server_is_503_and_the_log_has_its_reason(small: Server) -> None:
    url = small.at("postgres", "guest")
    async with listening(url, pool_size=len(EVERY_TASK_ROUTE)) as service:
        with psycopg.connect(small.url, autocommit=True) as sql:
            terminate(sql, wait=LIMIT)
        with full(url) as others, capture_logs() as logs:
            answers = await asyncio.gather(*every_route(service))
            for answer in answers:
                assert_error(answer, 503)
                assert answer.json()["code"] == "database_busy"
            unready = await service.request("GET", "/readyz")
            assert unready.json()["error"] == "The database does not accept connections"
            failures = [each for each in logs if each["event"] == "request failed"]
            assert len(failures) == len(answers)
            reasons = {each["cause"] for each in failures}
            reasons |= {each["reason"] for each in logs if each["event"] == "not ready"}
            assert reasons <= NO_SESSIONS
            async with listening(url, pool_size=1) as late:  # a worker that starts meanwhile
                assert_error(await late.request("GET", "/readyz"), 503)
                others.close()
                await until(lambda: not refuses(url))
                assert (await late.request("GET", "/readyz")).status_code == 200
        assert (await service.request("GET", "/api/tasks", "alice")).status_code == 200


async def test_start_on_a_full_server_says_its_reason(small: Server) -> None:
    url = small.at("postgres", "guest")
    with full(url), pytest.raises(StartupError, match="|".join(NO_SESSIONS)):
        await server.check(settings(), url)


@pytest.mark.parametrize(
    ("rules", "database", "reason"),
    [
        ("", "nothing", 'database "nothing" does not exist'),
        ("local all refused reject", None, "pg_hba.conf rejects connection"),
        ("", None, 'role "refused" is not permitted to log in'),
    ],
)
async def test_reason_of_a_refused_connection_is_in_the_log(
    own: OwnPostgres, own_url: str, rules: str, database: str | None, reason: str
) -> None:
    execute(own.url, "DROP ROLE IF EXISTS refused")
    execute(own.url, "CREATE ROLE refused NOLOGIN IN ROLE todo_member")
    url = own_url.replace("postgres@", "refused@" if database is None else "postgres@")
    if database:
        url = own.at(database)
    before = own.access_rules.read_text()
    own.access_rules.write_text(f"{rules}\n{before}")
    reload(own)
    try:
        await until(lambda: reason in why_refused(url))
        with pytest.raises(StartupError, match=f"DATABASE_URL: .*{re.escape(reason)}"):
            await server.check(settings(), url)
        with capture_logs() as logs:
            async with listening(url) as service:
                answer = await service.request("GET", "/api/tasks", "alice")
                assert_error(answer, 500)
                assert answer.json()["code"] == "database_unreachable"
                unready = await service.request("GET", "/readyz")
                assert unready.json()["error"] == "The database does not accept connections"
        for event, member in (
            ("no answer of the database yet", "reason"),
            ("request failed", "cause"),
            ("not ready", "reason"),
        ):
            (entry,) = [each for each in logs if each["event"] == event]
            assert reason in entry[member]
    finally:
        own.access_rules.write_text(before)
        reload(own)


async def test_missing_tls_is_in_the_log(database_url: str) -> None:
    reason = "server does not support SSL, but SSL was required"
    async with Network(database_url) as network:
        with capture_logs() as logs:
            async with listening(f"{network.url}?sslmode=require") as service:
                assert_error(await service.request("GET", "/api/tasks", "alice"), 500)
        (failed,) = [each for each in logs if each["event"] == "request failed"]
        assert failed["cause"] == reason


def why_refused(url: str) -> str:
    try:
        psycopg.connect(url).close()
    except psycopg.OperationalError as error:
        return str(error)
    return ""


async def test_wrong_password_stops_the_start_but_not_a_running_service(
    own: OwnPostgres, own_url: str
) -> None:
    execute(own.url, "CREATE ROLE guarded LOGIN PASSWORD 'opensesame' IN ROLE todo_member")
    url = own_url.replace("postgres@", "guarded:opensesame@")
    with with_password(own, "guarded"), capture_logs() as logs:
        wrong = url.replace("opensesame", "hunter2")
        await until(lambda: refuses(wrong))
        with pytest.raises(StartupError) as refused:
            await server.check(settings(), wrong)
        assert str(refused.value).startswith("DATABASE_URL: password authentication failed")
        async with listening(url) as service:
            task = await service.create("alice")
            execute(own.url, "ALTER ROLE guarded PASSWORD 'changed'")
            with psycopg.connect(own_url, autocommit=True) as sql:
                terminate(sql)
                for answer in await asyncio.gather(*every_route(service)):
                    assert_error(answer, 500)
                assert_error(await service.request("GET", "/readyz"), 503)
            execute(own.url, "ALTER ROLE guarded PASSWORD 'opensesame'")
            assert (await service.request("GET", "/readyz")).status_code == 200
            assert (await change(service, task, "y")).status_code == 200
    for secret in ("hunter2", "opensesame", "changed"):
        assert secret not in f"{logs} {refused.value}"


async def test_service_does_not_start_on_an_older_schema(database_url: str) -> None:
    downgrade(database_url)
    with pytest.raises(StartupError, match="run `todo-api migrate`"):
        await server.check(settings(), database_url)
    migrations.migrate(database_url)
    await server.check(settings(), database_url)


def downgrade(url: str) -> None:
    """Go back to the first schema, which lacks columns."""
    with migrations._engine(url).begin() as connection:
        command.downgrade(migrations.configuration(connection), "0001")


async def test_service_runs_on_a_newer_schema(database_url: str, sql: psycopg.Connection) -> None:
    """This happens during a rolling update. The new columns have a default or may be null."""
    async with listening(database_url) as service:
        before = await service.create("alice")
        sql.execute("ALTER TABLE tasks ADD COLUMN colour text, ADD COLUMN size int DEFAULT 1")
        sql.execute("UPDATE alembic_version SET version_num = '9999'")
        migrations.migrate(database_url)
        await assert_every_operation_works(service, before)
    async with listening(database_url) as service:
        await assert_every_operation_works(service, await service.create("alice"))


async def assert_every_operation_works(service: Listening, task: dict[str, Any]) -> None:
    path = f"/api/tasks/{task['id']}"
    assert (await service.request("GET", "/api/tasks", "alice")).json() == [task]
    assert (await service.request("GET", path, "alice")).json() == task
    assert (await change(service, task, "y")).json().keys() == task.keys()
    assert (await service.request("PATCH", f"{path}/complete", "alice")).json()["completed"]
    assert (await service.request("DELETE", path, "alice")).status_code == 204


Harm = Callable[[str], None]


@pytest.mark.parametrize(
    "harm",
    [lambda url: execute(url, "DROP TABLE tasks CASCADE"), downgrade],
    ids=["missing", "older"],
)
async def test_service_is_not_ready_after_its_schema_is_gone(database_url: str, harm: Harm) -> None:
    async with listening(database_url) as service:
        await service.create("alice")
        assert (await service.request("GET", "/readyz")).status_code == 200
        harm(database_url)
        failed = await service.request("POST", "/api/tasks", "alice", json={"title": "x"})
        assert failed.status_code == 500
        assert failed.json() == problem("internal_error", "Internal server error")
        unready = await service.request("GET", "/readyz")
        assert unready.status_code == 503
        assert unready.json() == problem(
            "not_ready", "The database is not in order; `todo-api check` says what to do"
        )
        assert (await service.request("GET", "/livez")).status_code == 200


async def test_service_is_not_ready_until_a_new_database_is_migrated(
    own: OwnPostgres,
) -> None:
    """The service starts before the database exists."""
    name = f"late_{next(numbers)}"
    async with listening(own.at(name)) as service:
        assert_error(await service.request("GET", "/readyz"), 503)
        await asyncio.to_thread(execute, own.url, f"CREATE DATABASE {name}")
        answer = await service.request("GET", "/api/tasks", "alice")
        assert answer.status_code in {500, 503}
        assert_error(await service.request("GET", "/readyz"), 503)
        await asyncio.to_thread(migrations.migrate, own.at(name))
        assert (await service.request("GET", "/readyz")).status_code == 200
        await service.create("alice")
