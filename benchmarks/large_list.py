"""The fourth table: the memory that a server needs to send one very long list."""

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

One user has {TASKS:,} tasks, and a fast client reads the whole answer to `GET /api/tasks`.\
 Memory is
the resident set of the server, before the request and at its peak. It does not include PostgreSQL.

| server | body MB | seconds | MB before | MB at most | growth in bodies |
|---|--:|--:|--:|--:|--:|
"""


@dataclass(frozen=True)
class Reading:
    """The cost of reading the list. Sizes are in bytes."""

    body: int
    seconds: float
    before: int
    peak: int


def section(bench: Bench) -> str:
    """Measure, and return the table."""
    data.load(bench.url, TASKS, users=1)
    return INTRODUCTION + "\n".join(row(server.name, read(bench, server)) for server in SERVERS)


def read(bench: Bench, server: Server) -> Reading:
    """Send a new server one small request, then the large one, and measure the large one."""
    headers = {"Authorization": f"Bearer {bench.tokens.read_text().split()[0]}"}
    with running(server, bench.url) as (process, address):
        connection = HTTPConnection(urlsplit(address).netloc)
        fetch(connection, f"/api/tasks/{data.FIRST_ID}", headers)
        before = memory(process.pid, "VmRSS")
        Path(f"/proc/{process.pid}/clear_refs").write_text("5")  # resets VmHWM
        start = time.perf_counter()
        size = fetch(connection, "/api/tasks", headers)
        seconds = time.perf_counter() - start
        return Reading(size, seconds, before, memory(process.pid, "VmHWM"))


def fetch(connection: HTTPConnection, path: str, headers: dict[str, str]) -> int:
    """Read a response in pieces, and return the size of its body."""
    connection.request("GET", path, headers=headers)
    answer = connection.getresponse()
    if answer.status != HTTPStatus.OK:
        raise RuntimeError(f"GET {path}: {answer.status} {answer.read(200)!r}")
    return sum(map(len, iter(lambda: answer.read(1 << 16), b"")))


def memory(pid: int, name: str) -> int:
    """Return one of the memory figures that the kernel keeps for a process, in bytes."""
    found = re.search(
        rf"^{name}:\s+(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE
    )
    if found is None:
        raise RuntimeError(f"no {name} in /proc/{pid}/status")
    return int(found[1]) * 1024


def row(name: str, one: Reading) -> str:
    """Return one row of the table."""
    megabytes = " | ".join(f"{size / 1e6:.0f}" for size in (one.before, one.peak))
    return (
        f"| {name} | {one.body / 1e6:.1f} | {one.seconds:.2f} | {megabytes} |"
        f" {(one.peak - one.before) / one.body:.1f} |"
    )
