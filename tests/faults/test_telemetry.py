"""OpenTelemetry, as FastAPI sends it: the data that a collector gets, and no private data."""

import re
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import urlsplit

import httpx2
import pytest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.resource.v1.resource_pb2 import Resource
from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans, Span

from support.http import LOCAL
from support.program import Program, command, environment, serving
from support.service import ORIGIN, SECRET, bearer, token
from support.waiting import wait_for

KEYS = {"BETTER_AUTH_SECRET": SECRET, "LOG_LEVEL": "warning"}
SOON = {"OTEL_BSP_SCHEDULE_DELAY": "50", "OTEL_METRIC_EXPORT_INTERVAL": "100"}
MARK = "zq7mark"
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
PREFLIGHT = {"Origin": ORIGIN, "Access-Control-Request-Method": "PUT"}
DURATION = "http.server.request.duration"


class Collector:
    """Receives OTLP over HTTP, and keeps it."""

    def __init__(self) -> None:
        received: list[tuple[str, bytes]] = []
        self.received = received

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                received.append((self.path, body))
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def bodies(self, kind: str) -> list[bytes]:
        return [body for path, body in self.received if path == f"/v1/{kind}"]

    @property
    def _traces(self) -> list[ResourceSpans]:
        return [
            each
            for body in self.bodies("traces")
            for each in ExportTraceServiceRequest.FromString(body).resource_spans
        ]

    @property
    def resources(self) -> list[Resource]:
        """The resources that sent spans."""
        return [each.resource for each in self._traces]

    @property
    def spans(self) -> list[Span]:
        return [span for each in self._traces for scope in each.scope_spans for span in scope.spans]

    def points(self, name: str) -> list[Any]:
        """The newest points of a metric."""
        newest = ExportMetricsServiceRequest.FromString(self.bodies("metrics")[-1])
        return [
            point
            for resource in newest.resource_metrics
            for scope in resource.scope_metrics
            for metric in scope.metrics
            if metric.name == name
            for point in metric.histogram.data_points
        ]


@pytest.fixture
def collector() -> Iterator[Collector]:
    running = Collector()
    yield running
    running.close()


@contextmanager
def traced(
    folder: Path, url: str, endpoint: str, *arguments: str, **variables: str
) -> Iterator[tuple[Program, httpx2.Client]]:
    given = {**KEYS, **SOON, "OPENTELEMETRY": "on", "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint}
    with (
        serving(folder, *arguments, **{**given, "DATABASE_URL": url, **variables}) as program,
        httpx2.Client(base_url=program.address, **LOCAL) as client,
    ):
        yield program, client


def attributes(holder: Any) -> dict[str, Any]:
    """Return the attributes of a span or a point as Python values."""
    return {each.key: each.value.string_value or each.value.int_value for each in holder.attributes}


SENT = (
    # verb, path, user, status, name of the span, route
    ("POST", "/api/tasks", "alice", 201, "POST /api/tasks", "/api/tasks"),
    ("GET", "/api/tasks/1", "alice", 200, "GET /api/tasks/{id}", "/api/tasks/{id}"),
    ("GET", "/api/alice/tasks", "alice", 200, "GET /api/{user_id}/tasks", "/api/{user_id}/tasks"),
    ("GET", "/api/bob/tasks", "alice", 403, "GET /api/{user_id}/tasks", "/api/{user_id}/tasks"),
    ("DELETE", "/api/tasks/x", "alice", 400, "DELETE /api/tasks/{id}", "/api/tasks/{id}"),
    ("HEAD", "/api/tasks", "alice", 200, "HEAD /api/tasks", "/api/tasks"),
    ("GET", "/api/tasks", None, 401, "GET /api/tasks", "/api/tasks"),
    ("GET", "/api/nothing", None, 404, "GET", None),
    ("GET", "/health", None, 200, "GET /health", "/health"),
)


def test_every_request_sends_a_span_named_by_its_route(
    tmp_path: Path, database_url: str, collector: Collector
) -> None:
    with traced(tmp_path, database_url, collector.url) as (program, client):
        for verb, path, user, status, _, _ in SENT:
            body = {"title": "x"} if verb == "POST" else None
            headers = bearer(user) if user else {}
            answer = client.request(verb, path, headers=headers, json=body)
            assert answer.status_code == status
        assert program.stop() == 0
    seen = [
        (
            span.name,
            attributes(span)["http.request.method"],
            attributes(span)["http.response.status_code"],
            attributes(span).get("http.route"),
        )
        for span in collector.spans
    ]
    assert sorted(seen, key=str) == sorted(
        [(name, verb, status, route) for verb, _, _, status, name, route in SENT], key=str
    )
    assert {span.kind for span in collector.spans} == {Span.SPAN_KIND_SERVER}
    assert all(span.end_time_unix_nano > span.start_time_unix_nano for span in collector.spans)
    counted = {
        (attributes(point).get("http.route"), attributes(point)["http.response.status_code"])
        for point in collector.points(DURATION)
    }
    assert counted == {(route, status) for _, _, _, status, _, route in SENT}
    assert sum(point.count for point in collector.points(DURATION)) == len(SENT)
    assert (tmp_path / "log").read_text() == ""


def test_service_continues_the_trace_of_the_caller(
    tmp_path: Path, database_url: str, collector: Collector
) -> None:
    with traced(tmp_path, database_url, collector.url) as (_, client):
        for caller in (f"00-{TRACE}-{PARENT}-01", "nonsense", f"00-{TRACE}-{PARENT}-00"):
            client.get("/livez", headers={"traceparent": caller})
        client.get("/health")
        wait_for(lambda: len(collector.spans) == 3)  # the caller of one request did not sample it
    spans = [(span.trace_id.hex(), span.parent_span_id.hex()) for span in collector.spans]
    assert spans[0] == (TRACE, PARENT)
    assert [parent for _, parent in spans[1:]] == ["", ""]
    assert len({trace for trace, _ in spans}) == 3


def private_requests(client: httpx2.Client) -> None:
    """Send requests with `MARK` in private places. Telemetry must not contain it."""
    headers = {**bearer("a user", email=f"{MARK}@example.com"), "Baggage": f"a={MARK}"}
    for body in ({"title": MARK, "description": MARK}, {"title": MARK * 99, "status": MARK}):
        client.post("/api/tasks", json=body, headers={**headers, "User-Agent": MARK})
    client.put("/api/tasks/1", content=MARK, headers=headers)
    client.get("/api/tasks", headers={"Authorization": f"Bearer {MARK}"})
    client.get("/api/tasks", headers={**headers, "X-Request-ID": MARK, "Cookie": f"a={MARK}"})


def assert_nothing_private(folder: Path, url: str, ask: Callable[[httpx2.Client], object]) -> None:
    collector = Collector()
    try:
        with traced(folder, url, collector.url) as (program, client):
            ask(client)
            assert program.stop() == 0
        arrived = b"".join(body for _, body in collector.received).decode("latin-1")
        assert collector.spans
        assert {path for path, _ in collector.received} == {"/v1/traces", "/v1/metrics"}
    finally:
        collector.close()
    found = {
        key
        for span in collector.spans
        for key, value in attributes(span).items()
        if MARK in str(value)
    }
    assert found == set()
    for secret in (MARK, SECRET, "eyJ", "a user", "example.com", url):
        assert secret not in arrived, secret


def test_telemetry_contains_neither_token_nor_body_nor_header(
    tmp_path: Path, database_url: str
) -> None:
    assert_nothing_private(tmp_path, database_url, private_requests)


def test_telemetry_does_not_contain_the_user_in_the_path(tmp_path: Path, database_url: str) -> None:
    def ask(client: httpx2.Client) -> None:
        client.get(f"/api/{MARK}/tasks", headers=bearer(MARK))
        client.get(f"/api/{MARK}/tasks/1", headers=bearer("bob"))
        client.get(f"/{MARK}")
        client.options(f"/{MARK}", headers=PREFLIGHT)

    assert_nothing_private(tmp_path, database_url, ask)


def test_telemetry_does_not_contain_the_query(tmp_path: Path, database_url: str) -> None:
    """A client may put its token in the query by mistake."""

    def ask(client: httpx2.Client) -> None:
        client.get(f"/api/tasks?access_token={token(MARK)}&{MARK}={MARK}")

    assert_nothing_private(tmp_path, database_url, ask)


def processes(program: Program) -> set[str]:
    """Return the processes that answer on several connections. Request ids begin with their id."""
    return {process(urlsplit(program.address).netloc) for _ in range(8)}


def process(address: str) -> str:
    connection = HTTPConnection(address)  # waits for a worker to start
    try:
        connection.request("GET", "/livez")
        return (connection.getresponse().headers["x-request-id"] or "")[:16]
    finally:
        connection.close()


def test_every_worker_sends_spans(tmp_path: Path, database_url: str, collector: Collector) -> None:
    with traced(tmp_path, database_url, collector.url, "--workers", "2") as (program, _):
        wait_for(lambda: len(processes(program)) == 2)
        assert program.stop() == 0
    assert len({attributes(each)["service.instance.id"] for each in collector.resources}) == 2


def test_telemetry_is_off_by_default_despite_other_variables(
    tmp_path: Path, database_url: str, collector: Collector
) -> None:
    variables = {"OPENTELEMETRY": "", "FASTAPI_OTEL_AUTO_CONFIGURE": "true"}
    with traced(tmp_path, database_url, collector.url, **variables) as (program, client):
        assert client.get("/api/tasks", headers=bearer("alice")).status_code == 200
        assert program.stop() == 0  # which sends what it has
    assert collector.received == []


@pytest.fixture
def silent() -> Iterator[str]:
    """The address of a collector that accepts connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_silent_collector_does_not_delay_requests(
    tmp_path: Path, database_url: str, silent: str
) -> None:
    patient = {"OTEL_EXPORTER_OTLP_TIMEOUT": "3600"}
    with traced(tmp_path, database_url, silent, **patient) as (_, client):
        for _ in range(20):
            assert client.get("/api/tasks", headers=bearer("alice")).status_code == 200


def test_silent_collector_does_not_delay_shutdown(
    tmp_path: Path, database_url: str, silent: str
) -> None:
    with traced(tmp_path, database_url, silent) as (program, client):
        assert client.get("/api/tasks", headers=bearer("alice")).status_code == 200
        assert program.stop() == 0
    assert "Traceback" not in (tmp_path / "log").read_text()


WITHOUT = """
import sys
from importlib.machinery import PathFinder

class Without:
    finders = sys.meta_path[:]
    find_distributions = PathFinder.find_distributions

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.startswith("opentelemetry.sdk"):
            return None
        specs = (each.find_spec(name, path, target) for each in cls.finders)
        return next(filter(None, specs), None)

sys.meta_path[:] = [Without]
"""


def test_service_reports_a_missing_extra_in_one_line(tmp_path: Path, database_url: str) -> None:
    (tmp_path / "sitecustomize.py").write_text(WITHOUT)
    variables = {**KEYS, "DATABASE_URL": database_url, "OTEL_EXPORTER_OTLP_ENDPOINT": "http://x"}
    ended = subprocess.run(
        command("serve", "--port", "0"),
        cwd=tmp_path,
        env=environment(OPENTELEMETRY="on", PYTHONPATH=str(tmp_path), **variables),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 1
    assert re.fullmatch(r"todo-api: OPENTELEMETRY: needs `pip install [^\n]+`\n", ended.stderr)
    assert ended.stdout == ""


def test_service_runs_without_the_extra(tmp_path: Path, database_url: str) -> None:
    (tmp_path / "sitecustomize.py").write_text(WITHOUT)
    variables = {**KEYS, "DATABASE_URL": database_url, "PYTHONPATH": str(tmp_path)}
    with serving(tmp_path, **variables) as program:
        answer = httpx2.get(f"{program.address}/api/tasks", headers=bearer("alice"), **LOCAL)
        assert answer.status_code == 200
        assert program.stop() == 0
    assert (tmp_path / "log").read_text() == ""
