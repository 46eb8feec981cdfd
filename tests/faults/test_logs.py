"""The log of the program as a process: a line for each request, and nothing of what it held."""

import json
import os
import re
import subprocess
import sys
from asyncio import to_thread
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import httpx2
import psutil
import psycopg
import pytest

from support.http import LOCAL
from support.network import Network
from support.problems import problem
from support.program import Program, command, environment, serving
from support.service import ORIGIN, SECRET, bearer, token
from support.waiting import LIMIT, wait_for
from todo_api.http import logs
from todo_api.http.body import MAXIMUM_BYTES

KEYS = {"BETTER_AUTH_SECRET": SECRET, "LOG_FORMAT": "json"}
FIELDS = {
    *("request_id", "method", "route", "status", "ms", "user", "error"),
    *("reason", "event", "level", "timestamp"),
}

ERROR_FIELDS = ("event", "level", "error", "cause", "request_id")

MARK = "zq7mark"
"""A part of everything that these tests send, except the ids of good requests."""

FAKE = f'{MARK}"}}\r\n{{"event": "request", "user": "{MARK}"}}\x1b[2J\x1b]0;{MARK}\x07'
"""The end of a line, a forged line, and control sequences for a terminal."""

TASKS, TASK = "/api/tasks", "/api/tasks/{id}"
USER_TASKS = "/api/{user_id}/tasks"


class Case(NamedTuple):
    """A request, and the expected values of its line."""

    verb: str
    path: str
    status: int
    route: str
    error: str | None = None
    signed_in: bool = True
    headers: Mapping[str, str] = MappingProxyType({})
    body: bytes = b""


JSON = {"Content-Type": "application/json"}
TYPE = b"Content-Type: application/json\r\n"
CASES = {
    "list": Case("GET", "/api/tasks?status=all", 200, TASKS),
    "create": Case("POST", "/api/tasks", 201, TASKS, headers=JSON, body=b'{"title": "x"}'),
    "no-token": Case("GET", "/api/tasks", 401, TASKS, "Unauthorized", signed_in=False),
    "bad-token": Case(
        *("GET", "/api/tasks", 401, TASKS, "ExpiredToken", False),
        headers={"Authorization": f"Bearer {token('alice', exp=1)}"},
    ),
    "forbidden": Case("GET", "/api/bob/tasks", 403, USER_TASKS, "Forbidden"),
    "no-path": Case("GET", "/api/nothing", 404, "none", "NotFound", signed_in=False),
    "no-task": Case("GET", "/api/tasks/4711", 404, TASK, "TaskNotFound"),
    "no-id": Case("GET", "/api/tasks/x", 400, TASK, "InvalidTaskId"),
    "too-large": Case(
        *("POST", "/api/tasks", 413, TASKS, "BodyTooLarge"),
        headers=JSON,
        body=b" " * (MAXIMUM_BYTES + 1),
    ),
    "no-type": Case("POST", "/api/tasks", 415, TASKS, "UnsupportedMediaType", body=b"{}"),
    "fields": Case("POST", "/api/tasks", 400, TASKS, "InvalidFields", headers=JSON, body=b"{}"),
    "preflight": Case(
        *("OPTIONS", "/api/tasks", 204, "none", None, False),
        headers={"Origin": ORIGIN, "Access-Control-Request-Method": "PUT"},
    ),
    "options": Case("OPTIONS", f"/api/{MARK}/tasks", 204, "none", signed_in=False),
    "wrong-verb": Case(
        "DELETE", f"/api/{MARK}/tasks", 405, "none", "MethodNotAllowed", signed_in=False
    ),
    "head": Case("HEAD", "/api/tasks", 200, TASKS),
    "health": Case("GET", "/health", 200, "/health", signed_in=False),
    "docs": Case("GET", "/docs", 200, "/docs", signed_in=False),
}


class Log:
    """The log of a program."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "log"

    @property
    def text(self) -> str:
        # Not `read_text`, which would take a carriage return for the end of a line.
        return self._file.read_bytes().decode()

    @property
    def events(self) -> list[dict[str, Any]]:
        """Every line, all of which must be JSON."""
        return [json.loads(line) for line in self.text.split("\n") if line]

    @property
    def requests(self) -> list[dict[str, Any]]:
        return [event for event in self.events if event["event"] == "request"]

    def of(self, request_id: str) -> dict[str, Any]:
        """Wait for the line about a request, and return it."""
        wait_for(lambda: request_id in self.text)
        found = [event for event in self.events if event["request_id"] == request_id]
        assert len(found) == 1, found
        return found[0]


@contextmanager
def logging(folder: Path, url: str, *arguments: str, **variables: str) -> Iterator[Any]:
    """Yield a serving program with a client and its log, and stop it gracefully."""
    given = {**KEYS, "DATABASE_URL": url, **variables}
    with (
        serving(folder, *arguments, **given) as program,
        httpx2.Client(base_url=program.address, **LOCAL) as client,
    ):
        yield program, client, Log(folder)
        client.close()
        assert program.stop() == 0


def signed_in(user: str = "alice", **headers: str) -> dict[str, str]:
    return {**bearer(user), **headers}


def send(client: httpx2.Client, name: str, case: Case) -> int:
    headers = {**(bearer("alice") if case.signed_in else {}), **case.headers, "X-Request-ID": name}
    answer = client.request(case.verb, case.path, headers=headers, content=case.body)
    return answer.status_code


def by_hand(program: Program, *parts: bytes) -> bytes:
    """Send raw bytes, and return the first bytes of the answer."""
    with program.connect() as connection:
        connection.sendall(b"".join(parts))
        return connection.recv(65_536)


def test_every_request_is_one_line_with_its_route(tmp_path: Path, database_url: str) -> None:
    with logging(tmp_path, database_url) as (_, client, log):
        for name, case in CASES.items():
            assert send(client, name, case) == case.status, name
    lines = {line["request_id"]: line for line in log.events}
    assert len(log.events) == len(CASES)
    for name, case in CASES.items():
        line = lines[name]
        assert set(line) == FIELDS
        assert (line["event"], line["level"]) == ("request", "info")
        assert (line["status"], line["route"], line["error"]) == (
            case.status,
            case.route,
            case.error,
        )
        assert 0 < line["ms"] < 10_000
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:.]+Z", line["timestamp"])
        assert (line["user"] is not None) == case.signed_in, name
    methods = {name: line["method"] for name, line in lines.items()}
    assert methods == {name: case.verb for name, case in CASES.items()}


REFUSED: Mapping[str, tuple[dict[str, str], str, str]] = {
    "none": ({}, "Unauthorized", "no Authorization header"),
    "basic": (
        {"Authorization": f"Basic {MARK}"},
        "Unauthorized",
        "the Authorization header has no bearer token",
    ),
    "session": (
        {"Authorization": f"Bearer {MARK}"},
        "InvalidToken",
        "form: not a JWT, which has three base64url segments",
    ),
    "issuer": (
        bearer(MARK, iss="https://other.example"),
        "InvalidToken",
        'iss: expected "https://app.example", received "https://other.example"',
    ),
    "late": (
        bearer(MARK, iss="https://app.example", exp=1_700_000_000, iat=None),
        "ExpiredToken",
        "received 2023-11-14T22:13:20.000Z",
    ),
    "early": (
        bearer(MARK, iss="https://app.example", iat=4_000_000_000),
        "InvalidToken",
        "received 2096-10-02T07:06:40.000Z",
    ),
}


def test_line_of_a_refused_token_says_why(tmp_path: Path, database_url: str) -> None:
    """The line shows both times, so that a wrong clock is found. It shows no token and no user."""
    variables = {"BETTER_AUTH_ISSUER": "https://app.example", "RATE_LIMIT_FAILURES": "4"}
    with logging(tmp_path, database_url, **variables) as (_, client, log):
        for name, (headers, error, reason) in REFUSED.items():
            client.get(TASKS, headers={**headers, "X-Request-ID": name})
            line = log.of(name)
            assert (line["error"], line["user"]) == (error, None)
            assert line["reason"].endswith(reason), line
        headers = {**REFUSED["issuer"][0], "X-Request-ID": "limited"}
        client.get(TASKS, headers=headers)
        limited = log.of("limited")
        assert (limited["error"], limited["reason"]) == ("TooManyRequests", REFUSED["issuer"][2])
        good = bearer(MARK, iss="https://app.example")
        client.get(TASKS, headers={**good, "X-Request-ID": "good"})
        assert log.of("good")["reason"] is None
    assert MARK not in log.text
    assert "eyJ" not in log.text


def leave(program: Program, *parts: bytes, when: Callable[[], object]) -> None:
    """Send a request, close the connection when the condition holds, and let the program notice."""
    head = f"Host: x\r\nAuthorization: Bearer {token('alice')}\r\n".encode()
    with program.connect() as connection:
        ours = connection.getsockname()
        connection.sendall(head.join(parts))
        wait_for(when)
    wait_for(lambda: ours not in [each.raddr for each in sockets(program)])


def sockets(program: Program) -> list[Any]:
    return psutil.Process(program.process.pid).net_connections("tcp")


def test_client_that_leaves_has_status_0(
    tmp_path: Path, database_url: str, sql: psycopg.Connection
) -> None:
    """The client leaves in the middle of its body, or while the database works."""

    def at_work() -> bool:
        return sql.execute("SELECT FROM pg_locks WHERE NOT granted").fetchone() is not None

    with logging(tmp_path, database_url) as (program, client, log):
        client.post(TASKS, headers=signed_in(), json={"title": "x"})
        body = b'X-Request-ID: body\r\n%bContent-Length: 99\r\n\r\n{"title": ' % TYPE
        leave(program, b"POST /api/tasks HTTP/1.1\r\n", body, when=lambda: True)
        with psycopg.connect(database_url) as holder:
            holder.execute("SELECT FROM tasks FOR UPDATE")
            verb = b"PATCH /api/tasks/1/complete HTTP/1.1\r\n"
            leave(program, verb, b"X-Request-ID: answer\r\n\r\n", when=at_work)
        lines = [log.of("body"), log.of("answer")]
    assert [line["route"] for line in lines] == [TASKS, f"{TASK}/complete"]
    assert [line["status"] for line in lines] == [0, 0]


def attack(program: Program, client: httpx2.Client) -> None:
    """Send the mark and the forged line wherever a client can send a text."""
    encoded = "".join(f"%{byte:02X}" for byte in FAKE.encode())
    for user in (MARK, f'{MARK}"}} {{"event": "request"}} \u2028 \u202e', FAKE):
        for path in (f"/api/{encoded}/tasks", f"/api/{MARK}/tasks", f"/{encoded}", TASKS):
            client.get(f"{path}?{encoded}={MARK}&status={encoded}", headers=bearer(user))
    good = bearer(MARK, email=f"{MARK}@example.com")
    for body in (
        {"title": FAKE, "description": FAKE},
        {"title": FAKE * 20, FAKE: FAKE, "status": FAKE, "due_date": FAKE},
    ):
        client.post("/api/tasks", headers=good, json=body)
        client.put("/api/tasks/1", headers=good, json=body)
    client.post("/api/tasks", headers={**good, **JSON}, content=f'{{"{MARK}": {FAKE}'.encode())
    client.get(f"/api/tasks/{encoded}", headers=good)
    client.get(TASKS, headers={"Authorization": f"Bearer {MARK}.{MARK}.{MARK}"})
    client.get(TASKS, headers={"Authorization": f"Basic {MARK}"})
    names = ("X-Request-ID", "User-Agent", "Referer", "Cookie", "X-Forwarded-For", "Origin")
    for name in (*names, "Access-Control-Request-Headers", "Traceparent", "Content-Type", MARK):
        client.options(TASKS, headers={**good, name: f"{MARK} {encoded}", "Origin": MARK})
        field = f"{name}: {MARK}\x1b[2J\x85".encode("latin-1")
        by_hand(program, b"GET /api/tasks HTTP/1.1\r\nHost: x\r\n", field, b"\r\n\r\n")
        folded = f'{name}: {MARK}\r\n {{"event": "{MARK}"}}\r\n\r\n'.encode()
        by_hand(program, b"GET /api/tasks HTTP/1.1\r\nHost: x\r\n", folded)
    for line in (f"GET /{FAKE} HTTP/1.1", f"{MARK} / HTTP/1.1", f"GET {FAKE} HTTP/9"):
        by_hand(program, line.encode(), b"\r\nHost: x\r\n\r\n")
    by_hand(program, f"GET /api/tasks HTTP/1.1\r\nHost: {MARK}\x1b[2J\r\n\r\n".encode())


@pytest.mark.parametrize(
    ("log_format", "level"), [("json", "info"), ("console", "info"), ("json", "debug")]
)
async def test_log_contains_nothing_that_a_client_sends(
    tmp_path: Path, database_url: str, log_format: str, level: str
) -> None:
    """Nor does it contain the secret, or the database's address and password after a failure."""
    variables = {"LOG_FORMAT": log_format, "LOG_LEVEL": level}
    with ExitStack() as stack:
        async with Network(database_url) as network:
            url = network.url.replace("postgres@", "postgres:hunter2@")
            program, client, log = await to_thread(
                stack.enter_context, logging(tmp_path, url, **variables)
            )
            await to_thread(attack, program, client)
        gone = await to_thread(
            client.post, TASKS, headers=signed_in(MARK), json={"title": f"{MARK} {FAKE}"}
        )
        assert gone.status_code == 500
        await to_thread(stack.close)
    assert log.text.count("Connection refused") == 1
    for secret in (MARK, "hunter2", SECRET, str(network.port), "eyJ", "example.com", "\x1b", "\r"):
        assert secret not in log.text, secret
    assert_lines_are_whole(log, log_format, level)


def assert_lines_are_whole(log: Log, log_format: str, level: str) -> None:
    """Check that every line is one of the program's own."""
    if log_format == "console":
        for line in log.text.removesuffix("\n").split("\n"):
            assert re.match(r"\d{4}-\d\d-\d\dT\S+Z \[(info|error) *\] \S", line), line
    elif level == "info":
        assert {event["event"] for event in log.events} == {"request", "request failed"}
    assert all(set(line) == FIELDS for line in (log.requests if log_format == "json" else []))


async def test_error_is_logged_once_with_its_cause(
    tmp_path: Path, database_url: str, sql: psycopg.Connection
) -> None:
    """This level has no lines of requests. PostgreSQL's message is left out, because it quotes."""
    sql.execute(f"ALTER TABLE tasks ADD CHECK (title NOT LIKE '{MARK}%')")
    with ExitStack() as stack:
        async with Network(database_url) as network:
            _, client, log = await to_thread(
                stack.enter_context, logging(tmp_path, network.url, LOG_LEVEL="warning")
            )
            await to_thread(create, client, "good", "x")
            await to_thread(create, client, "refused", MARK)
        await to_thread(create, client, "gone", "x")
        await to_thread(stack.close)
    assert [tuple(map(event.get, ERROR_FIELDS)) for event in log.events] == [
        ("request failed", "error", "InternalError", "SQLSTATE 23514", "refused"),
        ("request failed", "error", "DatabaseUnreachable", "Connection refused", "gone"),
    ]
    assert MARK not in log.text


def create(client: httpx2.Client, name: str, title: str) -> None:
    client.post(TASKS, headers=signed_in(**{"X-Request-ID": name}), json={"title": title})


BROKEN = """
from todo_api.http.routing import PrivateRoute

async def respond(self, request):
    secret = request.headers["authorization"]
    raise RuntimeError("a fault of our own")

PrivateRoute.respond = respond
"""


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_fault_of_our_own_is_logged_once_without_variables(
    tmp_path: Path, database_url: str, log_format: str
) -> None:
    (tmp_path / "sitecustomize.py").write_text(BROKEN)
    variables = {"LOG_FORMAT": log_format, "PYTHONPATH": str(tmp_path)}
    with logging(tmp_path, database_url, **variables) as (_, client, log):
        headers = signed_in(MARK, **{"X-Request-ID": "broken"})
        answer = client.post(TASKS, headers=headers, json={"title": MARK})
        assert (answer.status_code, answer.json()) == (
            500,
            problem("internal_error", "Internal server error"),
        )
    assert MARK not in log.text
    assert "eyJ" not in log.text
    assert log.text.count("unexpected error") == 1
    assert log.text.count("a fault of our own") == (1 if log_format == "json" else 2)
    assert log.text.count("broken") == 2  # the error, and the line of the request


@pytest.mark.parametrize("workers", ["1", "2"])
def test_broken_pipes_do_not_stop_the_service(
    tmp_path: Path, database_url: str, unused_port: int, workers: str
) -> None:
    """Nothing reads the standard output and the log of this program."""
    reader, writer = os.pipe()
    os.close(reader)
    process = subprocess.Popen(
        command("serve", "--port", str(unused_port), "--workers", workers),
        cwd=tmp_path,
        env=environment(DATABASE_URL=database_url, **KEYS),
        stdout=writer,
        stderr=writer,
    )
    os.close(writer)
    address = f"http://127.0.0.1:{unused_port}"
    try:
        wait_for(lambda: answers(f"{address}/livez"))
        with httpx2.Client(base_url=address, **LOCAL) as client:
            for _ in range(300):  # more than a buffer of lines
                assert client.get(TASKS, headers=bearer("alice")).status_code == 200
    finally:
        process.terminate()
    assert process.wait(LIMIT) == 0


@pytest.mark.parametrize(("level", "shown"), [("info", "WARNING"), ("error", "ERROR")])
def test_libraries_log_no_routine_events(level: str, shown: str) -> None:
    """Such as each fetch of the key set by httpx2."""
    code = (
        "import logging; from todo_api.http.logs import configure_logging as configure;"
        "from todo_api.settings import Settings;"
        f"configure(Settings.model_construct(log_level={level!r}));"
        "names = 'uvicorn.error', 'alembic.runtime.migration', 'httpx2', 'httpcore2.http11';"
        "print({logging.getLevelName(logging.getLogger(n).getEffectiveLevel()) for n in names})"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout
    assert printed.decode() == f"{{{shown!r}}}\n"


def answers(url: str) -> bool:
    try:
        return httpx2.get(url, **LOCAL).status_code == 200
    except httpx2.TransportError:
        return False


def test_line_after_a_cut_one_begins_on_a_new_line() -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with logs._StandardError(writer, "wb") as file:
        assert file.write(b"x" * 1_000_000 + b"\n") < 1_000_000
        assert file.write(b"lost, because the pipe is full\n") == 0
        os.read(reader, 1_000_000)
        for line in (b"second\n", b"third\n"):
            file.write(line)
        assert os.read(reader, 100) == b"\nsecond\nthird\n"
        os.close(reader)
        assert file.write(b"lost, because nothing reads\n") == 0


def hashes(folder: Path, url: str, workers: int = 1, **variables: str) -> set[str]:
    """Ask every worker as two users, each with a verb, and return the one hash of each user."""
    with logging(folder, url, "--workers", str(workers), **variables) as (_, client, log):

        def processes() -> set[str]:
            for verb, user in (("GET", "alice"), ("HEAD", "bob")):
                client.request(verb, TASKS, headers=signed_in(user, Connection="close"))
            return {line["request_id"][:16] for line in log.requests}

        wait_for(lambda: len(processes()) == workers)
    written = {(line["method"], line["user"]) for line in log.requests}
    users = {user for _, user in written}
    assert all(re.fullmatch("[0-9a-f]{16}", user) for user in users)
    assert len(written) == len(users) == 2
    return users


def test_user_is_a_hash_under_the_key(tmp_path: Path, database_url: str) -> None:
    """The hash is the same in every worker and after a restart."""
    first = hashes(tmp_path, database_url, LOG_KEY="one")
    assert hashes(tmp_path, database_url, LOG_KEY="another").isdisjoint(first)
    assert hashes(tmp_path, database_url, workers=2, LOG_KEY="one") == first


def test_without_a_key_the_hash_is_of_one_start(tmp_path: Path, database_url: str) -> None:
    first = hashes(tmp_path, database_url, workers=2)
    assert hashes(tmp_path, database_url).isdisjoint(first)
