"""The compared servers and their commands."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from data import SECRET
from load import CONNECTIONS

HERE = Path(__file__).parent
ASYNCPG = HERE.parent / ".venv" / "asyncpg"


@dataclass(frozen=True)
class Server:
    """A server to measure: its command and the extra variables of its environment."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)


_OURS = [sys.executable, "-m", "todo_api", "serve"]
_UVICORN = [sys.executable, "-m", "uvicorn", "--no-access-log", "--log-level", "warning"]
_UVICORN += ["--app-dir", str(HERE), "--timeout-keep-alive", "75"]  # as ours
_NODE = ["node", str(HERE / "fastify" / "server.mjs")]

OURS = Server("ours", _OURS)
OURS_UNLOCKED = Server("ours, row security off", _OURS, {"ROW_SECURITY": "off"})
OURS_TWICE = Server("ours, two workers", _OURS, {"WORKERS": "2"})
IDIOMATIC = Server("idiomatic", [*_UVICORN, "idiomatic:app"], {"PYTHONPATH": str(ASYNCPG)})
FASTIFY = Server("fastify", _NODE)
FASTIFY_LOCKED = Server("fastify + row security", _NODE, {"ROW_SECURITY": "on"})
FASTIFY_VERSIONED = Server("fastify + versions", _NODE, {"VERSIONS": "on"})
FLOOR = Server("floor", [*_UVICORN, "floor:app"])


@contextmanager
def running(
    server: Server, url: str, pool_size: int = CONNECTIONS
) -> Iterator[tuple[psutil.Process, str]]:
    """Run a server with a pool of this size. Gives its process and its address."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    environment = {
        "PATH": os.environ["PATH"],
        "DATABASE_URL": url,
        "BETTER_AUTH_SECRET": SECRET,
        "POOL_SIZE": str(pool_size),
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
    """Wait until a server answers, at most 20 seconds."""
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
