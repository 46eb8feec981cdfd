"""The fifth table: the cost of the opt-in features."""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from http.client import HTTPConnection
from secrets import token_hex
from statistics import median
from urllib.parse import urlsplit

import data
import psutil
from load import CONNECTIONS
from measuring import Bench, cpu_seconds
from servers import IDIOMATIC, OURS, Server, running

LONG = 10_000
INTRODUCTION = f"""## Features

One user's requests, {CONNECTIONS} at once. CPU is of the server and of PostgreSQL together. The\
 conditional list of
*idiomatic* is a hash of its own body, as in FastAPI's usual middlewares. The long list has\
 {LONG:,} tasks.

| server | request | µs CPU |
|---|---|--:|
"""


@dataclass(frozen=True)
class Client:
    """A signed-in user with several connections."""

    connections: Sequence[HTTPConnection]
    token: str

    def send(
        self,
        method: str,
        path: str,
        body: object = None,
        headers: Mapping[str, str] | None = None,
        *,
        keyed: bool = False,
    ) -> str:
        """Send a request on each connection, read the answers, and return the tag of the last."""
        sent = {"Authorization": f"Bearer {self.token}", **(headers or {})}
        if body is not None:
            sent["Content-Type"] = "application/json"
        for connection in self.connections:
            if keyed:
                sent["Idempotency-Key"] = token_hex()
            connection.request(method, path, body and json.dumps(body), sent)
        for connection in self.connections:
            answer = connection.getresponse()
            answer.read()
            if answer.status >= HTTPStatus.BAD_REQUEST:
                raise RuntimeError(f"{method} {path}: {answer.status}")
        return answer.headers.get("ETag", "")

    def cursor(self) -> str:
        """Return the cursor of the feed of changes, at its end."""
        self.connections[0].request(
            "GET", "/api/tasks/changes", headers={"Authorization": f"Bearer {self.token}"}
        )
        cursor: str = json.loads(self.connections[0].getresponse().read())["cursor"]
        return cursor

    def refresh(self, path: str) -> Callable[[], object]:
        """Return a request for what has not changed since now."""
        tag = self.send("GET", path)
        return partial(self.send, "GET", path, headers={"If-None-Match": tag})


def section(bench: Bench) -> str:
    """Measure, and return the table."""
    return INTRODUCTION + "\n".join(rows(bench))


def rows(bench: Bench) -> Iterator[str]:
    """Measure each request on each server."""
    for server in (OURS, IDIOMATIC):
        with running(server, bench.url, 2 * CONNECTIONS) as (process, address):
            for count in (data.TASKS_PER_USER["list"], LONG):
                data.load(bench.url, count, users=1)
                token = bench.tokens.read_text().split()[0]
                host = urlsplit(address).netloc
                client = Client([HTTPConnection(host) for _ in range(CONNECTIONS)], token)
                for name, request in requests(server, client, count).items():
                    yield f"| {server.name} | {name} | {cost(bench, process, request):,.0f} |"


def requests(server: Server, client: Client, count: int) -> Mapping[str, Callable[[], object]]:
    """Return the requests to measure for a list of this length."""
    path = "/api/tasks" if server is OURS else "/api/conditional"
    both = {
        f"list of {count:,}": partial(client.send, "GET", path),
        f"list of {count:,}, unchanged": client.refresh(path),
    }
    if server is not OURS:
        return both
    if count == LONG:
        return both | {"search": partial(client.send, "GET", "/api/tasks?q=groceries+77&limit=50")}
    task = {"title": "Buy groceries", "description": "Milk and bread", "priority": "high"}
    create = partial(client.send, "POST", "/api/tasks", task)
    cursor = client.cursor()
    operations = {"operations": [{"op": "create", "task": task}] * 100}
    return both | {
        "one task": partial(client.send, "GET", f"/api/tasks/{data.FIRST_ID}"),
        "changes, none": partial(client.send, "GET", f"/api/tasks/changes?since={cursor}"),
        "create": create,
        "create with a key": partial(client.send, "POST", "/api/tasks", task, keyed=True),
        "batch of 100 creations": partial(client.send, "POST", "/api/tasks/batch", operations),
    }


def cost(bench: Bench, server: psutil.Process, request: Callable[[], object]) -> float:
    """Return the CPU time of a request in microseconds, the median of the rounds."""
    return median(one_round(bench, server, request) for _ in range(bench.rounds))


def one_round(bench: Bench, server: psutil.Process, request: Callable[[], object]) -> float:
    """Repeat a request for as long as a round takes, after a warm-up."""
    for _ in range(5):
        request()
    before = cpu_seconds(server) + cpu_seconds(bench.postgres)
    deadline = time.monotonic() + bench.seconds
    count = 0
    while time.monotonic() < deadline:
        request()
        count += CONNECTIONS
    return (cpu_seconds(server) + cpu_seconds(bench.postgres) - before) / count * 1e6
