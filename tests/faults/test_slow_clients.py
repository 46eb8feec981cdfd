"""Hundreds of slow clients: the server disconnects them, and the others notice nothing.

The real server in this process, with its limits of time made short.
"""

import asyncio
import resource
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import httpx2
import psutil
import psycopg
import pytest

from support.http import LOCAL
from support.listening import Listening, listening
from support.pages import LARGEST, address_of
from support.program import Program, command, environment
from support.service import SECRET, token
from support.waiting import LIMIT, until
from support.watching import assert_pool_is_whole
from todo_api import server
from todo_api.http import protocol
from todo_api.settings import Settings

SECONDS = 0.5
"""The time limit for a slow client, in place of ten seconds."""

IDLE_SECONDS = 3
"""The time limit for an idle connection."""

SIGNED = f"Authorization: Bearer {token('alice')}\r\n"
LIST = f"GET /api/tasks HTTP/1.1\r\nHost: x\r\n{SIGNED}\r\n".encode()
POST = f"POST /api/tasks HTTP/1.1\r\nHost: x\r\n{SIGNED}Content-Type: application/json\r\n".encode()
BODY = b'{"title": "buy groceries"}'


@pytest.fixture
async def service(database_url: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Listening]:
    """Yield the service with short time limits and small send buffers."""
    monkeypatch.setattr(protocol, "FIRST_BYTE_SECONDS", IDLE_SECONDS)
    monkeypatch.setattr(protocol, "HEAD_SECONDS", SECONDS)
    monkeypatch.setattr(protocol, "STALL_SECONDS", SECONDS)
    monkeypatch.setattr(protocol, "DISCARD_SECONDS", SECONDS)
    listener = server.listener

    def with_small_buffers(settings: Settings) -> socket.socket:
        made = listener(settings)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        return made

    monkeypatch.setattr(server, "listener", with_small_buffers)
    values = {
        "pool_size": 4,
        "pool_timeout": LIMIT,
        "log_level": "warning",
        "keep_alive_timeout": IDLE_SECONDS,
    }
    async with listening(database_url, request_timeout=LIMIT, **values) as running:
        await running.client.aclose()
        running.client = (
            httpx2.AsyncClient(  # without keep-alive, because the server closes idle connections
                base_url=running.client.base_url,
                **LOCAL,
                limits=httpx2.Limits(max_connections=None, max_keepalive_connections=0),
            )
        )
        yield running


Connect = Callable[[int], Awaitable[list[socket.socket]]]


@pytest.fixture
def connect(service: Listening, monkeypatch: pytest.MonkeyPatch) -> Iterator[Connect]:
    """Yield a function that opens connections with small receive buffers.

    It returns when the server has accepted all of them. The server may have closed some by then.
    """
    clients: list[socket.socket] = []
    accepted: list[object] = []
    accept = protocol.StrictProtocol.connection_made

    def connection_made(self: protocol.StrictProtocol, transport: asyncio.Transport) -> None:
        accepted.append(transport)
        accept(self, transport)

    monkeypatch.setattr(protocol.StrictProtocol, "connection_made", connection_made)

    async def connect(number: int) -> list[socket.socket]:
        before = len(accepted)
        loop = asyncio.get_running_loop()
        for _ in range(number):
            clients.append(client := socket.socket())
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.setblocking(False)
            await loop.sock_connect(client, ("127.0.0.1", service.client.base_url.port))
        await until(lambda: len(accepted) >= before + number)
        return clients[-number:]

    yield connect
    for client in clients:
        client.close()


def connections(service: Listening) -> set[Any]:
    """Return the server's connections."""
    return service._running.server_state.connections


async def trickle(clients: list[socket.socket], data: bytes) -> None:
    """Send a byte at a time on every connection, until the server has closed them all."""
    open_clients = set(clients)
    for position in range(1_000_000):
        if not open_clients:
            return
        byte = data[position % len(data)].to_bytes()
        for client in list(open_clients):
            with suppress(BlockingIOError):
                if is_closed(client, byte):
                    open_clients.discard(client)
        await asyncio.sleep(0.02)


def is_closed(client: socket.socket, byte: bytes) -> bool:
    """Send a byte, and tell whether the server has closed the connection."""
    try:
        client.send(byte)
        return client.recv(65_536) == b""
    except (BrokenPipeError, ConnectionResetError):
        return True


async def assert_good_traffic_goes_on(service: Listening, rounds: int = 3) -> None:
    """Check that many reads and writes succeed."""
    for _ in range(rounds):
        answers = await asyncio.gather(
            *(service.request("GET", "/api/tasks", "bob") for _ in range(20)),
            *(service.request("POST", "/api/tasks", "bob", json={"title": "x"}) for _ in range(5)),
            *(service.request("GET", "/livez") for _ in range(5)),
        )
        assert [answer.status_code for answer in answers] == [200] * 20 + [201] * 5 + [200] * 5


async def assert_cut_off(service: Listening) -> None:
    """Check that the server closes every connection."""
    await until(lambda: not connections(service))


async def test_head_sent_byte_by_byte_is_cut_off(
    service: Listening, connect: Connect, sql: psycopg.Connection
) -> None:
    clients = await connect(300)
    slow = asyncio.create_task(trickle(clients, b"GET /api/tasks HTTP/1.1\r\nHost: " + b"x" * 900))
    await assert_good_traffic_goes_on(service)
    async with asyncio.timeout(LIMIT):
        await slow
    await assert_cut_off(service)
    await assert_pool_is_whole(service, sql, 4)


async def test_thousands_of_connections_without_a_request_are_closed(
    service: Listening, connect: Connect
) -> None:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    await connect(min(2000, (soft - 300) // 2))
    await assert_good_traffic_goes_on(service)
    await assert_cut_off(service)


async def test_idle_connections_are_closed(service: Listening, connect: Connect) -> None:
    loop = asyncio.get_running_loop()
    for _ in range(200):
        (client,) = await connect(1)
        await loop.sock_sendall(client, b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (await loop.sock_recv(client, 65_536)).startswith(b"HTTP/1.1 200 ")
    await assert_cut_off(service)


async def test_idle_connection_is_kept_longer_than_one_without_a_request(
    service: Listening, connect: Connect
) -> None:
    service._running.config.timeout_keep_alive = 60
    used, unused, slow = await connect(3)
    loop = asyncio.get_running_loop()
    for client in (used, slow):
        await loop.sock_sendall(client, b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (await loop.sock_recv(client, 65_536)).startswith(b"HTTP/1.1 200 ")
    await loop.sock_sendall(slow, b"GET /livez HTTP/1.1\r\n")
    async with asyncio.timeout(LIMIT):
        assert await read_to_the_end(slow) == await read_to_the_end(unused) == b""
    await loop.sock_sendall(used, b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
    assert (await loop.sock_recv(used, 65_536)).startswith(b"HTTP/1.1 200 ")


async def test_blank_lines_do_not_keep_a_connection_open(
    service: Listening, connect: Connect
) -> None:
    clients = await connect(50)
    async with asyncio.timeout(LIMIT):
        await trickle(clients, b"\r\n")
    await assert_cut_off(service)


@pytest.mark.parametrize(
    "framing",
    [b"Content-Length: 5000\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n1000\r\n"],
    ids=["length", "chunked"],
)
async def test_body_sent_byte_by_byte_is_cut_off(
    service: Listening, connect: Connect, sql: psycopg.Connection, framing: bytes
) -> None:
    clients = await connect(200)
    loop = asyncio.get_running_loop()
    service.set_deadline(4 * SECONDS)
    for client in clients:
        await loop.sock_sendall(client, POST + framing)
    await until(lambda: all(each.cycle for each in connections(service)))
    await asyncio.sleep(0)  # so that the last one also begins
    service.set_deadline(LIMIT)
    slow = asyncio.create_task(trickle(clients, BODY))
    await assert_good_traffic_goes_on(service)
    async with asyncio.timeout(LIMIT):
        await slow
    await assert_cut_off(service)
    await assert_pool_is_whole(service, sql, 4)
    stored = sql.execute("SELECT count(*) FROM tasks WHERE user_id = 'alice'").fetchone()
    assert stored == (0,)


async def test_refused_body_sent_byte_by_byte_is_cut_off(
    service: Listening, connect: Connect
) -> None:
    """The answer is 401, and then the server closes the connection."""
    head = POST.replace(SIGNED.encode(), b"") + b"Content-Length: 5000\r\n\r\n"
    clients = await connect(50)
    loop = asyncio.get_running_loop()
    for client in clients:
        await loop.sock_sendall(client, head)
        assert (await loop.sock_recv(client, 65_536)).startswith(b"HTTP/1.1 401 ")
    async with asyncio.timeout(LIMIT):
        await trickle(clients, BODY)
    await assert_cut_off(service)


def fill(sql: psycopg.Connection, tasks: int) -> None:
    """Create tasks of four thousand bytes for alice."""
    sql.execute("INSERT INTO users (id, version) VALUES ('alice', 1)")
    sql.execute(
        "INSERT INTO tasks (user_id, title, description, version)"
        " SELECT 'alice', 'x', repeat('y', 4000), 1 FROM generate_series(1, %s)",
        [tasks],
    )


@pytest.mark.parametrize(
    ("tasks", "fields", "requests"),
    [(40, b"", 1), (40, b"Connection: close\r\n", 5), (3000, b"", 5)],
)
async def test_client_that_reads_no_list_is_cut_off(
    service: Listening,
    connect: Connect,
    sql: psycopg.Connection,
    tasks: int,
    fields: bytes,
    requests: int,
) -> None:
    fill(sql, tasks)
    clients = await connect(20)
    loop = asyncio.get_running_loop()
    for client in clients:
        await loop.sock_sendall(client, LIST * (requests - 1))
        await loop.sock_sendall(client, LIST[:-2] + fields + b"\r\n")
    await assert_good_traffic_goes_on(service)
    await assert_cut_off(service)
    await assert_pool_is_whole(service, sql, 4)


async def test_invalid_data_does_not_keep_an_unread_list(
    service: Listening, connect: Connect, sql: psycopg.Connection
) -> None:
    fill(sql, 40)
    loop = asyncio.get_running_loop()
    clients = await connect(20)
    for client in clients:
        await loop.sock_sendall(client, LIST)
    await until(lambda: sum(unsent(each) > 0 for each in connections(service)) == len(clients))
    for client in clients:
        await loop.sock_sendall(client, b"GARBAGE\r\n\r\n")
    await assert_cut_off(service)


def unsent(connection: Any) -> int:
    """Return how many bytes wait in the server for the client to read."""
    held: int = connection.transport.get_write_buffer_size()
    return held


async def test_client_that_reads_no_document_is_cut_off(
    service: Listening, connect: Connect
) -> None:
    """Documents have no request deadline."""
    loop = asyncio.get_running_loop()
    for client in await connect(20):
        await loop.sock_sendall(client, b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * 50)
    await assert_good_traffic_goes_on(service)
    await assert_cut_off(service)


async def test_request_behind_unread_answers_holds_no_slot(
    service: Listening, connect: Connect, sql: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Documents need no slot, but the lists pipelined behind them do."""
    app: Any = service._running.config.loaded_app
    monkeypatch.setattr(app.limits._limiter, "_slots", 2)
    monkeypatch.setattr(protocol, "STALL_SECONDS", 60)
    fill(sql, 3)
    loop = asyncio.get_running_loop()
    address = address_of(LARGEST, (await service.request("GET", "/docs")).text)
    document = f"GET {address} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
    for client in await connect(5):
        await loop.sock_sendall(client, document + LIST)
    await until(lambda: sum(unsent(each) > 0 for each in connections(service)) == 5)
    for _ in range(5):
        assert app.limits.in_flight == 0
        assert (await service.request("GET", "/api/tasks", "bob")).status_code == 200


async def test_list_that_is_read_slowly_ends_at_the_deadline(
    service: Listening, connect: Connect, sql: psycopg.Connection
) -> None:
    """The client always reads something, so only the request deadline ends it."""
    fill(sql, 3000)
    (client,) = await connect(1)
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(client, LIST)
    answer = b""
    with suppress(ConnectionResetError):
        while data := await loop.sock_recv(client, 1024):
            answer += data
            await asyncio.sleep(0.01)
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert not answer.endswith(b"0\r\n\r\n")
    await assert_cut_off(service)
    await assert_pool_is_whole(service, sql, 4)


async def test_number_of_parsed_pipelined_requests_is_limited(
    service: Listening, connect: Connect
) -> None:
    """Parsed requests take memory of the server, others that of the client."""
    most = 0

    def look() -> None:
        nonlocal most
        most = max([most, *(len(each._unanswered) for each in list(connections(service)))])

    (client,) = await connect(1)
    watch = asyncio.create_task(every(0.005, look))
    loop = asyncio.get_running_loop()
    reading = asyncio.create_task(read_to_the_end(client))
    with suppress(ConnectionError):
        await loop.sock_sendall(client, b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n" * 30_000)
    await assert_good_traffic_goes_on(service, 1)
    watch.cancel()
    reading.cancel()
    assert 0 < most <= 10_000, f"{most} pipelined requests were parsed"
    await assert_good_traffic_goes_on(service, 1)
    reading.cancel()


async def every(seconds: float, do: Callable[[], None]) -> None:
    while True:
        do()
        await asyncio.sleep(seconds)


async def read_to_the_end(client: socket.socket) -> bytes:
    """Read until the server closes the connection."""
    answer = b""
    with suppress(ConnectionResetError):
        while data := await asyncio.get_running_loop().sock_recv(client, 65_536):
            answer += data
    return answer


@pytest.mark.parametrize("end", [b"0\r\nA: ", b"0\r\n"], ids=["one", "many"])
async def test_endless_trailer_is_refused(service: Listening, connect: Connect, end: bytes) -> None:
    trailer = b"x" * 65_536 if end.endswith(b" ") else b"A: b\r\n" * 10_000
    (client,) = await connect(1)
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(client, POST + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n" + end)
    sent = 0
    with suppress(ConnectionError):
        while sent < 30_000_000:
            await loop.sock_sendall(client, trailer)
            sent += len(trailer)
    assert sent < 30_000_000
    await assert_good_traffic_goes_on(service, 1)


async def test_connection_is_closed_after_a_refusal_in_place_of_100_continue(
    connect: Connect,
) -> None:
    """The client may or may not send the body, so the next byte is ambiguous."""
    head = b"POST /api/tasks HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 14\r\n"
    (client,) = await connect(1)
    await asyncio.get_running_loop().sock_sendall(client, head + b"\r\n")
    answer = await read_to_the_end(client)
    assert answer.startswith(b"HTTP/1.1 401 ")
    assert b"\r\nconnection: close\r\n" in answer


async def test_time_for_a_head_starts_after_the_request_in_flight(
    service: Listening, connect: Connect, sql: psycopg.Connection
) -> None:
    """The server does not read on before it has answered."""
    task = await service.create("alice")
    change = LIST.replace(b"GET /api/tasks", b"PATCH /api/tasks/%d/complete" % task["id"])
    (client,) = await connect(1)
    with psycopg.connect(sql.info.dsn) as holder:
        holder.execute("SELECT FROM tasks FOR UPDATE")
        last = LIST[:-2] + b"Connection: close\r\n\r\n"
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(client, change + LIST + last[:20])
        await asyncio.sleep(1.2 * SECONDS)  # longer than HEAD_SECONDS
        holder.rollback()
    await loop.sock_sendall(client, last[20:])
    answer = await read_to_the_end(client)
    assert answer.count(b"HTTP/1.1 200 OK") == 3


def test_program_survives_a_lack_of_file_descriptors(tmp_path: Path, database_url: str) -> None:
    """More clients than open files: some wait or are disconnected, and later all are served."""
    variables = {"DATABASE_URL": database_url, "BETTER_AUTH_SECRET": SECRET, "POOL_SIZE": "4"}
    with (tmp_path / "log").open("w") as log, ExitStack() as stack:
        process = subprocess.Popen(
            ["sh", "-c", 'ulimit -n 64 && exec "$@"', "sh", *command("serve", "--port", "0")],
            cwd=tmp_path,
            env=environment(**variables),
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        stack.callback(process.wait)
        stack.callback(process.kill)
        program = Program(process)
        with program.client(token("alice")) as client:
            assert client.post("/api/tasks", json={"title": "x"}).status_code == 201
        overrun(program)
        with program.client(token("alice")) as client:
            until_answered(client)
            assert client.post("/api/tasks", json={"title": "x"}).status_code == 201
            assert len(client.get("/api/tasks").json()) == 2
        assert psutil.Process(process.pid).num_fds() < 40
        assert program.stop() == 0
        assert process.stdout is not None
        process.stdout.close()
    assert "Traceback" not in (tmp_path / "log").read_text()


def overrun(program: Program) -> None:
    """Open more connections than the program can accept, and send requests."""
    with ExitStack() as stack:
        clients = [stack.enter_context(program.connect()) for _ in range(150)]
        for client in clients:
            with suppress(OSError):
                client.sendall(LIST)
        # Some are 500, because a database connection needs a descriptor too.
        answers = [client.recv(12) for client in clients[:30]]
        assert {b"HTTP/1.1 200"} <= set(answers) <= {b"HTTP/1.1 200", b"HTTP/1.1 500", b""}


def until_answered(client: httpx2.Client) -> None:
    """Send requests until one is answered, after the program has closed old connections."""
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline:
        with suppress(httpx2.TransportError):
            if client.get("/livez").status_code == 200:
                return
    pytest.fail("no answer any more")
