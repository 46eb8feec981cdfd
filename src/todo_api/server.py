"""Serving with one process or several, and graceful shutdown."""

import asyncio
import gc
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing import parent_process, resource_tracker
from secrets import token_hex
from types import FrameType

import structlog
import uvicorn
from fastapi import FastAPI
from pydantic import SecretStr
from uvicorn.config import STARTUP_FAILURE
from uvicorn.supervisors.multiprocess import Multiprocess, Process

from todo_api.app import create_app
from todo_api.database.database import Database
from todo_api.errors import ApiError, StartupError
from todo_api.http.logs import configure_logging
from todo_api.http.protocol import StrictProtocol
from todo_api.http.tracing import set_defaults
from todo_api.settings import Settings

log = structlog.get_logger()

SILENT_SECONDS = 60
"""How long a worker may take to start, and later to answer, before the supervisor replaces it.

A worker answers only after its imports. On a busy machine these take longer than uvicorn's default
of 5 seconds, so uvicorn would kill each new worker before it answers.
"""

FAILED_STARTS = 3
"""The supervisor gives up after this many failed starts in a row, unless another worker serves."""

STOP_SECONDS = 10
"""How long a worker may take to stop, in addition to `SHUTDOWN_TIMEOUT`."""

TICK_SECONDS = 0.5
"""The interval of uvicorn's supervisor between two health checks."""

NEW_OBJECTS_PER_COLLECTION = 50_000
"""Python collects garbage after so many new objects. Requests leave almost none, and with the
default of 700 the collector takes 4 % of their CPU (measured)."""

FILE_LIMIT = 65_536
"""The most open files of a process. Each connection is one. The usual 1,024 is for select(2)."""


class Server(uvicorn.Server):
    """uvicorn's server, with exit code 0 after a signal."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Finish the requests in flight; stop at once at a second Ctrl-C.

        uvicorn would raise the signal again afterwards, and the exit code would be -15.
        """
        del frame
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True


@dataclass(slots=True)
class _Health:
    """What the supervisor knows about a worker."""

    is_ready: bool = False
    """Whether the worker has started to serve."""
    is_asked: bool = False
    """Whether the worker still has to answer the last ping."""
    silent_ticks: int = 0
    """The number of health checks since the worker last answered that it serves."""
    failed_starts: int = 0
    """The number of failed starts in a row, including those of the workers before this one."""
    pause_ticks: int = 0
    """The number of health checks until a new worker replaces this one, which has ended."""


class Supervisor(Multiprocess):
    """uvicorn's supervisor of several workers, with a health check of its own.

    While uvicorn's own check waits for a worker that starts, the supervisor cannot stop. If a
    worker ends before it serves, uvicorn starts another one without limit, and logs only INFO. This
    check logs each replacement, and gives up after `FAILED_STARTS`.

    The supervisor calls `on_exit` with the id of each worker that has ended.
    """

    def __init__(
        self, config: uvicorn.Config, listener: socket.socket, on_exit: Callable[[int], None]
    ) -> None:
        super().__init__(config, sockets=[listener])
        self.failed = False
        """Whether the supervisor has given up."""
        self._on_exit = on_exit
        self._known: set[int] = set()
        self._health: dict[Process, _Health] = {}

    def init_processes(self) -> None:
        """Start the workers."""
        with _ctrl_c_blocked():
            super().init_processes()
        self._known = self._running()

    def keep_subprocess_alive(self) -> None:
        """Replace the workers that have ended or hang. uvicorn calls this twice a second."""
        self._health = {each: self._health.get(each, _Health()) for each in self.processes}
        for index, worker in enumerate(self.processes):
            if self.should_exit.is_set():
                return
            health = self._health[worker]
            if health.pause_ticks:
                health.pause_ticks -= 1
                if not health.pause_ticks:
                    self._start(index, health.failed_starts)
            elif reason := self._failure(worker, health):
                self._replace(index, worker, health, reason)
        running = self._running()
        for pid in self._known - running:
            self._on_exit(pid)
        self._known = running

    def join_all(self) -> None:
        """Wait until the workers have stopped, and kill those that do not stop in time."""
        deadline = time.monotonic() + (self.config.timeout_graceful_shutdown or 0) + STOP_SECONDS
        for worker in self.processes:
            worker.process.join(max(0, deadline - time.monotonic()))
            if worker.exitcode is None:
                log.error("killing worker", pid=worker.pid, reason="did not stop in time")
                worker.kill()
                worker.join()

    def _running(self) -> set[int]:
        return {each.pid for each in self.processes if each.pid and each.exitcode is None}

    def _failure(self, worker: Process, health: _Health) -> str | None:
        """Return why a worker must be replaced, if so."""
        if (code := worker.exitcode) is not None:
            return f"signal {-code}" if code < 0 else f"exit code {code}"
        health.silent_ticks += 1
        with suppress(OSError, EOFError):
            _ask(worker, health)
        # Ticks instead of a clock: after a pause of the whole machine the worker may answer late.
        if health.silent_ticks < SILENT_SECONDS / TICK_SECONDS:
            return None
        what = "no answer for" if health.is_ready else "not ready after"
        return f"{what} {SILENT_SECONDS} seconds"

    def _replace(self, index: int, worker: Process, health: _Health, reason: str) -> None:
        code = worker.exitcode
        worker.kill()
        worker.join()
        if health.is_ready:
            log.error("replacing worker", pid=worker.pid, reason=reason)
            self._start(index, 0)
            return
        health.failed_starts += 1
        is_final = code == STARTUP_FAILURE or health.failed_starts >= FAILED_STARTS
        if is_final and not any(each.is_ready for each in self._health.values()):
            log.error("giving up, because no worker can start", pid=worker.pid, reason=reason)
            self.failed = True
            self.should_exit.set()
            return
        pause = min(2 ** (health.failed_starts - 1), SILENT_SECONDS)
        log.error("replacing worker", pid=worker.pid, reason=reason, pause_seconds=pause)
        health.pause_ticks = round(pause / TICK_SECONDS)

    def _start(self, index: int, failed_starts: int) -> None:
        worker = self.processes[index] = Process(self.config, self.sockets)
        self._health[worker] = _Health(failed_starts=failed_starts)
        with _ctrl_c_blocked():
            worker.start()


@contextmanager
def _ctrl_c_blocked() -> Iterator[None]:
    """Block Ctrl-C, also in the workers that start meanwhile.

    The terminal sends it to them too, and during their imports it would end in a traceback. The
    supervisor gets it as well, and stops them gracefully.
    """
    resource_tracker.ensure_running()  # here, because it unblocks the signal when it starts
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def _ask(worker: Process, health: _Health) -> None:
    """Read the worker's answers, which say whether it serves, and send the next ping."""
    while worker.parent_conn.poll():
        health.is_asked = False
        if not worker.parent_conn.recv():
            continue
        if not health.is_ready:
            log.info("worker serves", pid=worker.pid)
        health.is_ready, health.silent_ticks, health.failed_starts = True, 0, 0
    if not health.is_asked:
        worker.parent_conn.send(b"ping")
        health.is_asked = True


def configuration(settings: Settings, database_url: str) -> uvicorn.Config:
    """Return uvicorn's configuration, without live objects because it is pickled for workers."""
    return uvicorn.Config(
        partial(_application, settings, database_url),
        factory=True,
        host=settings.host,
        port=settings.port,
        workers=settings.workers,
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=True,
        proxy_headers=bool(settings.trusted_proxies),
        forwarded_allow_ips=[str(each) for each in settings.trusted_proxies],
        http=StrictProtocol,
        ws="none",
        lifespan="on",
        timeout_keep_alive=settings.keep_alive_timeout,
        timeout_graceful_shutdown=settings.shutdown_timeout,
        timeout_worker_healthcheck=SILENT_SECONDS,
    )


def listener(settings: Settings) -> socket.socket:
    """Return a socket bound to the configured address. Raises `StartupError`."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return socket.create_server((settings.host, settings.port), family=family, backlog=2048)
    except OSError as error:
        raise StartupError(
            f"HOST and PORT: cannot listen on {settings.host} port {settings.port}"
            f" ({os.strerror(error.errno or 0)})"
        ) from error


def warn(settings: Settings) -> None:
    """Log what is probably wrong in the settings."""
    for problem in settings.warnings():
        log.warning("check the settings", reason=problem)


async def check(settings: Settings, database_url: str) -> str:
    """Check that the database can be used as configured, once, before any worker starts.

    Return the names of the database and of its host.
    """
    database = Database(database_url, settings)
    try:
        for problem in await database.check():
            if problem.subject == "writes":  # the others change no answer: `todo-api check`
                log.warning(problem.detail)
    except ApiError as error:
        raise StartupError(f"DATABASE_URL: {error.__cause__ or error}") from error
    else:
        return database.pool.place
    finally:
        database.close()


@contextmanager
def metrics_served(settings: Settings) -> Iterator[None]:
    """Serve the metrics on their own port, if one is set. Raises `StartupError`."""
    if settings.metrics_port is None:
        yield
        return
    from todo_api.http import metrics  # noqa: PLC0415  a start without them is faster

    with metrics.served(settings.metrics_host, settings.metrics_port, settings.workers):
        yield


def serve(settings: Settings, database_url: str, listener: socket.socket) -> None:
    """Serve until a signal stops the program; exit with 1 if the application cannot start."""
    if settings.log_key is None:  # the same for every worker
        settings = settings.model_copy(update={"log_key": SecretStr(token_hex())})
    if settings.opentelemetry:
        set_defaults()
    _raise_file_limit()
    config = configuration(settings, database_url)
    if config.workers > 1:
        supervisor = Supervisor(config, listener, _after_exit(settings))
        supervisor.run()
        failed = supervisor.failed
    else:
        server = Server(config)
        server.run(sockets=[listener])
        failed = not server.started
    if failed:
        sys.exit(1)


def _after_exit(settings: Settings) -> Callable[[int], None]:
    """Return the function to call with the id of a worker that has ended."""
    if settings.metrics_port is None:
        return lambda _: None
    from todo_api.http import metrics  # noqa: PLC0415  a start without them is faster

    return metrics.forget_levels


def _raise_file_limit() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < FILE_LIMIT:
        limit = FILE_LIMIT if hard == resource.RLIM_INFINITY else min(hard, FILE_LIMIT)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


def _application(settings: Settings, database_url: str) -> FastAPI:
    if parent := parent_process():
        configure_logging(settings)
        _stop_after(parent.sentinel)
    app = create_app(settings, database_url)
    # The collector need not look at imports again: a full pass over them took 30 ms, in the middle
    # of a request.
    gc.freeze()
    gc.set_threshold(NEW_OBJECTS_PER_COLLECTION)
    gc.enable()
    return app


def _stop_after(sentinel: int) -> None:
    """Stop this worker gracefully when the program that started it is gone, even if killed."""
    loop = asyncio.get_running_loop()

    def stop() -> None:
        loop.remove_reader(sentinel)
        signal.raise_signal(signal.SIGTERM)

    loop.add_reader(sentinel, stop)
