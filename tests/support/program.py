"""The program as a process: started, called over HTTP, ended by a signal."""

import os
import re
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path

import httpx2
import psutil

from support.http import LOCAL
from support.waiting import LIMIT


class Program:
    """A running `todo-api serve`."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.address = self._read(r"listening on (http://\S+)")

    @cached_property
    def database(self) -> str:
        """The database that it says it serves."""
        return self._read(r"^Database: (.+)$")

    @cached_property
    def example_token(self) -> str:
        """The token of the curl line that development mode prints."""
        return self._read(r"Bearer ([\w.-]+)")

    def _read(self, pattern: str) -> str:
        """Read what the program prints up to a line with the pattern, and return its group."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if found := re.search(pattern, line):
                return found[1]
        raise AssertionError(f"the program ended without printing {pattern}")

    def client(self, token: str | None = None) -> httpx2.Client:
        """Return a client that is signed in, with the token of the printed line if not given."""
        headers = {"Authorization": f"Bearer {token or self.example_token}"}
        return httpx2.Client(base_url=self.address, headers=headers, **LOCAL)

    def connect(self) -> socket.socket:
        """Return a connection, for requests that no client of HTTP would send."""
        host, _, port = self.address.removeprefix("http://").partition(":")
        return socket.create_connection((host, int(port)), timeout=LIMIT)

    def workers(self) -> list[psutil.Process]:
        """Return the processes that serve, where there are several."""
        found = []
        for child in psutil.Process(self.process.pid).children():
            with suppress(psutil.NoSuchProcess):
                is_alive = child.status() != psutil.STATUS_ZOMBIE
                if is_alive and "spawn_main" in " ".join(child.cmdline()):
                    found.append(child)
        return found

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal and return the exit code."""
        self.process.send_signal(number)
        return self.process.wait(LIMIT)


def find_unused_port() -> int:
    """Return a port where nobody listens, and that the kernel gives to no client meanwhile."""
    while True:
        port = 20_000 + secrets.randbelow(12_768)  # below the usual range of clients' ports
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def environment(**variables: str) -> dict[str, str]:
    """Return an environment without the developer's settings."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    return {**kept, **variables}


def command(*arguments: str) -> list[str]:
    """Return the command line of the program."""
    return [sys.executable, "-m", "todo_api", *arguments]


def run(
    folder: Path, *arguments: str, given: str = "", **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run a command of the program to its end in a folder, with this standard input."""
    done = subprocess.run(
        command(*arguments),
        cwd=folder,
        env=environment(**variables),
        input=given.encode(),
        capture_output=True,
        timeout=LIMIT,
        check=False,
    )
    return subprocess.CompletedProcess(
        done.args, done.returncode, done.stdout.decode(), done.stderr.decode()
    )


@contextmanager
def begun(folder: Path, *arguments: str, **variables: str) -> Iterator[subprocess.Popen[str]]:
    """Begin a command of the program in a folder, and end it afterwards."""
    process = subprocess.Popen(
        command(*arguments),
        cwd=folder,
        env=environment(**variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def stop(process: subprocess.Popen[str], number: signal.Signals) -> tuple[int, str, str]:
    """Send a signal to a command, and return its exit code, output and errors."""
    process.send_signal(number)
    output, errors = process.communicate(timeout=LIMIT)
    return process.returncode, output, errors


@contextmanager
def serving(
    folder: Path,
    *arguments: str,
    prelude: str | None = None,
    script: str | None = None,
    **variables: str,
) -> Iterator[Program]:
    """Run `todo-api serve` in a folder on a free port, and end it afterwards.

    The program's own process runs the Python code `prelude` first. `script` is another installed
    `todo-api` than the checkout's.
    """
    log = (folder / "log").open("w")
    program = command("serve", "--port", "0", *arguments)
    if script is not None:
        program[:3] = [script]
    if prelude is not None:
        program[1:3] = ["-c", f"from todo_api import cli, server\n{prelude}\ncli.main()"]
    process = subprocess.Popen(
        program,
        cwd=folder,
        env=environment(**variables),
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        start_new_session=True,
    )
    try:
        yield Program(process)
    finally:
        log.close()
        if process.poll() is None:
            process.kill()
        process.wait()
        if process.stdout:
            process.stdout.close()
