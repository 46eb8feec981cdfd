"""The metrics of the program as a process: what they count, and what they never name."""

import re
import signal
import socket
import subprocess
import time
from asyncio import to_thread
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from urllib.parse import urlsplit

import httpx2
import psutil
import psycopg
import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from support.http import LOCAL
from support.program import Program, command, environment, serving
from support.publisher import Publisher
from support.service import ORIGIN, SECRET, bearer, token
from support.waiting import LIMIT, wait_for
from todo_api.http import metrics
from todo_api.http.metrics import BUCKETS, Workers

KEYS = {"BETTER_AUTH_SECRET": SECRET, "LOG_LEVEL": "warning"}
TYPES = {
    "todo_api_request_duration_seconds": "histogram",
    "todo_api_refusals": "counter",
    "todo_api_pool_wait_seconds": "histogram",
    "todo_api_requests_in_flight": "gauge",
    "todo_api_pool_connections": "gauge",
    "todo_api_pool_busy": "gauge",
    "todo_api_pool_waiting": "gauge",
    "todo_api_key_set_age_seconds": "gauge",
}
LABELS = {
    "todo_api_request_duration_seconds": {"method", "route", "status"},
    "todo_api_refusals": {"kind"},
}
REQUESTS = "todo_api_request_duration_seconds_count"
TASKS, TASK, USER_TASKS = "/api/tasks", "/api/tasks/{id}", "/api/{user_id}/tasks"

TWO = ("--workers", "2")
LISTED = ("GET", TASKS, "200")

METHODS = (
    *("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "QUERY", "PROPFIND"),
    *("PROPPATCH", "MKCOL", "COPY", "MOVE", "LOCK", "UNLOCK", "SEARCH", "REPORT", "MERGE", "LINK"),
    *("PURGE", "NOTIFY", "SUBSCRIBE", "M-SEARCH", "ACL", "BIND", "SOURCE", "FOO", "get", "X" * 99),
)
"""What a client may call a method, in use somewhere or made up."""

SERVED = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}

MAXIMUM_SERIES = 2_000
"""What strangers may make of it, whatever they send."""


class Meter:
    """A program with metrics."""

    def __init__(self, program: Program, host: str, port: int) -> None:
        self.program = program
        self.address = f"http://{host}:{port}/metrics"
        self._scraper = httpx2.Client(**LOCAL)

    def answers(self) -> bool:
        try:
            answer = self._scraper.get(self.address)
        except httpx2.TransportError:
            return False
        assert answer.status_code == 200
        return "todo_api_pool_connections" in answer.text

    def text(self) -> str:
        answer = self._scraper.get(self.address)
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/plain; version=")
        return answer.text

    def samples(self) -> dict[tuple[str, ...], float]:
        """Every value by its name and its labels' values in the order of the labels' names."""
        return {
            (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
            for family in text_string_to_metric_families(self.text())
            for sample in family.samples
        }

    def value(self, name: str, *labels: str) -> float | None:
        return self.samples().get((f"todo_api_{name}", *labels))

    def requests(self) -> Counter[tuple[str, ...]]:
        """The numbers of requests by method, route and status."""
        return Counter(
            {
                key[1:]: int(value)
                for key, value in self.samples().items()
                if key[0] == REQUESTS and value
            }
        )

    def send(self, verb: str, path: str, user: str | None = None, **headers: str) -> int:
        """Send a request, and return the status of the answer."""
        return self._send(verb, path, {**(bearer(user) if user else {}), **headers}).status

    def process(self) -> str:
        """Return who answers: ids of requests begin with the process's."""
        return (self._send("GET", "/livez", {}).headers["x-request-id"] or "")[:16]

    def _send(self, verb: str, path: str, headers: dict[str, str]) -> HTTPResponse:
        """Send a request on a connection of its own, whatever its method."""
        where = urlsplit(self.program.address)
        connection = HTTPConnection(where.hostname or "", where.port, timeout=LIMIT)
        try:
            connection.request(verb, path, headers=headers)
            answer = connection.getresponse()
            answer.read()
            return answer
        finally:
            connection.close()


@contextmanager
def metered(
    folder: Path,
    url: str,
    port: int,
    *arguments: str,
    end: signal.Signals = signal.SIGTERM,
    variables: Mapping[str, str] | None = None,
    log: str = "",
) -> Iterator[Meter]:
    """Serve with metrics, end by a signal, and check that only a log like this is left."""
    temporary = folder / "temporary"
    temporary.mkdir(exist_ok=True)
    given = {**KEYS, "DATABASE_URL": url, "TMPDIR": str(temporary), "METRICS_PORT": str(port)}
    with serving(folder, *arguments, **{**given, **(variables or {})}) as program:
        meter = Meter(program, (variables or {}).get("METRICS_HOST", "127.0.0.1"), port)
        wait_for(meter.answers)
        yield meter
        assert program.stop(end) == 0
    assert list(temporary.iterdir()) == []
    with socket.create_server(("127.0.0.1", port)):
        pass  # nobody else listens there any more
    assert re.fullmatch(log, (folder / "log").read_text())


def listeners(process: psutil.Process) -> set[tuple[str, int]]:
    """Where a process and its children listen for TCP."""
    family = [process, *process.children(recursive=True)]
    return {
        (connection.laddr.ip, connection.laddr.port)
        for each in family
        for connection in each.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    }


def exercise(meter: Meter) -> Counter[tuple[str, ...]]:
    """Send one request of each kind, and return what has to be counted."""
    sent: Counter[tuple[str, ...]] = Counter()

    def send(route: str, status: int, verb: str, path: str, **options: str) -> None:
        assert meter.send(verb, path, **options) == status
        sent[verb, route, str(status)] += 1

    send(TASKS, 200, "GET", "/api/tasks?status=all", user="alice")
    send(TASKS, 200, "GET", "/api/tasks", user="bob")
    send(USER_TASKS, 200, "GET", "/api/alice/tasks", user="alice")
    send(USER_TASKS, 403, "GET", "/api/bob/tasks", user="alice")
    send(TASKS, 401, "GET", "/api/tasks")
    send(TASKS, 401, "GET", "/api/tasks", Authorization=f"Bearer {token('alice', exp=1)}")
    send(TASK, 404, "GET", "/api/tasks/47114711", user="alice")
    send(TASK, 400, "DELETE", "/api/tasks/x", user="alice")
    send(TASKS, 400, "GET", "/api/tasks?sort=alice", user="alice")
    send("none", 404, "GET", "/api/alice/nothing")
    send("none", 405, "DELETE", "/api/alice/tasks")
    preflight = {"Origin": ORIGIN, "Access-Control-Request-Method": "PUT"}
    send("none", 204, "OPTIONS", "/api/tasks", **preflight)
    send("/health", 200, "GET", "/health")
    return sent


REFUSALS = {
    "Forbidden": 1.0,
    "Unauthorized": 1.0,
    "ExpiredToken": 1.0,
    "TaskNotFound": 1.0,
    "InvalidParameter": 1.0,
    "InvalidTaskId": 1.0,
    "NotFound": 1.0,
    "MethodNotAllowed": 1.0,
}


def test_requests_are_counted_by_method_route_and_status(
    tmp_path: Path, database_url: str, unused_port: int
) -> None:
    with metered(tmp_path, database_url, unused_port, end=signal.SIGINT) as meter:
        sent = exercise(meter)
        wait_for(lambda: meter.requests() == sent)  # an answer is counted when it has been sent
        samples = meter.samples()
        text = meter.text()
        assert_names_and_labels(text)
        assert meter.send("GET", "/metrics") == 404  # not on the API's port
        kinds = {
            key[1]: value for key, value in samples.items() if key[0].endswith("refusals_total")
        }
        assert kinds == REFUSALS
        for named in ("alice", "bob", "47114711", "nothing", "eyJ", SECRET, database_url):
            assert named not in text
        assert listeners(psutil.Process(meter.program.process.pid)) == {
            ("127.0.0.1", urlsplit(meter.program.address).port),
            ("127.0.0.1", unused_port),
        }


def assert_names_and_labels(text: str) -> None:
    found = {
        family.name: family
        for family in text_string_to_metric_families(text)
        if family.name.startswith("todo_api")
    }
    assert {name: family.type for name, family in found.items()} == TYPES
    for name, family in found.items():
        assert family.documentation
        for sample in family.samples:
            assert set(sample.labels) - {"le"} == LABELS.get(name, set())
    bounds = {
        float(sample.labels["le"])
        for sample in found["todo_api_request_duration_seconds"].samples
        if sample.name.endswith("_bucket")
    }
    assert bounds == {*BUCKETS, float("inf")}


def test_strangers_cannot_make_series(tmp_path: Path, database_url: str, unused_port: int) -> None:
    """Neither by paths nor by methods, ids, queries or headers of their own."""
    with metered(tmp_path, database_url, unused_port) as meter:
        for verb in METHODS:
            for path in ("/nothing", TASKS, "/api/tasks/1", "/api/alice/tasks/1"):
                meter.send(verb, path)
        before = set(meter.samples())
        assert len(before) < MAXIMUM_SERIES
        methods = {method for method, _, _ in meter.requests()}
        with httpx2.Client(base_url=meter.program.address, **LOCAL) as client:
            for number in range(1_000):
                client.request(METHODS[number % 3], f"/stranger-{number}?x={number}")
            for number in range(300):
                user = f"/api/stranger-{number}/tasks/{number}"
                client.request("GET", user, headers={"X-Request-ID": f"stranger-{number}"})
        new = set(meter.samples()) - before
        assert new == set()
        assert "stranger" not in meter.text()
    assert len(methods - SERVED) <= 1, "what nobody serves needs no name of its own"


def test_levels_follow_a_request_that_is_blocked(
    tmp_path: Path, database_url: str, unused_port: int
) -> None:
    timeouts = {"LOCK_TIMEOUT": "30", "STATEMENT_TIMEOUT": "30", "POOL_TIMEOUT": "30"}
    small = {"POOL_SIZE": "1", **timeouts}
    names = ("requests_in_flight", "pool_connections", "pool_busy", "pool_waiting")
    with metered(tmp_path, database_url, unused_port, variables=small) as meter:

        def levels() -> list[float | None]:
            return [meter.value(name) for name in names]

        wait_for(lambda: levels() == [0, 1, 0, 0])
        with psycopg.connect(database_url) as holder, ThreadPoolExecutor() as pool:
            holder.execute("LOCK TABLE users, tasks")
            answers = [pool.submit(meter.send, "GET", TASKS, "alice") for _ in range(3)]
            wait_for(lambda: levels() == [3, 1, 1, 2])
            assert meter.value("pool_wait_seconds_count") == 0
            time.sleep(0.3)
            holder.rollback()
            assert [answer.result() for answer in answers] == [200] * 3
        wait_for(lambda: levels() == [0, 1, 0, 0])
        assert meter.value("pool_wait_seconds_count") == 2
        assert (meter.value("pool_wait_seconds_sum") or 0) > 0.5
        assert (meter.value("request_duration_seconds_sum", *LISTED) or 0) > 0.8
        assert meter.value("request_duration_seconds_bucket", "0.25", *LISTED) == 0
        assert meter.value("request_duration_seconds_bucket", "+Inf", *LISTED) == 3


def test_workers_are_added_up_and_one_that_dies_is_not_missed(
    tmp_path: Path, database_url: str, unused_port: int
) -> None:
    """The counters of a dead worker remain. Its connections no longer count."""
    log = r'.*"signal 9".*\n'
    with metered(tmp_path, database_url, unused_port, *TWO, end=signal.SIGINT, log=log) as meter:
        wait_for(lambda: meter.value("pool_connections") == 2)  # one of each
        sent = exercise(meter)
        for _ in range(40):
            assert meter.send("GET", "/livez") == 200
        sent["GET", "/livez", "200"] = 40
        wait_for(lambda: meter.requests() == sent)
        assert_names_and_labels(meter.text())
        known = {meter.process() for _ in range(20)}
        sent["GET", "/livez", "200"] += 20
        wait_for(lambda: meter.requests() == sent)
        victim = meter.program.workers()[0]
        victim.kill()
        victim.wait()
        wait_for(lambda: meter.requests() == sent)
        wait_for(lambda: len(meter.program.workers()) == 2)
        while meter.process() in known:  # until the new one answers
            sent["GET", "/livez", "200"] += 1
        sent["GET", "/livez", "200"] += 1
        wait_for(lambda: meter.requests() == sent)
        wait_for(lambda: meter.value("pool_connections") == 2)
        assert meter.value("pool_connections") == 2


def test_levels_of_restarted_workers_are_forgotten(
    tmp_path: Path, database_url: str, unused_port: int
) -> None:
    with metered(tmp_path, database_url, unused_port, *TWO) as meter:
        wait_for(lambda: meter.value("pool_connections") == 2)  # one of each
        old = meter.program.workers()
        meter.program.process.send_signal(signal.SIGHUP)
        wait_for(lambda: not any(worker.is_running() for worker in old))
        wait_for(lambda: meter.value("pool_connections") == 2)
        assert len(meter.program.workers()) == 2


async def test_key_set_has_an_age(tmp_path: Path, database_url: str, unused_port: int) -> None:
    """Infinite as long as there is none; then it grows."""
    with ExitStack() as stack:
        async with Publisher() as issuer:
            issuer.mode = "error"
            variables = {"BETTER_AUTH_URL": issuer.url, "LOG_LEVEL": "error"}
            meter = await to_thread(
                stack.enter_context,
                metered(tmp_path, database_url, unused_port, variables=variables),
            )

            def age() -> float:
                return meter.value("key_set_age_seconds") or 0.0

            await to_thread(wait_for, lambda: age() == float("inf"))
            issuer.mode = "ok"
            headers = {"Authorization": f"Bearer {issuer.token('alice')}"}
            await to_thread(wait_for, lambda: meter.send("GET", TASKS, **headers) == 200)
            await to_thread(wait_for, lambda: 0 < age() < 5)
            first = await to_thread(age)
            await to_thread(wait_for, lambda: first < age() < first + 10)
            await to_thread(stack.close)


def test_file_that_a_worker_has_just_made_is_passed_over(tmp_path: Path) -> None:
    """prometheus_client makes it empty, and cannot read it before it has its first value."""
    (tmp_path / "histogram_1.db").touch()
    assert not list(Workers(CollectorRegistry(), str(tmp_path)).collect())  # type: ignore[no-untyped-call]


def test_without_a_port_there_are_none(tmp_path: Path, database_url: str) -> None:
    temporary = {"TMPDIR": str(tmp_path)}
    with serving(tmp_path, DATABASE_URL=database_url, **KEYS, **temporary) as program:
        assert httpx2.get(f"{program.address}/metrics", **LOCAL).status_code == 404
        assert len(listeners(psutil.Process(program.process.pid))) == 1
        assert [path.name for path in tmp_path.iterdir()] == ["log"]
        assert program.stop() == 0


def test_scraper_that_stays_does_not_keep_the_program(
    tmp_path: Path, database_url: str, unused_port: int
) -> None:
    """At the address that METRICS_HOST names, wherever the API itself is."""
    hosts = {"HOST": "127.0.0.3", "METRICS_HOST": "127.0.0.2"}
    with (
        socket.socket() as idle,
        socket.socket() as slow,
        metered(tmp_path, database_url, unused_port, variables=hosts) as meter,
    ):
        api = urlsplit(meter.program.address)
        assert listeners(psutil.Process(meter.program.process.pid)) == {
            ("127.0.0.2", unused_port),
            ("127.0.0.3", api.port),
        }
        for connection in (idle, slow):
            connection.connect(("127.0.0.2", unused_port))
        slow.sendall(b"GET /metrics HTTP/1.1\r\nHost:")
        assert "todo_api_pool_busy" in meter.text()


def test_silent_client_of_the_metrics_is_disconnected(
    monkeypatch: pytest.MonkeyPatch, unused_port: int
) -> None:
    monkeypatch.setattr(metrics, "CLIENT_SECONDS", 0.2)
    address = "127.0.0.1", unused_port
    with metrics.served(*address, workers=1), socket.create_connection(address, 10) as client:
        assert client.recv(1) == b""


def test_port_in_use_is_said_in_one_line(tmp_path: Path, database_url: str) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        variables = {"METRICS_PORT": port, "DATABASE_URL": database_url, "TMPDIR": str(temporary)}
        ended = subprocess.run(
            command("serve", "--port", "0", "--workers", "2"),
            cwd=tmp_path,
            env=environment(**KEYS, **variables),
            capture_output=True,
            text=True,
            check=False,
        )
    assert ended.returncode == 1
    assert re.fullmatch(
        rf"todo-api: METRICS_HOST and METRICS_PORT: cannot listen on 127\.0\.0\.1 port {port}"
        r" \(Address already in use\)\n",
        ended.stderr,
    )
    assert list(temporary.iterdir()) == []
