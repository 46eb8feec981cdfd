"""A list of 100,000 tasks. The service streams it and never holds all of it in memory."""

import json
import re
import socket
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import psycopg
import pytest

from support.program import Program, serving
from support.service import SECRET, token

TASKS = 100_000
BODY_BYTES = 24_000_000
"""The minimum size of such a list."""

MEMORY_BYTES = 8_000_000
"""The most memory that the program may use to send it."""


def fill(sql: psycopg.Connection, user: str, tasks: int) -> None:
    sql.execute("INSERT INTO users (id, version) VALUES (%s, 1)", [user])
    sql.execute(
        "INSERT INTO tasks (user_id, title, description, created_at, version)"
        " SELECT %s, 'Buy groceries ' || n, 'Milk and bread', now() - n * interval '1 second', 1"
        " FROM generate_series(1, %s) AS n",
        [user, tasks],
    )


@pytest.fixture
def program(tmp_path: Path, database_url: str, sql: psycopg.Connection) -> Iterator[Program]:
    fill(sql, "alice", TASKS)
    settings = {"DATABASE_URL": database_url, "BETTER_AUTH_SECRET": SECRET, "POOL_SIZE": "2"}
    with serving(tmp_path, **settings) as program:
        yield program
        with program.client(token("bob")) as bob:
            assert bob.get("/api/tasks").json() == []
        assert program.stop() == 0
    assert "Traceback" not in (tmp_path / "log").read_text()


def peak(program: Program) -> int:
    """Return the peak memory of the process, in bytes."""
    status = Path(f"/proc/{program.process.pid}/status")
    if not status.exists():
        pytest.skip("this system has no /proc, so the peak is unknown")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
    assert found is not None
    return int(found[1]) * 1024


def unread_list(program: Program) -> socket.socket:
    """Request alice's list, and read only the first line of the answer."""
    client = program.connect()
    request = f"GET /api/tasks HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token('alice')}\r\n"
    client.sendall(f"{request}\r\n".encode())
    assert client.recv(15) == b"HTTP/1.1 200 OK"
    return client


def test_large_list_arrives_complete_with_little_memory(program: Program) -> None:
    with program.client(token("alice")) as alice:
        assert alice.get("/api/tasks/1").status_code == 200
        before = peak(program)
        response = alice.get("/api/tasks")
    assert len(response.content) > BODY_BYTES
    assert [task["title"] for task in response.json()] == [
        f"Buy groceries {number}" for number in range(1, TASKS + 1)
    ]
    assert "content-length" not in response.headers
    assert peak(program) - before < MEMORY_BYTES


def test_stalled_reader_leaves_memory_and_a_connection_for_others(program: Program) -> None:
    """With a pool of two connections, a second large list at the same time gets 503."""
    with program.client(token("bob")) as bob:
        assert bob.post("/api/tasks", json={"title": "x"}).status_code == 201
    before = peak(program)
    with (
        closing(unread_list(program)) as stalled,
        program.client(token("alice")) as alice,
        program.client(token("bob")) as bob,
    ):
        refused = alice.get("/api/tasks")
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert bob.post("/api/tasks", json={"title": "x"}).status_code == 201
        assert bob.delete("/api/account").status_code == 204
        assert peak(program) - before < MEMORY_BYTES
        assert read_end(stalled).endswith(b"]\r\n0\r\n\r\n")
        assert len(alice.get("/api/tasks").json()) == TASKS


def read_end(client: socket.socket) -> bytes:
    """Read until the list or the connection ends, and return the last bytes."""
    end = b""
    with suppress(ConnectionResetError):
        while not end.endswith(b"0\r\n\r\n") and (data := client.recv(1 << 20)):
            end = (end + data)[-200:]
    return end


def test_reader_that_disconnects_releases_its_connection(program: Program) -> None:
    for _ in range(5):
        unread_list(program).close()
        with program.client(token("alice")) as alice:  # 503 while the closed list still counts
            while alice.get("/api/tasks").status_code == 503:
                pass


def test_client_can_detect_an_incomplete_list(
    program: Program, sql: psycopg.Connection, tmp_path: Path
) -> None:
    with closing(unread_list(program)) as client:
        sql.execute(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
            " AND query LIKE '%%row_to_json%%'"
        )
        assert not read_end(client).endswith(b"0\r\n\r\n")
    log = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    errors = [line for line in log if line["level"] == "error"]
    assert [line.get("error") for line in errors] == ["DatabaseUnreachable"], errors
