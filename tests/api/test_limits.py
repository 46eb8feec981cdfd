"""Limits on requests in flight and on their time: excess requests get 503, and nothing leaks."""

import asyncio
import gc
import json
from asyncio import CancelledError
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import httpx2
import psycopg
import pytest
import uvicorn
from starlette.types import Message, Receive, Scope, Send
from structlog.testing import capture_logs

from support.listening import Listening, listening
from support.problems import problem
from support.service import ORIGIN, bearer, running_service
from support.waiting import LIMIT, until
from support.watching import assert_pool_is_whole, backends, terminate, waiting
from support.wire import Wire
from todo_api.errors import Overloaded, RequestTimeout
from todo_api.http.limits import Limits
from todo_api.request_context import RequestContext

FULL = 3
"""`MAX_IN_FLIGHT` of these tests."""

REQUESTS: list[tuple[int, str, str, str | None, dict[str, Any]]] = [
    (200, "GET", "/api/tasks", "alice", {}),
    (200, "HEAD", "/api/tasks", "alice", {}),
    (201, "POST", "/api/tasks", "alice", {"json": {"title": "x"}}),
    (204, "OPTIONS", "/api/tasks", None, {}),
    (400, "POST", "/api/tasks", "alice", {"json": {}}),
    (401, "GET", "/api/tasks", None, {}),
    (403, "GET", "/api/bob/tasks", "alice", {}),
    (404, "GET", "/api/tasks/9999", "alice", {}),
    (404, "GET", "/api/nothing/here", "alice", {}),
    (405, "PATCH", "/api/tasks", "alice", {}),
    (413, "POST", "/api/tasks", "alice", {"content": b" " * 131_073}),
    (415, "POST", "/api/tasks", "alice", {"content": b"{}"}),
]

TIMED_OUT = json.dumps(RequestTimeout().body()).encode()


@pytest.fixture
async def wire(database_url: str, short_folder: Path) -> AsyncIterator[Wire]:
    async with Wire(database_url, short_folder) as wire:
        yield wire


@pytest.fixture
async def small(wire: Wire) -> AsyncIterator[Listening]:
    """Yield the service with three slots."""
    limits = {"pool_size": FULL + 1, "max_in_flight": FULL, "pool_timeout": 0.1, "lock_timeout": 30}
    async with listening(wire.url, **limits) as service:
        yield service


@pytest.fixture
async def hasty(wire: Wire) -> AsyncIterator[Listening]:
    """Yield the service with a request deadline shorter than that of a statement."""
    times = {"request_timeout": 0.3, "statement_timeout": 1, "lock_timeout": 30}
    async with listening(wire.url, pool_size=2, **times) as service:
        yield service


@contextmanager
def held(sql: psycopg.Connection) -> Iterator[psycopg.Connection]:
    """Lock every task, so that changes wait until the transaction ends."""
    with psycopg.connect(sql.info.dsn) as holder:
        holder.execute("SELECT FROM tasks FOR UPDATE")
        yield holder
        holder.rollback()


def in_flight(service: Listening) -> int:
    """Return the number of requests that hold a slot."""
    app: Any = service._running.config.loaded_app
    counted: int = app.limits.in_flight
    return counted


def connections(service: Listening) -> int:
    """Return the number of open connections."""
    return len(service._running.server_state.connections)


def waiters(service: Listening) -> int:
    """Return the number of requests that wait for a slot."""
    app: Any = service._running.config.loaded_app
    counted: int = app.limits._limiter.waiting
    return counted


def change(service: Listening, task: Mapping[str, Any]) -> asyncio.Task[httpx2.Response]:
    path = f"/api/tasks/{task['id']}"
    return asyncio.create_task(service.request("PUT", path, "alice", json={"title": "y"}))


async def connect(service: Listening) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection("127.0.0.1", service.client.base_url.port)


def head(line: str, *fields: str, user: str = "alice") -> bytes:
    signed = [f"{name}: {value}" for name, value in bearer(user).items()]
    return "\r\n".join([f"{line} HTTP/1.1", "Host: x", *signed, *fields, "", ""]).encode()


def assert_is_busy(answer: httpx2.Response, code: str) -> None:
    assert answer.status_code == 503
    assert answer.json() == problem(code, "Service temporarily unavailable")
    assert answer.headers["retry-after"] == "1"
    assert answer.headers["content-type"] == "application/json"
    assert "x-request-id" in answer.headers
    assert "Origin" in answer.headers["vary"]


async def test_excess_request_is_refused_before_the_database(
    small: Listening, wire: Wire, sql: psycopg.Connection
) -> None:
    task = await small.create("alice")
    with held(sql):
        changes = [change(small, task) for _ in range(FULL)]
        await until(lambda: waiting(sql) == FULL)
        wire.reset()
        refused = await asyncio.gather(
            *(small.request("GET", "/api/tasks", user) for user in (None, "alice", "bob") * 5)
        )
        for answer in refused:
            assert_is_busy(answer, "overloaded")
        assert (wire.round_trips, wire.connections) == (0, 0)
        assert in_flight(small) == FULL
    assert {answer.status_code for answer in await asyncio.gather(*changes)} == {200}
    assert in_flight(small) == 0
    assert (await small.request("GET", "/api/tasks", "alice")).status_code == 200


async def test_burst_is_served_completely_in_lifo_order(
    database_url: str, sql: psycopg.Connection
) -> None:
    values = {"max_in_flight": 1, "pool_timeout": 30, "lock_timeout": 30}
    async with listening(database_url, **values) as service:
        task = await service.create("alice")
        order: list[int] = []

        async def add(number: int) -> int:
            title = {"title": str(number)}
            answer = await service.request("POST", "/api/tasks", "alice", json=title)
            order.append(number)
            return answer.status_code

        with held(sql):
            blocked = change(service, task)
            await until(lambda: waiting(sql) == 1)
            burst = []
            for number in range(20):
                burst.append(asyncio.create_task(add(number)))
                await until(lambda: waiters(service) == len(burst))
            assert sql.execute("SELECT count(*) FROM tasks").fetchone() == (1,)
            refused = await service.request("GET", "/api/tasks", "alice")
            assert_is_busy(refused, "overloaded")  # at once, because the queue is full
        assert await asyncio.gather(*burst) == [201] * 20
        assert (await blocked).status_code == 200
        assert order == list(reversed(range(20)))
        assert (in_flight(service), waiters(service)) == (0, 0)
        titles = sql.execute("SELECT title FROM tasks WHERE id <> %s ORDER BY id", [task["id"]])
        assert [int(title) for (title,) in titles] == order


async def test_request_with_a_stalled_body_holds_no_slot(
    small: Listening, sql: psycopg.Connection
) -> None:
    fields = "Content-Type: application/json", "Content-Length: 14"
    slow_clients = [await connect(small) for _ in range(5 * FULL)]
    for _, writer in slow_clients:
        writer.write(head("POST /api/tasks", *fields) + b'{"title"')
    for _ in range(10):
        assert (await small.request("GET", "/api/tasks", "bob")).status_code == 200
    task = await small.create("alice")
    with held(sql):
        changes = [change(small, task) for _ in range(FULL)]
        await until(lambda: waiting(sql) == FULL)
        reader, writer = slow_clients.pop()
        writer.write(b': "x"}')
        assert (await reader.readline()) == b"HTTP/1.1 503 Service Unavailable\r\n"
        writer.close()
    await asyncio.gather(*changes)
    for reader, writer in slow_clients:
        writer.write(b': "x"}')
        assert (await reader.readline()) == b"HTTP/1.1 201 Created\r\n"
        writer.close()
    assert sql.execute("SELECT count(*) FROM tasks").fetchone() == (len(slow_clients) + 1,)
    await until(lambda: in_flight(small) == 0)


async def test_health_and_documents_need_no_slot(small: Listening, sql: psycopg.Connection) -> None:
    task = await small.create("alice")
    preflight = {"Origin": ORIGIN, "Access-Control-Request-Method": "GET"}
    with held(sql):
        changes = [change(small, task) for _ in range(FULL)]
        await until(lambda: waiting(sql) == FULL)
        for path in ("/health", "/livez", "/readyz", "/docs", "/openapi.json"):
            assert (await small.request("GET", path)).status_code == 200, path
        allowed = await small.client.options("/api/tasks", headers=preflight)
        assert allowed.status_code == 204
        page = await small.client.get("/api/tasks", headers={"Origin": ORIGIN})
        assert page.headers["access-control-allow-origin"] == ORIGIN
        assert "Retry-After" in page.headers["access-control-expose-headers"]
        assert_is_busy(page, "overloaded")
    await asyncio.gather(*changes)


async def test_no_spelling_of_a_path_avoids_the_limit(
    small: Listening, sql: psycopg.Connection
) -> None:
    targets = {
        "/api/tasks": 503,
        "/api/alice/tasks": 503,
        "/api/nothing/here": 503,
        "http://elsewhere/api/tasks": 503,
        "//api/tasks": 404,
        "/./api/tasks": 404,
        "/x/../api/tasks": 404,
        "/%61pi/tasks": 404,
        "/api%2Ftasks": 404,
        "/API/tasks": 404,
        "/api": 404,
        "/health/../api/tasks": 404,
    }
    task = await small.create("alice")
    with held(sql):
        changes = [change(small, task) for _ in range(FULL)]
        await until(lambda: waiting(sql) == FULL)
        for target, expected in targets.items():
            reader, writer = await connect(small)
            writer.write(head(f"GET {target}", "Connection: close"))
            answer = await reader.read()
            writer.close()
            assert int(answer.split()[1]) == expected, target
    await asyncio.gather(*changes)


async def test_slot_is_released_after_every_answer(
    database_url: str, short_folder: Path, sql: psycopg.Connection
) -> None:
    values = {"max_in_flight": 1, "lock_timeout": 0.1}
    async with running_service(database_url, short_folder, **values) as service:
        for expected, verb, path, user, options in REQUESTS:
            for _ in range(3):
                answer = await service.request(verb, path, user, **options)
                assert answer.status_code == expected, (verb, path)
        with held(sql):
            for _ in range(3):
                answer = await service.request("PUT", "/api/tasks/1", "alice", json={"title": "y"})
                assert answer.status_code == 503
        assert (await service.request("GET", "/api/tasks", "alice")).status_code == 200


@contextmanager
def garbage() -> Iterator[list[str]]:
    """Yield a list that names, at the end, what of ours waits for the garbage collector."""
    names: list[str] = []
    gc.collect()
    gc.disable()
    try:
        yield names
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        names += sorted({name for each in gc.garbage if (name := our_name(each))})
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


def our_name(thing: object) -> str | None:
    """Name a frame or an object of the program. The others are the client's and the tests'."""
    if isinstance(thing, FrameType):
        module, name = thing.f_globals["__name__"], thing.f_code.co_qualname
    else:
        module, name = type(thing).__module__, type(thing).__name__
    return f"{module}.{name}" if module.startswith("todo_api.") else None


async def test_requests_and_connections_leave_no_garbage(
    small: Listening, sql: psycopg.Connection
) -> None:
    """The collector runs seldom. Under overload, what waited for it was 150 MB (measured)."""
    task = await small.create("alice")
    with garbage() as left:
        for expected, verb, path, user, options in REQUESTS:
            answer = await small.request(verb, path, user, **options)
            assert answer.status_code == expected, (verb, path)
        with held(sql):
            changes = [change(small, task) for _ in range(FULL)]
            await until(lambda: waiting(sql) == FULL)
            assert_is_busy(await change(small, task), "overloaded")
        await asyncio.gather(*changes)
        _, writer = await connect(small)
        writer.write(head("GET /api/tasks") + b"not HTTP")
        writer.close()
        await small.client.aclose()
        await until(lambda: not connections(small))
        del changes, answer, writer
    assert left == []


async def test_slot_is_released_when_the_database_disconnects(
    small: Listening, sql: psycopg.Connection
) -> None:
    task = await small.create("alice")
    with held(sql):
        changes = [change(small, task) for _ in range(FULL)]
        await until(lambda: waiting(sql) == FULL)
        before = backends(sql)
        terminate(sql)
        await until(lambda: before.isdisjoint(backends(sql)) and waiting(sql) == FULL)
        terminate(sql)  # twice, because the service tries each statement twice
        answers = await asyncio.gather(*changes)
    assert {answer.status_code for answer in answers} == {500}
    assert in_flight(small) == 0
    assert (await small.request("GET", "/api/tasks", "alice")).status_code == 200


@pytest.mark.parametrize("waits_for", ["the body", "a lock"])
async def test_slot_is_released_when_the_client_leaves(
    small: Listening, sql: psycopg.Connection, waits_for: str
) -> None:
    task = await small.create("alice")
    body = b'{"title": "y"}'
    fields = "Content-Type: application/json", f"Content-Length: {len(body)}"
    request = head(f"PUT /api/tasks/{task['id']}", *fields) + body
    with held(sql):
        clients = [(await connect(small))[1] for _ in range(FULL)]
        for client in clients:
            client.write(request if waits_for == "a lock" else request[:-1])
        if waits_for == "a lock":
            await until(lambda: in_flight(small) == waiting(sql) == FULL)
        for client in clients:
            client.transport.abort()
    await until(lambda: in_flight(small) == 0)
    assert (await small.request("GET", "/api/tasks", "alice")).status_code == 200


async def test_pipelined_requests_hold_no_slot(small: Listening, sql: psycopg.Connection) -> None:
    task = await small.create("alice")
    change_it = head(f"PATCH /api/tasks/{task['id']}/complete")
    with held(sql):
        reader, writer = await connect(small)
        writer.write(change_it * 5 + head("GET /api/tasks", "Connection: close"))
        await until(lambda: waiting(sql) == 1)
        assert in_flight(small) == 1
    answer = await reader.read()
    writer.close()
    assert answer.count(b"HTTP/1.1 200 OK") == 6


async def test_request_to_a_frozen_database_ends_at_the_deadline(
    hasty: Listening, wire: Wire, sql: psycopg.Connection
) -> None:
    """The database does not answer, and its own timeout is longer. The pool recovers."""
    task = await hasty.create("alice")
    wire.frozen = True
    with capture_logs() as log:
        answers = [
            await hasty.request(verb, path, "alice", json=body)
            for verb, path, body in (
                ("GET", "/api/tasks", None),
                ("PUT", f"/api/tasks/{task['id']}", {"title": "y"}),
                ("GET", "/api/tasks", None),  # waits in the pool, because no connection is left
            )
        ]
    for answer in answers:
        assert_is_busy(answer, "timeout")
    assert [each.get("error") for each in log] == ["RequestTimeout"] * 3
    assert in_flight(hasty) == 0
    wire.frozen = False
    await until(lambda: wire_is_free(hasty))
    hasty.set_deadline(LIMIT)  # a busy machine needs more than the short one
    await assert_pool_is_whole(hasty, sql, 2)


def wire_is_free(service: Listening) -> bool:
    """Tell whether no connection waits for a lost answer."""
    app: Any = service._running.config.loaded_app
    levels: dict[str, float] = app._open_tasks.keywords["database"].pool.levels()
    return levels["pool_busy"] == 0


async def test_stalled_body_is_answered_at_the_deadline(
    hasty: Listening, sql: psycopg.Connection
) -> None:
    fields = "Content-Type: application/json", "Content-Length: 14"
    reader, writer = await connect(hasty)
    with capture_logs() as log:
        writer.write(head("POST /api/tasks", *fields) + b'{"title"')
        answer = await reader.readuntil(b"\r\n\r\n")
        body = await reader.readexactly(len(TIMED_OUT))
    assert answer.startswith(b"HTTP/1.1 503 ")
    assert b"\r\nretry-after: 1\r\n" in answer
    assert body == TIMED_OUT
    assert [each.get("error") for each in log] == ["RequestTimeout"]
    assert in_flight(hasty) == 0
    writer.write(b': "x"}' + head("GET /api/tasks", "Connection: close"))
    assert (await reader.read()).startswith(b"HTTP/1.1 200 ")
    writer.close()
    assert sql.execute("SELECT count(*) FROM tasks").fetchone() == (0,)


async def test_connection_that_waits_for_a_lock_outlives_the_deadline(
    hasty: Listening, sql: psycopg.Connection
) -> None:
    """The pool gets the connection back when the statement has ended."""
    task = await hasty.create("alice")
    with held(sql):
        for answer in await asyncio.gather(*(change(hasty, task) for _ in range(2))):
            assert_is_busy(answer, "timeout")
        assert in_flight(hasty) == 0
    hasty.set_deadline(LIMIT)
    await assert_pool_is_whole(hasty, sql, 2)


async def test_request_that_shutdown_cancels_is_not_a_timeout(
    database_url: str, sql: psycopg.Connection
) -> None:
    times = {"request_timeout": 30, "lock_timeout": 30, "statement_timeout": 30}
    async with listening(database_url, shutdown_timeout=1, **times) as service:
        task = await service.create("alice")
        with held(sql), capture_logs() as log:
            waits = change(service, task)
            await until(lambda: waiting(sql) == 1)
            await service.stop()
            assert_is_busy(await waits, "shutting_down")
        assert [each["error"] for each in log if each["event"] == "request"] == ["ShuttingDown"]
        assert in_flight(service) == 0


async def nothing(_: Any = None) -> Any:
    raise AssertionError("not called")


def limits(handler: Callable[[], Awaitable[None]], seconds: float, maximum: int = 1) -> Limits:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        del scope, receive, send
        await handler()

    return Limits(app, in_flight=maximum, wait=0.01, seconds=seconds)


async def ask(limited: Limits) -> None:
    async def receive() -> Message:
        raise AssertionError("not called")

    async with asyncio.timeout(LIMIT):
        scope = {"method": "GET", "raw_path": b"/api/tasks", "headers": []}
        await limited(scope, receive, nothing)


async def test_cancellation_before_the_deadline_is_passed_on() -> None:
    limited = limits(asyncio.Event().wait, 30)  # type: ignore[arg-type]
    task = asyncio.create_task(ask(limited))
    await until(lambda: limited.in_flight == 1)
    with pytest.raises(Overloaded):
        await ask(limited)
    assert limited.in_flight == 1
    task.cancel()
    with pytest.raises(CancelledError):
        await task
    assert limited.in_flight == 0


async def test_deadline_leaves_no_pending_cancellation() -> None:
    limited = limits(asyncio.Event().wait, 0.01)  # type: ignore[arg-type]
    with pytest.raises(RequestTimeout):
        await ask(limited)
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


async def test_request_waits_for_a_new_slot_after_its_body(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("todo_api.http.limits.WAITERS_PER_SLOT", 1)
    body: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
    asks_for_its_body = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        del receive, send
        if not asks_for_its_body.is_set():
            asks_for_its_body.set()
            await RequestContext.of(scope).await_body(body)
        await asyncio.Event().wait()

    limited = Limits(app, in_flight=1, wait=10, seconds=30)
    slow = asyncio.create_task(ask(limited))
    await asks_for_its_body.wait()
    others = [asyncio.create_task(ask(limited)) for _ in range(2)]
    await until(lambda: limited._limiter.waiting == 1)
    body.set_result({"type": "http.request"})
    with pytest.raises(Overloaded):
        await slow
    assert limited.in_flight == 1
    for other in others:
        other.cancel()
    assert await asyncio.gather(*others, return_exceptions=True)
    assert limited.in_flight == 0


def test_deadline_is_recognized_on_uvloop() -> None:
    """uvloop rounds the clock and the times of timers differently."""

    async def count_timeouts() -> int:
        limited = limits(asyncio.Event().wait, 0.007, maximum=1000)  # type: ignore[arg-type]
        outcomes = []
        for _ in range(20):
            outcomes += await asyncio.gather(
                *(ask(limited) for _ in range(5)), return_exceptions=True
            )
            await asyncio.sleep(0.001)
        return sum(isinstance(outcome, RequestTimeout) for outcome in outcomes)

    factory = uvicorn.Config("unused").get_loop_factory()
    with asyncio.Runner(loop_factory=factory) as runner:
        assert runner.run(count_timeouts()) == 100
