"""`make bench`: the same load on each server in turn, on one PostgreSQL; one table.

Every server has one process. They are driven by wrk in alternation (A B C A B C …), each time on
freshly loaded data, and compared by requests per CPU second of the server's process tree: what a
request costs, whatever else the machine does. PostgreSQL's own CPU is not counted: the statements
are nearly the same.
"""

import argparse
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import jwt
import psutil
import psycopg

from todo_api.database import migrations
from todo_api.database.embedded import EmbeddedPostgres

HERE = Path(__file__).parent
REPORT = HERE.parent / "docs" / "benchmarks.md"
SECRET = "a shared secret of more than thirty-two bytes"
USERS = 100
FIRST_ID = 1
OPERATIONS = ("list", "get", "create", "update", "complete", "delete")
TASKS_PER_USER = {"list": 20, "get": 20, "create": 20, "update": 20, "complete": 20, "delete": 2000}
CONNECTIONS = 16


@dataclass(frozen=True)
class Server:
    """A server to measure: how it is started, and what else it wants in its environment."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Measurement:
    """One run of one operation on one server. Times are in microseconds."""

    requests_per_second: float
    cpu_per_request: float
    p50: float
    p99: float
    failures: int


def servers() -> list[Server]:
    """Return what is measured, ours first."""
    ours = [sys.executable, "-m", "todo_api", "serve"]
    uvicorn = [sys.executable, "-m", "uvicorn", "--no-access-log", "--log-level", "warning"]
    node = ["node", str(HERE / "fastify" / "server.mjs")]
    return [
        Server("ours", ours, {"ROW_SECURITY": "on"}),
        Server("ours, row security off", ours, {"ROW_SECURITY": "off"}),
        Server("idiomatic", [*uvicorn, "--app-dir", str(HERE), "idiomatic:app"]),
        Server("fastify", node),
        Server("fastify, same guarantee", node, {"GUARANTEE": "on"}),
        Server("floor", [*uvicorn, "--app-dir", str(HERE), "floor:app"]),
    ]


def load(url: str, tasks_per_user: int) -> None:
    """Put the same data in: user n owns every USERS-th task."""
    with psycopg.connect(url, autocommit=True) as connection:
        # What wrk left behind when its time was up is still being written.
        busy = "SELECT FROM pg_stat_activity WHERE state <> 'idle' AND pid <> pg_backend_pid()"
        while connection.execute(busy).fetchone() is not None:
            time.sleep(0.05)
        connection.execute("TRUNCATE users, tasks, erasures RESTART IDENTITY")
        connection.execute(
            "INSERT INTO users (id) SELECT 'user' || n FROM generate_series(0, %s) AS n",
            [USERS - 1],
        )
        connection.execute(
            "INSERT INTO tasks (user_id, id, title, description, created_at)"
            " OVERRIDING SYSTEM VALUE"
            " SELECT 'user' || n %% %s, %s + n, 'Buy groceries ' || n, 'Milk and bread',"
            " now() - n * interval '1 second' FROM generate_series(0, %s) AS n",
            [USERS, FIRST_ID, USERS * tasks_per_user - 1],
        )
        highest = FIRST_ID + USERS * tasks_per_user
        connection.execute("SELECT setval('tasks_id_seq', %s)", [highest])
        connection.execute("VACUUM ANALYZE")


@contextmanager
def running(server: Server, url: str) -> Iterator[tuple[psutil.Process, str]]:
    """Run a server; give its process and its address."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    environment = {
        "PATH": os.environ["PATH"],
        "DATABASE_URL": url,
        "BETTER_AUTH_SECRET": SECRET,
        "POOL_SIZE": str(CONNECTIONS),
        "PORT": port,
        "LOG_LEVEL": "warning",
        **server.environment,
    }
    command = list(server.command)
    if "uvicorn" in command:
        command += ["--port", port]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    try:
        address = f"http://127.0.0.1:{port}"
        until_it_answers(address)
        yield psutil.Process(process.pid), address
    finally:
        process.terminate()
        process.wait()


def until_it_answers(address: str) -> None:
    """Wait for a server."""
    deadline = time.monotonic() + 20
    while True:
        try:
            urllib.request.urlopen(f"{address}/livez")
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
        else:
            return


def measure(
    process: psutil.Process, address: str, operation: str, tokens: Path, seconds: float
) -> Measurement:
    """Drive one operation with wrk and take the server's CPU time before and after."""
    per_user = TASKS_PER_USER[operation]
    # The warm-up deletes nothing that the run would look for.
    drive(address, "get" if operation == "delete" else operation, tokens, per_user, 1)
    before = cpu_seconds(process)
    requests, duration, failures, p50, p99 = drive(address, operation, tokens, per_user, seconds)
    used = cpu_seconds(process) - before
    return Measurement(requests / duration * 1e6, used / requests * 1e6, p50, p99, failures)


def drive(
    address: str, operation: str, tokens: Path, per_user: int, seconds: float
) -> tuple[int, ...]:
    """Run wrk; return requests, microseconds, failures, p50 and p99."""
    command = ["wrk", "-t", "2", "-c", str(CONNECTIONS), "-d", f"{seconds:.0f}s"]
    command += ["-s", str(HERE / "load.lua"), address, "--"]
    command += [operation, str(tokens), str(FIRST_ID), str(per_user)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"RESULT (.*)", output)
    if found is None:
        raise RuntimeError(output)
    return tuple(int(number) for number in found[1].split())


def cpu_seconds(process: psutil.Process) -> float:
    """Return the CPU time of a process and its children."""
    family = [process, *process.children(recursive=True)]
    times = [member.cpu_times() for member in family if member.name() != "postgres"]
    return sum(each.user + each.system for each in times)


def compare(
    rounds: int, seconds: float, wanted: Sequence[str]
) -> dict[tuple[str, str], Measurement]:
    """Measure every server on every operation, in alternation; keep the medians."""
    taken: dict[tuple[str, str], list[Measurement]] = {}
    with (
        TemporaryDirectory(prefix="todo-api-bench-") as folder,
        EmbeddedPostgres.start(Path(folder) / "postgres", durable=False) as postgres,
    ):
        migrations.migrate(postgres.url)
        tokens = Path(folder) / "tokens"
        tokens.write_text("".join(f"{token(f'user{n}')}\n" for n in range(USERS)))
        chosen = [server for server in servers() if not wanted or server.name in wanted]
        for number in range(rounds):
            for server in chosen:
                with running(server, postgres.url) as (process, address):
                    for operation in OPERATIONS:
                        load(postgres.url, TASKS_PER_USER[operation])
                        one = measure(process, address, operation, tokens, seconds)
                        taken.setdefault((server.name, operation), []).append(one)
                        print(number + 1, server.name, operation, one, file=sys.stderr)
    return {key: middle(runs) for key, runs in taken.items()}


def middle(runs: Sequence[Measurement]) -> Measurement:
    """Return the median of each number."""
    return Measurement(
        *(
            median(getattr(run, name) for run in runs)
            for name in ("requests_per_second", "cpu_per_request", "p50", "p99")
        ),
        failures=sum(run.failures for run in runs),
    )


def token(user: str) -> str:
    """Return a token that outlives the benchmark."""
    now = int(time.time())
    return jwt.encode({"sub": user, "iat": now, "exp": now + 86_400}, SECRET, "HS256")


def table(results: Mapping[tuple[str, str], Measurement]) -> str:
    """Write the results as a table."""
    lines = [
        "| operation | server | requests/s | CPU µs/request | p50 ms | p99 ms | CPU, ours = 1 |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for operation in OPERATIONS:
        ours = results.get(("ours", operation))
        for (name, measured_operation), one in results.items():
            if measured_operation != operation:
                continue
            ratio = f"{one.cpu_per_request / ours.cpu_per_request:.2f}" if ours else ""
            failed = f" ({one.failures} failed)" if one.failures else ""
            lines.append(
                f"| {operation} | {name}{failed} | {one.requests_per_second:,.0f} |"
                f" {one.cpu_per_request:,.0f} | {one.p50 / 1000:.1f} |"
                f" {one.p99 / 1000:.1f} | {ratio} |"
            )
    return "\n".join(lines)


INTRODUCTION = """# Benchmarks

Written by `make bench`: {rounds} rounds of {seconds:.0f} s a server and operation, in alternation,
{connections} connections, {users} users, one process a server, on a machine with {cores} cores.
PostgreSQL is the embedded one, without fsync, shared by all and not counted.

The last column is what a request costs that server in CPU time, compared with ours (with row
security on): 1.20 means a fifth more. *idiomatic* is FastAPI, SQLModel's `AsyncSession` and PyJWT
as documented; *fastify* is Fastify, `pg` and `@fastify/jwt` with schemas and named prepared
statements; *same guarantee* adds the transaction, the role and the user for row security, in `pg`'s
pipeline mode; *floor* answers a constant. The code is in `benchmarks/`.

"""


def main() -> None:
    """Measure, print the table, and write it to `docs/benchmarks.md`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4)
    parser.add_argument("--only", action="append", default=[], help="a server's name; prints only")
    options = parser.parse_args()
    if shutil.which("wrk") is None:
        sys.exit("make bench: the program wrk is not on the PATH")
    results = table(compare(options.rounds, options.seconds, options.only))
    print(results)
    if not options.only:
        introduction = INTRODUCTION.format(
            rounds=options.rounds,
            seconds=options.seconds,
            connections=CONNECTIONS,
            users=USERS,
            cores=os.cpu_count(),
        )
        REPORT.write_text(f"{introduction}{results}\n")


if __name__ == "__main__":
    main()
