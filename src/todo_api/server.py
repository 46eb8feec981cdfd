"""Serving with one process or several, and graceful shutdown."""

import asyncio
import gc
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing import parent_process, resource_tracker
from secrets import token_hex
from types import FrameType

import structlog
import uvicorn
from fastapi import FastAPI
from pydantic import SecretStr
from uvicorn.config import STARTUP_FAILURE
from uvicorn.supervisors import Multiprocess

from todo_api.app import create_app
from todo_api.database.database import Database
from todo_api.errors import ApiError, StartupError
from todo_api.http.logs import configure_logging
from todo_api.http.protocol import StrictProtocol
from todo_api.http.tracing import set_defaults
from todo_api.settings import Settings

log = structlog.get_logger()

NEW_OBJECTS_PER_COLLECTION = 50_000
"""Requests leave almost no garbage. Python's default, 700, took 4 % of their CPU (measured)."""

FILE_LIMIT = 65_536
"""Open files, and so connections, of one process. The usual 1,024 is for select(2)."""


class Server(uvicorn.Server):
    """uvicorn's server, with exit code 0 after a signal."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Finish the requests in flight; stop at once at a second Ctrl-C.

        uvicorn would raise the signal again afterwards, and the exit code would be -15.
        """
        del frame
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True


class Supervisor(Multiprocess):
    """uvicorn's supervisor of several workers; it calls `on_exit` with the id of an ended one."""

    def __init__(
        self, config: uvicorn.Config, listener: socket.socket, on_exit: Callable[[int], None]
    ) -> None:
        super().__init__(config, sockets=[listener])
        self._on_exit = on_exit
        self._running: set[int] = set()

    @property
    def failed(self) -> bool:
        """Whether a worker could not start."""
        return any(each.exitcode == STARTUP_FAILURE for each in self.processes)

    def init_processes(self) -> None:
        """Start the workers with Ctrl-C blocked, which they inherit.

        The terminal sends it to them too, and during their imports it would end in a traceback.
        This process gets it as well, and stops them in order.
        """
        resource_tracker.ensure_running()  # here, because it unblocks the signal when it starts
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        super().init_processes()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})

    def keep_subprocess_alive(self) -> None:
        """Replace the workers that have ended."""
        super().keep_subprocess_alive()
        running = {each.pid for each in self.processes if each.pid is not None}
        for pid in self._running - running:
            self._on_exit(pid)
        self._running = running


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
        timeout_graceful_shutdown=settings.shutdown_timeout,
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


async def check(settings: Settings, database_url: str) -> None:
    """Check that the database can be used as configured, once, before any worker starts."""
    database = Database(database_url, settings)
    try:
        for problem in await database.check():
            if problem.subject == "writes":  # the others change no answer: `todo-api check`
                log.warning(problem.detail)
    except ApiError as error:
        raise StartupError(f"DATABASE_URL: {error.__cause__ or error}") from error
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
