"""The parent process of the embedded PostgreSQL: it starts, restarts and stops the server.

A script of its own. Only `todo_api.database.embedded` runs it:

    python -I -S supervisor.py FOLDER LINK ACCOUNT COPY LOCK COMMAND…

FOLDER is absolute. LINK is the link by which clients find the socket, or empty. The supervisor
removes it when the last client has gone. ACCOUNT is `uid:gid`, or empty to keep the account. COPY
is a folder to remove at the end, and LOCK the open file that locks it. Both may be empty. COMMAND
is the server. The caller holds `supervisor.lock` and this process inherits it, so the lock is held
without a gap until this process ends. This process and the server inherit LOCK too, see
`temporary.py`.

It prints one line, `ready` or the reason for a failure, and closes its output. Then it waits for an
exclusive lock on `users.lock`. Every process that uses the server shares that lock. The kernel
grants the exclusive one when the last of them has gone, even by kill -9. The supervisor keeps it to
the end, so a new process waits for the server to be down and then starts another.

Until then the supervisor restarts a server that ends by itself (killed, out of memory). The new
server recovers all commits, and the program reconnects.

It imports only the standard library, so it starts in some 30 ms.
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
"""How long a start may take. After a crash of the machine it replays up to 1 GB of log."""
RESTART_SECONDS = 0.2
"""How long to wait before a restart, because processes of the old server have to end first."""
STOP_SECONDS = 10
"""How long to wait for the server to stop before sending the next, harsher signal."""
LOG_BYTES = 1 << 20
"""The size of the log above which a start of the server empties it."""


def is_ready(data: Path) -> bool:
    """Return whether PostgreSQL accepts connections, by line 8 of its `postmaster.pid`."""
    try:
        lines = (data / "postmaster.pid").read_text().splitlines()
    except OSError:
        return False
    return len(lines) > 7 and lines[7].strip() == "ready"  # noqa: PLR2004 - see the docstring


def identity(account: tuple[int, ...] | None) -> dict[str, Any]:
    """Return arguments for `subprocess` to run a program as that uid and gid, without groups."""
    return {"user": account[0], "group": account[1], "extra_groups": []} if account else {}


def main() -> None:
    """Run the server until no process uses it, or until SIGTERM."""
    folder, link, account, copy, lock, *command = sys.argv[1:]
    if os.fork():  # detached, so the caller does not have to reap it
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
        self._log_start = 0
        """The size of the log before the last start of the server."""
        self._postgres: subprocess.Popen[bytes] | None = None
        self._stopping = False
        self._harsher_signals = iter((signal.SIGQUIT, signal.SIGKILL))

    def run(self) -> None:
        """Start the server, report, and restart it until the supervisor stops it."""
        signal.signal(signal.SIGALRM, self._send_harsher_signal)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._stop)
        if not self._start():
            self._report_failure()
            return
        self._report("ready")
        users = self._folder / "users.lock"
        threading.Thread(target=await_last_user, args=(users, self._link), daemon=True).start()
        self._wait()
        pause = RESTART_SECONDS
        while not self._stopping:
            time.sleep(pause)
            pause = RESTART_SECONDS if self._start() else min(2 * pause, STOP_SECONDS)
            self._wait()

    def _open_log(self) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
        return os.open(self._folder / "log", flags, 0o600)

    def _start(self) -> bool:
        """Start the server and return whether it is ready. Does nothing once it should stop."""
        if self._stopping:
            return False
        if os.fstat(self._log).st_size > LOG_BYTES:
            os.ftruncate(self._log, 0)
        self._log_start = os.fstat(self._log).st_size
        data = self._folder / "data"
        signal.alarm(START_SECONDS)
        try:
            self._postgres = subprocess.Popen(  # noqa: S603 - our own command
                self._command,
                cwd=data,  # entered before the change of account: see embedded.py
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                pass_fds=self._locks,
                **identity(self._account),
            )
        except OSError as error:
            os.write(self._log, f"FATAL: {error.strerror} ({self._command[0]})\n".encode())
            return False
        if self._stopping:  # a signal came during the start, for the server before
            self._stop()
        while not (ready := is_ready(data)) and self._postgres.poll() is None:
            time.sleep(0.002)
        if not self._stopping:
            signal.alarm(0)
        return ready

    def _wait(self) -> None:
        if self._postgres is not None:
            self._postgres.wait()

    def _stop(self, *_: object) -> None:
        """Start a fast shutdown. Harsher signals follow if the server does not stop."""
        self._stopping = True
        self._send(signal.SIGINT)

    def _send_harsher_signal(self, *_: object) -> None:
        self._send(next(self._harsher_signals, signal.SIGKILL))

    def _send(self, number: signal.Signals) -> None:
        if self._postgres is not None:
            self._postgres.send_signal(number)
        signal.alarm(STOP_SECONDS)

    def _report_failure(self) -> None:
        self._wait()
        log = os.pread(self._log, LOG_BYTES, self._log_start).decode(errors="replace")
        fatal = [line.partition("FATAL:")[2].strip() for line in log.splitlines()]
        status = self._postgres.returncode if self._postgres else None
        self._report(next(filter(None, fatal), f"exit status {status}"))

    def _report(self, line: str) -> None:
        """Print the line for the caller, if it still lives, and close the pipe."""
        with suppress(BrokenPipeError):
            os.write(1, f"{line}\n".encode())
        os.dup2(self._log, 1)
        os.dup2(self._log, 2)


def await_last_user(users: Path, link: str) -> None:
    """Wait until no process shares the lock, then signal the main thread to stop the server."""
    fcntl.flock(os.open(users, os.O_RDWR), fcntl.LOCK_EX)
    if link:  # a process that comes now makes another when this one lets go of the lock
        with suppress(OSError):
            os.unlink(link)  # noqa: PTH108 - it is a link
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)


if __name__ == "__main__":
    main()
