"""Metrics for Prometheus, on a port of their own (https://prometheus.io/docs/practices/naming/).

With several workers each writes to files in a folder of its own, and the program that supervises
them adds them up (https://prometheus.github.io/client_python/multiprocess/).
"""

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from prometheus_client import (
    REGISTRY,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Metric,
    disable_created_metrics,
    start_http_server,
)
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

from todo_api.errors import StartupError
from todo_api.http.observation import METHODS, NO_ROUTE, OTHER_METHOD, reported_status
from todo_api.request_context import RequestContext

BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Seconds. Most requests take one or two milliseconds."""

REFRESH_SECONDS = 1.0
"""How often what has a level, not a count, is looked at."""

CLIENT_SECONDS = 10.0
"""How long a client of the metrics may be silent. The library sets no limit."""

_GAUGES = {
    "todo_api_requests_in_flight": "Requests that are being served.",
    "todo_api_pool_connections": "Connections to the database that are open.",
    "todo_api_pool_busy": "Connections to the database that are at work.",
    "todo_api_pool_waiting": "Requests that wait for a connection.",
    "todo_api_key_set_age_seconds": "Time since the issuer's key set was fetched.",
}


_MODES: Mapping[str, Literal["livemax"]] = {"todo_api_key_set_age_seconds": "livemax"}
"""How workers combine a level, if not by adding it up."""


class Metrics:
    """What this process counts. There is one a process: the client library keeps them by name."""

    def __init__(self) -> None:
        self._requests = Histogram(
            "todo_api_request_duration_seconds",
            "Requests that were answered, by route and status.",
            ("method", "route", "status"),
            buckets=BUCKETS,
        )
        self._refusals = Counter(
            "todo_api_refusals", "Requests that were refused or failed, by kind.", ("kind",)
        )
        self._pool_wait = Histogram(
            "todo_api_pool_wait_seconds",
            "Waits for a connection; a request that finds one idle does not wait.",
            buckets=BUCKETS,
        )
        self._gauges = {
            name: Gauge(name, text, multiprocess_mode=_MODES.get(name, "livesum"))
            for name, text in _GAUGES.items()
        }

    def observe(self, context: RequestContext, seconds: float) -> None:
        """Count a request."""
        method = context.method if context.method in METHODS else OTHER_METHOD
        labels = method, context.route or NO_ROUTE, reported_status(context)
        self._requests.labels(*labels).observe(seconds)
        if context.error is not None:
            self._refusals.labels(context.error).inc()

    def waited(self, seconds: float) -> None:
        """Count a wait for a connection."""
        self._pool_wait.observe(seconds)

    @asynccontextmanager
    async def kept_up(self, levels: Callable[[], dict[str, float]]) -> AsyncIterator[None]:
        """Look at the levels each second while the context lasts."""
        keeper = asyncio.create_task(self._keep_up(levels))
        try:
            yield
        finally:
            keeper.cancel()

    async def _keep_up(self, levels: Callable[[], dict[str, float]]) -> None:
        while True:
            for name, value in levels().items():
                self._gauges[f"todo_api_{name}"].set(value)
            await asyncio.sleep(REFRESH_SECONDS)


@cache
def metrics() -> Metrics:
    """Return the metrics of this process."""
    # Otherwise each counter and histogram has a second series.
    disable_created_metrics()  # type: ignore[no-untyped-call]  # the library does not declare it
    return Metrics()


class Workers(MultiProcessCollector):
    """Adds up what the workers count in their files."""

    def collect(self) -> Iterable[Metric]:
        """Return the sums. A file that a worker has just made is empty and cannot be read yet."""
        files = [str(file) for file in Path(self._path).glob("*.db") if _size(file)]
        return self.merge(files)  # type: ignore[no-any-return, no-untyped-call]


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except FileNotFoundError:  # `forget_levels` has removed it meanwhile
        return 0


@contextmanager
def served(host: str, port: int, workers: int) -> Iterator[None]:
    """Serve what this process counts, or what its workers do, at `/metrics`.

    Has to be entered before workers start: they find their folder in the environment. Raises
    `StartupError`.
    """
    with TemporaryDirectory(prefix="todo-api-metrics-") as folder:
        registry = REGISTRY
        if workers > 1:
            os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder
            registry = CollectorRegistry()
            Workers(registry)  # type: ignore[no-untyped-call]
        try:
            server, thread = start_http_server(port, host, registry)
        except OSError as error:
            raise StartupError(
                f"METRICS_HOST and METRICS_PORT: cannot listen on {host} port {port}"
                f" ({os.strerror(error.errno or 0)})"
            ) from error
        handler: Any = server.RequestHandlerClass
        server.RequestHandlerClass = type("Handler", (handler,), {"timeout": CLIENT_SECONDS})
        try:
            yield
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


def forget_levels(pid: int) -> None:
    """Drop the levels of a worker that has ended; what it counted stays."""
    mark_process_dead(pid)  # type: ignore[no-untyped-call]
