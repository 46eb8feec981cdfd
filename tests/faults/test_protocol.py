"""Raw bytes that no client library sends, to the program as a process."""

import json
import shutil
import socket
import struct
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import httpx2
import psycopg
import pytest

from support.http import LOCAL
from support.pages import LARGEST, address_of
from support.problems import problem
from support.program import Program, serving
from support.service import SECRET, bearer, token
from support.waiting import wait_for

LINE = b"POST /api/tasks HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
SIGNED = f"Authorization: Bearer {token('alice')}\r\n".encode()
BODY = b'{"title": "x"}'
WHOLE = LINE + SIGNED + b"Content-Length: 14\r\nConnection: close\r\n\r\n" + BODY


@pytest.fixture(scope="module")
def database_url(database_url_of_module: str) -> str:
    return database_url_of_module


@pytest.fixture(scope="module")
def folder(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """Yield the program's folder, and remove it unless a test has failed."""
    made = tmp_path_factory.mktemp("program")
    failed = request.session.testsfailed
    yield made
    if request.session.testsfailed == failed:
        shutil.rmtree(made)


@pytest.fixture(scope="module")
def running(folder: Path, database_url: str) -> Iterator[Program]:
    with serving(folder, DATABASE_URL=database_url, BETTER_AUTH_SECRET=SECRET) as program:
        yield program
        assert program.stop() == 0


@pytest.fixture
def program(running: Program, folder: Path, sql: psycopg.Connection) -> Iterator[Program]:
    """Yield the program on an empty database, and check it after the test."""
    sql.execute("TRUNCATE users CASCADE")
    yield running
    assert httpx2.get(f"{running.address}/livez", **LOCAL).status_code == 200
    assert "Traceback" not in (folder / "log").read_text()


def exchange(program: Program, request: bytes) -> bytes:
    """Send bytes and read to the end of the connection."""
    with program.connect() as connection:
        connection.sendall(request)
        return read(connection)


def read(connection: socket.socket) -> bytes:
    answer = b""
    while data := connection.recv(65_536):
        answer += data
    return answer


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


@pytest.mark.parametrize("length", [1_048_577, 3_000_000])
def test_refusal_of_a_body_that_is_too_long_to_skip_announces_the_end(
    program: Program, length: int
) -> None:
    head = b"POST /api/tasks/batch HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n" % length
    with program.connect() as connection:
        connection.sendall(head + SIGNED + b"\r\n" + b" " * 1000)
        answer = read(connection)
    assert status(answer) == 413
    assert b"\r\nconnection: close\r\n" in answer.lower()


def test_unusual_request_line_gets_its_status(program: Program) -> None:
    lines = {
        "GET /api/x/../tasks HTTP/1.1": 404,
        "GET /api/./tasks HTTP/1.1": 404,
        "GET //api/tasks HTTP/1.1": 404,
        "GET /docs/../../../etc/passwd HTTP/1.1": 404,
        "GET /docs/%2e%2e/%2e%2e/etc/passwd HTTP/1.1": 404,
        "OPTIONS * HTTP/1.1": 404,
        "GET http://evil/api/tasks HTTP/1.1": 401,
        "GARBAGE": 400,
        "FOO /health HTTP/1.1": 405,
        "GET * HTTP/1.1": 400,
        "GET http://x HTTP/1.1": 200,
        "GET HTTP://x/health HTTP/1.1": 200,
        "GET /health HTTP/9.9": 400,
        "GET /health HTTP/2.0": 400,
        "GET /health": 400,
        "GET /health\x00 HTTP/1.1": 400,
        "CONNECT /health HTTP/1.1": 405,
        "TRACE /health HTTP/1.1": 405,
    }
    for line, expected in lines.items():
        answer = exchange(program, f"{line}\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        assert status(answer) == expected, line
        head, _, body = answer.partition(b"\r\n\r\n")
        assert expected == 200 or json.loads(body)["error"], line
        assert b"x-request-id: " in head.lower(), line


INVALID_TARGETS = [
    *("/health#x", "/health#", "/health?x#y", "http://x/health#y", "#", "*#"),
    *("/health?<x>", '/health?"', "/a\\b", "/a`b", "/{id}", "/<a>"),
    *("http://user@x/health", "http:///health", "http://x:99999/health", "http://[zz]/health"),
    *("ftp://x/health", "file:///health", "/api/%", "/api/%4", "/api/%zz/tasks", "/api/%ff/tasks"),
    *("/api/%ed%a0%80/tasks", "/api/%c3", "/health%", "health", "?x"),
]


@pytest.mark.parametrize("target", INVALID_TARGETS)
def test_invalid_target_is_refused(program: Program, target: str) -> None:
    request = f"GET {target} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
    assert status(exchange(program, request)) == 400


@pytest.mark.parametrize(
    "target",
    [
        "/health?[x]|{y}^`\\'%",
        "/health?a%",
        "/health?%ff",
        "http://[::1]:80/health",
        "/health??x?y",
    ],
)
def test_target_that_browsers_send_is_accepted(program: Program, target: str) -> None:
    """The URL Standard encodes less than RFC 3986 asks for, above all in a query."""
    request = f"GET {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode()
    assert status(exchange(program, request)) == 200


def test_user_id_with_unusual_characters_is_decoded(program: Program) -> None:
    for spelling in ("auth0|1[2]", "auth0%7C1%5b2%5D"):
        signed = f"Authorization: Bearer {token('auth0|1[2]')}\r\nConnection: close\r\n"
        request = f"GET /api/{spelling}/tasks HTTP/1.1\r\nHost: x\r\n{signed}\r\n".encode()
        assert status(exchange(program, request)) == 200


INVALID_HOSTS = [
    *(b"a b/@:x", b"a b", b"a/b", b"user@x", b"x:y", b"x:80:80", b"http://x", b"a,b c", b"a?b"),
    *(b"a#b", b"[::1", b"::1", b"[x]", b"[:::1]", b"[1.2.3.4]", b"[::1]x", b"a%2", b"a%zz"),
    *(b"\xc3\xa9", b"a\\b", b'"x"', b"<x>", b"x:-1"),
]


@pytest.mark.parametrize("version", [b"1.0", b"1.1"])
@pytest.mark.parametrize("host", INVALID_HOSTS)
def test_invalid_host_is_refused(program: Program, host: bytes, version: bytes) -> None:
    request = b"GET /health HTTP/" + version + b"\r\nHost: " + host + b"\r\n\r\n"
    assert status(exchange(program, request)) == 400


@pytest.mark.parametrize(
    "host",
    [
        *(
            b"",
            b"x",
            b"X.example:8000",
            b"x:",
            b"a_b.example",
            b"127.0.0.1:80",
            b"xn--bcher-kva.de",
        ),
        *(b"[::1]", b"[::ffff:1.2.3.4]:8000", b"caf%C3%A9.example", b"a,b", b"  x  ", b"x."),
    ],
)
def test_valid_host_is_accepted(program: Program, host: bytes) -> None:
    fields = b"Host: " + host + b"\r\nConnection: close\r\n\r\n"
    assert status(exchange(program, b"GET /health HTTP/1.1\r\n" + fields)) == 200


METHODS = [
    b"XGET",
    b"patch",
    b"Get",
    b"FOO",
    b"PATCHX",
    b"DESCRIBE",
    b"M-SEARCH",
    b"!#$%&'*+-.^_`|~1",
    b"X" * 32,
]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("split", [0, 1, 2, 1000])
def test_unknown_method_is_405_or_404_and_the_connection_goes_on(
    program: Program, method: bytes, split: int
) -> None:
    fields = b" HTTP/1.1\r\nHost: x\r\nContent-Length: 14\r\n\r\n" + BODY
    for path, expected in (b"/api/tasks/1", 405), (b"/nothing", 404):
        request = method + b" " + path + fields
        with program.connect() as connection:
            connection.sendall(request[:split])
            time.sleep(0.01)  # the parts must arrive separately, and no event tells when
            connection.sendall(request[split:])
            answer = connection.recv(65_536)
            assert status(answer) == expected
            allow = b"\r\nallow: DELETE, GET, HEAD, OPTIONS, P"
            assert (allow in answer) is (expected == 405)
            hint = b"methods are case-sensitive" in answer
            assert hint is (expected == 405 and method != method.upper())
            connection.sendall(WHOLE)
            assert status(read(connection)) == 201


def test_method_in_lower_case_is_logged_and_has_cors_headers(
    program: Program, folder: Path
) -> None:
    before = len(lines_of(folder))
    fields = b"Host: x\r\nOrigin: http://localhost:3000\r\nConnection: close\r\n\r\n"
    answer = exchange(program, b"\r\n\r\npatch /api/tasks/1 HTTP/1.1\r\n" + fields)
    assert b"\r\naccess-control-allow-origin: http://localhost:3000\r\n" in answer
    wait_for(partial(lines_of, folder, before))
    (line,) = lines_of(folder, before)
    assert (line["method"], line["status"], line["error"]) == ("patch", 405, "MethodNotAllowed")


@pytest.mark.parametrize(
    "start", [b"X" * 33 + b" / HTTP/1.1", b"(x) / HTTP/1.1", b"\x16\x03\x01\x02", b"get", b" / "]
)
def test_data_that_begins_without_a_method_is_invalid(program: Program, start: bytes) -> None:
    assert status(exchange(program, start + b"\r\nHost: x\r\n\r\n")) == 400


def test_unknown_method_is_answered_after_the_request_in_flight(
    program: Program, database_url: str
) -> None:
    with program.connect() as connection, psycopg.connect(database_url) as holder:
        holder.execute("LOCK TABLE tasks IN SHARE MODE")
        connection.sendall(WHOLE.replace(b"Connection: close\r\n", b""))
        time.sleep(0.01)  # the parts must arrive separately, and no event tells when
        connection.sendall(b"patch /api/tasks/1 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        holder.rollback()
        answer = read(connection)
    assert answer.index(b"HTTP/1.1 201 Created") < answer.index(b"HTTP/1.1 405 Method Not Allowed")


@pytest.mark.parametrize(
    "fields",
    [
        b"",
        b"Host: x\r\nHost: y\r\n",
        b"Host: x\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n",
        b"Host: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n",
        b"Host: x\r\nContent-Length: -1\r\n",
        b"Host: x\r\nTransfer-Encoding: gzip, chunked\r\n",
        b"Host: x\r\nTransfer-Encoding: xchunked\r\n",
        b"Host : x\r\n",
        b"Host: x\r\nA: b\r\n c\r\n",
        b"Host: x\r\nA: \x00\r\n",
    ],
)
def test_ambiguous_framing_is_refused(program: Program, fields: bytes) -> None:
    answer = exchange(program, b"GET /health HTTP/1.1\r\n" + fields + b"\r\n")
    assert status(answer) == 400
    assert b'{"error": ' in answer


def test_large_head_is_refused_early(program: Program) -> None:
    start = b"GET /health HTTP/1.1\r\nHost: x\r\n"
    assert (
        status(exchange(program, start + b"A: " + b"x" * 60_000 + b"\r\nConnection: close\r\n\r\n"))
        == 200
    )
    assert status(exchange(program, start + b"A: " + b"x" * 70_000 + b"\r\n\r\n")) == 431
    assert status(exchange(program, start + b"A: b\r\n" * 300 + b"\r\n")) == 431
    with program.connect() as connection:
        sent = 0
        connection.sendall(start + b"A: ")
        try:
            while sent < 50_000_000:
                connection.sendall(b"x" * 65_536)
                sent += 65_536
        except OSError:
            pass
        assert sent < 10_000_000, "the server reads an endless header field"


@pytest.mark.parametrize("size", [8_193, 60_000, 70_000, 1_000_000])
def test_long_target_is_414(program: Program, size: int) -> None:
    fields = (
        b" HTTP/1.1\r\nHost: x\r\nX-Request-ID: long-1\r\nOrigin: http://localhost:3000\r\n\r\n"
    )
    answer = exchange(program, b"GET /health?" + b"x" * (size - len("/health?")) + fields)
    assert status(answer) == 414
    assert json.loads(answer.rpartition(b"\r\n")[2])["error"] == (
        "The request target must be 8192 bytes or less"
    )
    if size < 65_536:  # the server has read all of the head
        assert b"\r\nx-request-id: long-1\r\n" in answer
        assert b"\r\naccess-control-allow-origin: http://localhost:3000\r\n" in answer


def test_longest_target_is_served(program: Program) -> None:
    fields = b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    target = b"/health?".ljust(8_192, b"x")
    assert status(exchange(program, b"GET " + target + fields)) == 200


def test_trailer_is_not_a_header_field(program: Program) -> None:
    chunked = b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\ne\r\n" + BODY + b"\r\n0\r\n"
    assert status(exchange(program, LINE + chunked + SIGNED + b"\r\n")) == 401
    assert status(exchange(program, LINE + SIGNED + chunked + SIGNED + b"\r\n")) == 201


@pytest.mark.parametrize("upgrade", [b"h2c", b"websocket", b"TLS/1.2"])
@pytest.mark.parametrize("split", [0, 1, 10, 10_000])
def test_upgrade_is_ignored_and_the_body_is_read(
    program: Program, sql: psycopg.Connection, upgrade: bytes, split: int
) -> None:
    """`curl --http2` sends such a head with every request."""
    fields = b"Connection: Upgrade, close\r\nUpgrade: " + upgrade + b"\r\n"
    framed = [
        b"Content-Length: 14\r\n\r\n" + BODY,
        b"Transfer-Encoding: chunked\r\n\r\ne\r\n" + BODY + b"\r\n0\r\n\r\n",
    ]
    for framing in framed:
        request = LINE + SIGNED + fields + framing
        end = len(request) - split if split < len(request) else 1
        with program.connect() as connection:
            connection.sendall(request[:end])
            time.sleep(0.01)  # the parts must arrive separately, and no event tells when
            connection.sendall(request[end:])
            assert status(read(connection)) == 201
    titles = sql.execute("SELECT title FROM tasks").fetchall()
    assert titles == [("x",), ("x",)]


def test_answer_is_sent_although_invalid_data_follows(
    program: Program, sql: psycopg.Connection
) -> None:
    answer = exchange(program, WHOLE.replace(b"Connection: close\r\n", b"") + b"GARBAGE\r\n\r\n")
    assert status(answer) == 201
    assert sql.execute("SELECT count(*) FROM tasks").fetchone() == (1,)


def test_pipelined_requests_are_answered_in_order(program: Program) -> None:
    first = b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n"
    answer = exchange(program, first * 3 + WHOLE)
    assert answer.count(b"HTTP/1.1 200 OK") == 3
    assert answer.count(b"HTTP/1.1 201 Created") == 1


@pytest.mark.parametrize("size", [140_000, 500_000, 900_000])
def test_refusal_of_a_large_body_reaches_the_client(program: Program, size: int) -> None:
    for _ in range(5):
        answer = httpx2.post(
            f"{program.address}/api/tasks",
            headers={**bearer("alice"), "Content-Type": "application/json"},
            content=b" " * size,
            **LOCAL,
        )
        assert answer.status_code == 413
        assert answer.json() == problem("body_too_large", "Body must be 131072 bytes or less")
    with program.connect() as connection:
        connection.sendall(LINE + SIGNED + b"Content-Length: 100000000\r\n\r\n")
        sent = 0
        try:
            while sent < 20_000_000:
                connection.sendall(b" " * 65_536)
                sent += 65_536
        except OSError:
            pass
        assert sent < 20_000_000, "the server reads an endless body"


@pytest.mark.parametrize("reset", [True, False])
@pytest.mark.parametrize(
    "rest",
    [
        b"Content-Length: 50\r\n\r\n{",
        b"Transfer-Encoding: chunked\r\n\r\n5\r\n{",
        b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
)
def test_client_that_leaves_early_causes_no_error(
    program: Program, rest: bytes, reset: bool
) -> None:
    with program.connect() as connection:
        connection.sendall(LINE + SIGNED + rest)
        if reset:
            linger = struct.pack("ii", 1, 0)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)


@pytest.mark.parametrize("version", [b"1.0", b"1.1"])
def test_refusal_of_a_body_reaches_a_client_without_keep_alive(
    program: Program, version: bytes
) -> None:
    """Proxies send HTTP/1.0, or `Connection: close`."""
    line = LINE.replace(b"1.1", version)
    for _ in range(10):
        body = b" " * 900_000
        head = line + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body)
        assert status(exchange(program, head + body)) == 401


def test_late_body_of_a_refused_request_is_skipped(program: Program) -> None:
    with program.connect() as connection:
        connection.sendall(LINE + b"Content-Length: 14\r\n\r\n")
        refused = connection.recv(65_536)
        assert status(refused) == 401
        connection.sendall(BODY + WHOLE)
        assert status(read(connection)) == 201


@pytest.mark.parametrize("rest", [b'{"tit', b'{"title": "y"}'])
def test_pipelined_request_waits_for_its_body(
    program: Program, database_url: str, rest: bytes
) -> None:
    with program.connect() as connection, psycopg.connect(database_url) as holder:
        holder.execute("LOCK TABLE tasks IN SHARE MODE")
        first = WHOLE.replace(b"Connection: close\r\n", b"")
        second = LINE + SIGNED + b"Connection: close\r\nContent-Length: 14\r\n\r\n"
        connection.sendall(first + second + rest)
        holder.rollback()
        answer = connection.recv(65_536)
        assert status(answer) == 201
        connection.sendall(b'{"title": "y"}'[len(rest) :])
        answer += read(connection)
        assert answer.count(b"HTTP/1.1 201 Created") == 2


def test_invalid_pipelined_request_does_not_spoil_the_answer_before_it(
    program: Program, database_url: str
) -> None:
    broken = LINE + SIGNED + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n"
    with program.connect() as connection, psycopg.connect(database_url) as holder:
        holder.execute("LOCK TABLE tasks IN SHARE MODE")
        connection.sendall(WHOLE.replace(b"Connection: close\r\n", b"") + broken)
        holder.rollback()
        answer = read(connection)
    assert status(answer) == 201
    assert answer.count(b"HTTP/1.1") == 1


def test_client_that_pipelines_and_leaves_causes_no_error(program: Program, folder: Path) -> None:
    address = address_of(LARGEST, httpx2.get(f"{program.address}/docs", **LOCAL).text)
    document = f"GET {address} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
    for _ in range(5):
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            host, _, port = program.address.removeprefix("http://").partition(":")
            connection.connect((host, int(port)))
            connection.sendall(document * 5)
            connection.recv(1)
            hang_up = struct.pack("ii", 1, 0)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, hang_up)
    assert status(exchange(program, WHOLE)) == 201
    assert "unexpected error" not in (folder / "log").read_text()


def test_invalid_request_is_answered_and_logged_like_any_error(
    program: Program, folder: Path
) -> None:
    fields = b"Host: x\r\nOrigin: http://localhost:3000\r\nX-Request-ID: broken-1\r\n"
    kinds = {
        b"GET /api/tasks HTTP/1.1\r\n" + fields + b"Content-Length: x\r\n\r\n": 400,
        b"GET /api/tasks HTTP/1.1\r\n" + fields + b"A: b\r\n" * 300 + b"\r\n": 431,
    }
    for request, expected in kinds.items():
        before = len(lines_of(folder))
        head, _, body = exchange(program, request).partition(b"\r\n\r\n")
        names = [line.partition(b":")[0] for line in head.lower().split(b"\r\n")]
        assert status(head) == expected
        assert list(json.loads(body)) == ["error", "detail", "code"]
        assert b"access-control-allow-origin: http://localhost:3000" in head.lower()
        assert b"x-request-id: broken-1" in head.lower()
        assert {b"cache-control", b"vary", b"x-content-type-options"} <= set(names)
        assert b"connection: close" in head.lower()
        wait_for(partial(lines_of, folder, before))
        (line,) = lines_of(folder, before)
        assert line["request_id"] == "broken-1"
        assert (line["method"], line["route"], line["status"]) == ("-", "none", expected)


def lines_of(folder: Path, start: int = 0) -> list[dict[str, object]]:
    """Return the log lines of requests without the first `start`."""
    lines = map(json.loads, (folder / "log").read_text().splitlines())
    return [line for line in lines if line["event"] == "request"][start:]
