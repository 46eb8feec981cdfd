"""The parent of the embedded PostgreSQL: starts it, watches it, stops it after its last user.

A script of its own, run by `todo_api.database.embedded` and by nobody else:

    python -I -S supervisor.py FOLDER ACCOUNT COPY COMMAND…

FOLDER is absolute. ACCOUNT is `uid:gid`, or empty to stay as one is. COPY is a folder to remove
at the end, or empty. COMMAND is the server. The caller holds `supervisor.lock` and lets this
process inherit it, so the lock is held without a gap until this process has ended.

It prints one line, `ready` or the reason why not, and closes its output. From then on it waits
for an exclusive lock on `users.lock`. The kernel grants that when the last process sharing it has
gone, however it went, kill -9 included. It is kept to the end: who comes meanwhile waits for the
server to be down, then starts another.

Standard library only: it starts in some 30 ms and drags none of the program along.
"""

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

START_SECONDS = 120
"""How long a start may take: after a crash of the machine it replays up to 1 GB of log."""
STOP_SECONDS = 10
"""How long to wait for each way of stopping before taking the next, harsher one."""
LOG_BYTES = 1 << 20
"""A log over this size is emptied at the next start."""


def is_ready(data: Path) -> bool:
    """Return whether PostgreSQL says it accepts connections: line 8 of its `postmaster.pid`."""
    try:
        lines = (data / "postmaster.pid").read_text().splitlines()
    except OSError:
        return False
    return len(lines) > 7 and lines[7].strip() == "ready"  # noqa: PLR2004 - see the docstring


def identity(account: tuple[int, ...] | None) -> dict[str, Any]:
    """Return what `subprocess` needs to run a program as that uid and gid, with no other group."""
    return {"user": account[0], "group": account[1], "extra_groups": []} if account else {}


def main() -> None:
    """Run the server until its last user has left, it ends by itself, or SIGTERM comes."""
    folder, account, copy, *command = sys.argv[1:]
    if os.fork():  # the caller need not reap, nor even know, the process that stays
        os._exit(0)
    os.chdir("/")
    if copy:  # systemd-tmpfiles passes over a folder that is locked
        fcntl.flock(os.open(copy, os.O_RDONLY), fcntl.LOCK_EX)
    try:
        supervise(Path(folder), account, command)
    finally:
        if copy:
            shutil.rmtree(copy, ignore_errors=True)


def supervise(folder: Path, account: str, command: list[str]) -> None:
    """Start the server, report, and stay until it has ended."""
    log = os.open(folder / "log", os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
    if os.fstat(log).st_size > LOG_BYTES:
        os.ftruncate(log, 0)
    beginning = os.fstat(log).st_size
    try:
        postgres = subprocess.Popen(  # noqa: S603 - our own command
            command,
            cwd=folder / "data",  # entered before the account is taken on: see embedded.py
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            **identity(tuple(map(int, account.split(":"))) if account else None),
        )
    except OSError as error:
        report(f"{error.strerror} ({command[0]})", log)
        return
    stop_on_signals(postgres)
    threading.Thread(target=await_last_user, args=(folder / "users.lock",), daemon=True).start()

    signal.alarm(START_SECONDS)
    while not (ready := is_ready(folder / "data")) and postgres.poll() is None:
        time.sleep(0.002)
    if ready:
        signal.alarm(0)
        report("ready", log)
    postgres.wait()
    if not ready:
        said = os.pread(log, LOG_BYTES, beginning).decode(errors="replace")
        fatal = [line.partition("FATAL:")[2].strip() for line in said.splitlines()]
        report(next(filter(None, fatal), f"exit status {postgres.returncode}"), log)


def stop_on_signals(postgres: subprocess.Popen[bytes]) -> None:
    """Make SIGTERM a fast shutdown, with harsher ones to follow where that gets stuck."""
    harsher = iter((signal.SIGQUIT, signal.SIGKILL))

    def stop(*_: object) -> None:
        postgres.send_signal(signal.SIGINT)
        signal.alarm(STOP_SECONDS)

    def insist(*_: object) -> None:
        postgres.send_signal(next(harsher, signal.SIGKILL))
        signal.alarm(STOP_SECONDS)

    signal.signal(signal.SIGALRM, insist)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, stop)


def await_last_user(users: Path) -> None:
    """Block until no process shares the lock, then have the main thread stop the server."""
    fcntl.flock(os.open(users, os.O_RDWR), fcntl.LOCK_EX)
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)


def report(line: str, log: int) -> None:
    """Tell the caller, if it still lives, and let go of its pipe."""
    with suppress(BrokenPipeError):
        os.write(1, f"{line}\n".encode())
    os.dup2(log, 1)
    os.dup2(log, 2)


if __name__ == "__main__":
    main()
