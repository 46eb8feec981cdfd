"""Serving: one process or several, and an orderly end."""

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

import uvicorn
from fastapi import FastAPI
from pydantic import SecretStr
from uvicorn.config import STARTUP_FAILURE
from uvicorn.supervisors import Multiprocess

from todo_api.app import create_app
from todo_api.database.database import Database
from todo_api.errors import DatabaseUnreachable, StartupError
from todo_api.http.logs import configure_logging
from todo_api.http.protocol import StrictProtocol
from todo_api.http.tracing import set_defaults
from todo_api.settings import Settings

SILENT_SECONDS = 60
"""How long a worker may be silent before the supervisor replaces it.

A worker answers the supervisor only after its imports. On a busy machine they take more than
uvicorn's 5 seconds, so the supervisor would kill every new worker, and the next one as well.
"""

NEW_OBJECTS_PER_COLLECTION = 50_000
MANY_FILES = 65_536


class Server(uvicorn.Server):
    """uvicorn's server, ending with exit code 0 when it was asked to end."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Finish what is in flight; a second Ctrl-C does not wait.

        uvicorn would raise the signal again afterwards, and the exit code would be -15.
        """
        del frame
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True


class Supervisor(Multiprocess):
    """uvicorn's supervisor of several workers."""

    on_end: Callable[[int], None] = staticmethod(lambda _: None)
    """Is told the process id of a worker that has ended and was replaced."""

    def init_processes(self) -> None:
        """Start the workers, deaf to Ctrl-C.

        The terminal sends it to them as well, and in the middle of their imports it would end in a
        traceback. They inherit that it is blocked; this process gets it and ends them in order.
        """
        resource_tracker.ensure_running()  # unblocks it when it starts
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        super().init_processes()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})

    def keep_subprocess_alive(self) -> None:
        """Replace the workers that have ended."""
        before = {each.pid for each in self.processes}
        super().keep_subprocess_alive()
        for pid in before - {each.pid for each in self.processes}:
            self.on_end(pid or 0)


def configuration(settings: Settings, database_url: str) -> uvicorn.Config:
    """Return uvicorn's configuration. It is pickled for workers, so it holds no live object."""
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
        forwarded_allow_ips=list(settings.trusted_proxies),
        http=StrictProtocol,
        ws="none",
        lifespan="on",
        timeout_graceful_shutdown=settings.shutdown_timeout,
        timeout_worker_healthcheck=SILENT_SECONDS,
    )


def listener(settings: Settings) -> socket.socket:
    """Bind the address, before anything else is started. Raises `StartupError`."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return socket.create_server((settings.host, settings.port), family=family, backlog=2048)
    except OSError as error:
        raise StartupError(
            f"HOST and PORT: cannot listen on {settings.host} port {settings.port}"
            f" ({os.strerror(error.errno or 0)})"
        ) from error


async def check(settings: Settings, database_url: str) -> None:
    """Check once, before any worker starts, that the database can be used as configured."""
    database = Database(database_url, settings)
    try:
        await database.check()
    except DatabaseUnreachable as error:
        raise StartupError(f"DATABASE_URL: {error.__cause__}") from error
    finally:
        database.close()


@contextmanager
def metrics_served(settings: Settings) -> Iterator[None]:
    """Serve the metrics on their own port, if there is one. Raises `StartupError`."""
    if settings.metrics_port is None:
        yield
        return
    from todo_api.http import metrics  # noqa: PLC0415  a start without them is faster

    Supervisor.on_end = staticmethod(metrics.forget_levels)
    with metrics.served(settings.metrics_host, settings.metrics_port, settings.workers):
        yield


def serve(settings: Settings, database_url: str, listener: socket.socket) -> None:
    """Serve until a signal says to stop. What could not start exits with 1."""
    if settings.log_key is None:  # the same for every worker
        settings = settings.model_copy(update={"log_key": SecretStr(token_hex())})
    if settings.opentelemetry:
        set_defaults()
    _allow_many_connections()
    config = configuration(settings, database_url)
    if config.workers > 1:
        supervisor = Supervisor(config, sockets=[listener])
        supervisor.run()
        failed = any(each.exitcode == STARTUP_FAILURE for each in supervisor.processes)
    else:
        server = Server(config)
        server.run(sockets=[listener])
        failed = not server.started
    if failed:
        sys.exit(1)


def _allow_many_connections() -> None:
    """Use as many file descriptors as we may; the usual soft limit of 1,024 is for select(2)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < MANY_FILES:
        many = MANY_FILES if hard == resource.RLIM_INFINITY else min(hard, MANY_FILES)
        resource.setrlimit(resource.RLIMIT_NOFILE, (many, hard))


def _application(settings: Settings, database_url: str) -> FastAPI:
    configure_logging(settings)
    if parent := parent_process():
        _end_with(parent.sentinel)
    app = create_app(settings, database_url)
    # What was imported stays. The collector need not look at it again: a full pass over it took
    # 30 ms, in the middle of somebody's request.
    gc.freeze()
    # Requests leave next to nothing for the collector: looking at every 700th new object, as is
    # the default, took 4 % of their CPU (measured).
    gc.set_threshold(NEW_OBJECTS_PER_COLLECTION)
    gc.enable()
    return app


def _end_with(sentinel: int) -> None:
    """End this worker in order when the program that started it is gone, however it died."""
    loop = asyncio.get_running_loop()

    def end() -> None:
        loop.remove_reader(sentinel)
        signal.raise_signal(signal.SIGTERM)

    loop.add_reader(sentinel, end)
