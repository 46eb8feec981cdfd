"""The fourth table: the memory that one very long list takes."""

import re
import time
from dataclasses import dataclass
from http import HTTPStatus
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit

import data
from measuring import Bench
from servers import FASTIFY, IDIOMATIC, OURS, Server, running

TASKS = 100_000
SERVERS = (OURS, FASTIFY, IDIOMATIC)
INTRODUCTION = f"""## One large list

`GET /api/tasks` of one user with {TASKS:,} tasks, read whole by a client that does not
dawdle. Memory is the server's resident set, before and at its highest; PostgreSQL's is not in it.

| server | body MB | seconds | MB before | MB at most | growth in bodies |
|---|--:|--:|--:|--:|--:|
"""


@dataclass(frozen=True)
class Reading:
    """What reading the list took. Sizes are in bytes."""

    body: int
    seconds: float
    before: int
    peak: int


def section(bench: Bench) -> str:
    """Measure and write the table."""
    data.load(bench.url, TASKS, users=1)
    return INTRODUCTION + "\n".join(row(server.name, read(bench, server)) for server in SERVERS)


def read(bench: Bench, server: Server) -> Reading:
    """Let a fresh server answer one small request, then the large one."""
    headers = {"Authorization": f"Bearer {bench.tokens.read_text().split()[0]}"}
    with running(server, bench.url) as (process, address):
        connection = HTTPConnection(urlsplit(address).netloc)
        fetch(connection, f"/api/tasks/{data.FIRST_ID}", headers)
        before = memory(process.pid, "VmRSS")
        Path(f"/proc/{process.pid}/clear_refs").write_text("5")  # VmHWM starts anew
        start = time.perf_counter()
        size = fetch(connection, "/api/tasks", headers)
        seconds = time.perf_counter() - start
        return Reading(size, seconds, before, memory(process.pid, "VmHWM"))


def fetch(connection: HTTPConnection, path: str, headers: dict[str, str]) -> int:
    """Read an answer in pieces; return the size of its body."""
    connection.request("GET", path, headers=headers)
    answer = connection.getresponse()
    if answer.status != HTTPStatus.OK:
        raise RuntimeError(f"GET {path}: {answer.status} {answer.read(200)!r}")
    return sum(map(len, iter(lambda: answer.read(1 << 16), b"")))


def memory(pid: int, name: str) -> int:
    """Return one of the kernel's numbers about a process's memory, in bytes."""
    found = re.search(
        rf"^{name}:\s+(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE
    )
    if found is None:
        raise RuntimeError(f"no {name} in /proc/{pid}/status")
    return int(found[1]) * 1024


def row(name: str, one: Reading) -> str:
    """Write one row."""
    megabytes = " | ".join(f"{size / 1e6:.0f}" for size in (one.before, one.peak))
    return (
        f"| {name} | {one.body / 1e6:.1f} | {one.seconds:.2f} | {megabytes} |"
        f" {(one.peak - one.before) / one.body:.1f} |"
    )
