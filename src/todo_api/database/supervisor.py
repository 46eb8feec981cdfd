"""The parent of the embedded PostgreSQL: starts it, again if it crashes, stops it in the end.

A script of its own, run by `todo_api.database.embedded` and by nobody else:

    python -I -S supervisor.py FOLDER LINK ACCOUNT COPY LOCK COMMAND…

FOLDER is absolute. LINK leads clients to the socket and is removed when the last has gone, or is
empty. ACCOUNT is `uid:gid`, or empty to stay as one is. COPY is a folder to remove at the end, and
LOCK the open file that locks it; both may be empty. COMMAND is the server. The caller holds
`supervisor.lock` and lets this process inherit it, so the lock is held without a gap until this
process has ended. This process and the server inherit LOCK too: see `temporary.py`.

It prints one line, `ready` or the reason why not, and closes its output. From then on it waits
for an exclusive lock on `users.lock`. The kernel grants that when the last process sharing it has
gone, however it went, kill -9 included. It is kept to the end: who comes meanwhile waits for the
server to be down, then starts another. Until then a server that ends by itself (killed, out of
memory) is started again: it recovers what was committed, and the program its connections.

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
RESTART_SECONDS = 0.2
"""How long to wait before a start after a crash: what is left of the old server has to go first."""
STOP_SECONDS = 10
"""How long to wait for each way of stopping before taking the next, harsher one."""
LOG_BYTES = 1 << 20
"""A log over this size is emptied at the next start of the server."""


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
    """Run the server until its last user has left, or SIGTERM comes."""
    folder, link, account, copy, lock, *command = sys.argv[1:]
    if os.fork():  # the caller need not reap, nor even know, the process that stays
        os._exit(0)
    os.chdir("/")
    try:
        Supervisor(Path(folder), link, account, lock, command).run()
    finally:
        if copy:
            shutil.rmtree(copy, ignore_errors=True)


class Supervisor:
    """Keeps one server running."""

    def __init__(
        self, folder: Path, link: str, account: str, lock: str, command: list[str]
    ) -> None:
        self._folder = folder
        self._link = link
        self._locks = [int(lock)] if lock else []
        self._account = tuple(map(int, account.split(":"))) if account else None
        self._command = command
        self._log = self._open_log()
        self._beginning = 0
        self._postgres: subprocess.Popen[bytes] | None = None
        self._ending = False
        self._harsher = iter((signal.SIGQUIT, signal.SIGKILL))

    def run(self) -> None:
        """Start the server, report, and keep it running until it is to end."""
        signal.signal(signal.SIGALRM, self._insist)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._stop)
        if not self._start():
            self._report_why_not()
            return
        self._report("ready")
        users = self._folder / "users.lock"
        threading.Thread(target=await_last_user, args=(users, self._link), daemon=True).start()
        self._wait()
        pause = RESTART_SECONDS
        while not self._ending:
            time.sleep(pause)
            pause = RESTART_SECONDS if self._start() else min(2 * pause, STOP_SECONDS)
            self._wait()

    def _open_log(self) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
        return os.open(self._folder / "log", flags, 0o600)

    def _start(self) -> bool:
        """Start the server, unless it is to end; return whether it became ready."""
        if self._ending:
            return False
        if os.fstat(self._log).st_size > LOG_BYTES:
            os.ftruncate(self._log, 0)
        self._beginning = os.fstat(self._log).st_size
        data = self._folder / "data"
        signal.alarm(START_SECONDS)
        try:
            self._postgres = subprocess.Popen(  # noqa: S603 - our own command
                self._command,
                cwd=data,  # entered before the account is taken on: see embedded.py
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                pass_fds=self._locks,
                **identity(self._account),
            )
        except OSError as error:
            os.write(self._log, f"FATAL: {error.strerror} ({self._command[0]})\n".encode())
            return False
        if self._ending:  # asked for meanwhile, of the server before
            self._stop()
        while not (ready := is_ready(data)) and self._postgres.poll() is None:
            time.sleep(0.002)
        if not self._ending:
            signal.alarm(0)
        return ready

    def _wait(self) -> None:
        if self._postgres is not None:
            self._postgres.wait()

    def _stop(self, *_: object) -> None:
        """Make SIGTERM a fast shutdown, with harsher ones to follow where that gets stuck."""
        self._ending = True
        self._send(signal.SIGINT)

    def _insist(self, *_: object) -> None:
        self._send(next(self._harsher, signal.SIGKILL))

    def _send(self, number: signal.Signals) -> None:
        if self._postgres is not None:
            self._postgres.send_signal(number)
        signal.alarm(STOP_SECONDS)

    def _report_why_not(self) -> None:
        self._wait()
        said = os.pread(self._log, LOG_BYTES, self._beginning).decode(errors="replace")
        fatal = [line.partition("FATAL:")[2].strip() for line in said.splitlines()]
        status = self._postgres.returncode if self._postgres else None
        self._report(next(filter(None, fatal), f"exit status {status}"))

    def _report(self, line: str) -> None:
        """Tell the caller, if it still lives, and let go of its pipe."""
        with suppress(BrokenPipeError):
            os.write(1, f"{line}\n".encode())
        os.dup2(self._log, 1)
        os.dup2(self._log, 2)


def await_last_user(users: Path, link: str) -> None:
    """Block until no process shares the lock, then have the main thread stop the server."""
    fcntl.flock(os.open(users, os.O_RDWR), fcntl.LOCK_EX)
    if link:  # a process that comes now makes another when this one lets go of the lock
        with suppress(OSError):
            os.unlink(link)  # noqa: PTH108 - it is a link
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)


if __name__ == "__main__":
    main()
