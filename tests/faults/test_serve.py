"""The program as its users run it: from an empty folder, ended by signals, killed outright."""

import json
import os
import signal
import socket
import stat
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import unquote

import httpx2
import psutil
import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

from support.http import LOCAL
from support.program import Program, command, environment, serving
from support.service import SECRET, bearer
from support.waiting import LIMIT, wait_for
from todo_api.database.migrations import ADVISORY_LOCK

KEYS = {"BETTER_AUTH_SECRET": SECRET, "LOG_LEVEL": "warning"}


def run(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments),
        cwd=folder,
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_printed_line_creates_a_task_that_outlives_the_program(tmp_path: Path) -> None:
    with serving(tmp_path, LOG_LEVEL="warning") as program, program.client() as client:
        created = client.post("/api/tasks", json={"title": "Buy groceries"})
        assert created.status_code == 201
        assert program.stop() == 0
    secret = tmp_path / ".data" / "development-secret"
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    with serving(tmp_path, LOG_LEVEL="warning") as program, program.client() as client:
        assert client.get("/api/demo/tasks").json() == [created.json()]
        assert program.stop(signal.SIGINT) == 0
    assert (tmp_path / "log").read_text() == ""


def test_start_says_which_database_is_served(tmp_path: Path, database_url: str) -> None:
    name, _, host = database_url.rpartition("/")[2].partition("?host=")
    with serving(tmp_path, DATABASE_URL=database_url, **KEYS) as program:
        assert program.database == f"{name} on {unquote(host)}"
        wait_for(lambda: accepts(program))
        assert program.stop() == 0
    assert (tmp_path / "log").read_text() == ""
    with serving(tmp_path, DATA_DIR="here", **KEYS) as program:
        assert program.database == "embedded, under here"
        wait_for(lambda: accepts(program))
        assert program.stop() == 0
    (line,) = (tmp_path / "log").read_text().splitlines()
    assert json.loads(line)["level"] == "warning"
    assert json.loads(line)["reason"].startswith("DATABASE_URL (or NEON_DATABASE_URL, NEON_DB_URL)")


def test_broken_line_of_the_env_file_serves_nothing(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text('PORT=0\nDATABASE_URL="postgresql://u:hunter2@db.example/x\n')
    problem = ".env line 2: cannot be parsed; write NAME=value, and close every quote"
    for name in ("serve", "migrate", "restored", "token"):
        done = run(tmp_path, *[name, "alice"][: 2 if name == "token" else 1])
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == f"todo-api: {problem}\n"
    checked = run(tmp_path, "check")
    assert (checked.returncode, checked.stdout) == (1, f"failure  settings: {problem}\n")
    assert not (tmp_path / ".data").exists()


def test_every_acknowledged_task_survives_kill_9(tmp_path: Path) -> None:
    acknowledged: list[int] = []
    with serving(tmp_path, "--workers", "2") as program:

        def write(_: int) -> None:
            with program.client() as client:
                try:
                    while True:
                        created = client.post("/api/tasks", json={"title": "x"})
                        if created.status_code != 201:  # the workers outlive it by a moment
                            return
                        acknowledged.append(created.json()["id"])
                        if len(acknowledged) == 50:
                            program.process.kill()
                except httpx2.TransportError:
                    return

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(write, range(4)))
    assert len(acknowledged) >= 50
    with serving(tmp_path) as program, program.client() as client:
        stored = {task["id"] for task in client.get("/api/tasks").json()}
        assert set(acknowledged) <= stored
        assert program.stop() == 0


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_finishes_what_is_in_flight(
    tmp_path: Path, database_url: str, workers: int, number: signal.Signals
) -> None:
    """A task is locked by somebody; the write that waits for it is answered all the same."""
    patient = {**KEYS, "LOCK_TIMEOUT": "20", "STATEMENT_TIMEOUT": "20"}
    with (
        serving(
            tmp_path, "--workers", str(workers), DATABASE_URL=database_url, **patient
        ) as program,
        httpx2.Client(base_url=program.address, headers=bearer("alice"), **LOCAL) as client,
        psycopg.connect(database_url, autocommit=True) as watcher,
        psycopg.connect(database_url) as holder,
    ):
        task = client.post("/api/tasks", json={"title": "x"}).json()
        holder.execute("SELECT * FROM tasks FOR UPDATE")
        answers: list[httpx2.Response] = []
        request = threading.Thread(
            target=lambda: answers.append(
                client.put(f"/api/tasks/{task['id']}", json={"title": "y"})
            )
        )
        request.start()
        wait_for(lambda: waiting_for_a_lock(watcher) == 1)
        program.process.send_signal(number)
        wait_for(lambda: not accepts(program))
        holder.rollback()
        request.join(15)
        assert program.process.wait(LIMIT) == 0
        assert [answer.json()["title"] for answer in answers] == ["y"]
    assert (tmp_path / "log").read_text() == ""


def test_ctrl_c_reaches_workers_that_are_still_starting(tmp_path: Path, database_url: str) -> None:
    for delay in (0.0, 0.1, 0.2, 0.3):
        with serving(tmp_path, "--workers", "2", DATABASE_URL=database_url, **KEYS) as program:
            time.sleep(delay)  # to meet them at different moments of their start
            os.killpg(program.process.pid, signal.SIGINT)
            assert program.process.wait(LIMIT) == 0
        assert "Traceback" not in (tmp_path / "log").read_text()


def waiting_for_a_lock(sql: psycopg.Connection) -> int:
    row = sql.execute("SELECT count(*) FROM pg_locks WHERE NOT granted").fetchone()
    assert row is not None
    count: int = row[0]
    return count


def accepts(program: Program) -> bool:
    try:
        return httpx2.get(f"{program.address}/livez", **LOCAL | {"timeout": 1}).status_code == 200
    except httpx2.TransportError:
        return False


def test_program_without_standard_files_serves_and_ends(tmp_path: Path, database_url: str) -> None:
    """As some supervisors start it: no descriptor 0 to 2 may become a socket."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = "127.0.0.1", free.getsockname()[1]
    closed = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh"]
    process = subprocess.Popen(
        [*closed, *command("serve", "--port", str(address[1]))],
        cwd=tmp_path,
        env=environment(DATABASE_URL=database_url, **KEYS),
    )
    try:
        wait_for(lambda: answers(address))
        files = [str(Path(f"/proc/{process.pid}/fd/{number}").readlink()) for number in range(3)]
        assert files == ["/dev/null"] * 3
    finally:
        process.terminate()
    assert process.wait(LIMIT) == 0


def answers(address: tuple[str, int]) -> bool:
    try:
        return httpx2.get("http://{}:{}/livez".format(*address), **LOCAL).status_code == 200
    except httpx2.TransportError:
        return False


def test_killed_worker_is_replaced(tmp_path: Path, database_url: str) -> None:
    with serving(tmp_path, "--workers", "2", DATABASE_URL=database_url, **KEYS) as program:
        wait_for(lambda: accepts(program))
        workers = program.workers()
        assert len(workers) == 2
        workers[0].kill()
        wait_for(lambda: len(program.workers()) == 2 and workers[0] not in program.workers())
        wait_for(lambda: accepts(program))
        assert program.stop() == 0


def test_program_outlives_a_crash_of_its_embedded_database(tmp_path: Path) -> None:
    with serving(tmp_path) as program, program.client() as client:
        kept = [client.post("/api/tasks", json={"title": "x"}).json()["id"] for _ in range(3)]
        pid_file = tmp_path / ".data" / "postgres" / "data" / "postmaster.pid"
        server = psutil.Process(int(pid_file.read_text().split()[0]))
        sessions = server.children()  # they outlive the server for a moment, and go on answering
        server.kill()
        assert not psutil.wait_procs(sessions, LIMIT)[1]
        deadline = time.monotonic() + LIMIT
        while (answer := client.get("/api/tasks")).status_code != 200:
            assert answer.status_code in {500, 503}
            assert time.monotonic() < deadline
        assert [task["id"] for task in answer.json()] == kept[::-1]
        assert client.get("/readyz").status_code == 200
        assert program.stop() == 0


def test_workers_and_database_end_when_the_program_is_killed(tmp_path: Path) -> None:
    with serving(tmp_path, "--workers", "2") as program:
        wait_for(lambda: accepts(program))
        family = program.workers()
        program.process.kill()
        program.process.wait()
        psutil.wait_procs(family, timeout=LIMIT)
        assert not any(worker.is_running() for worker in family)
        wait_for(lambda: not (tmp_path / ".data/postgres/data/postmaster.pid").exists())


def test_two_programs_share_one_data_folder(tmp_path: Path) -> None:
    other_folder = tmp_path / "other"
    other_folder.mkdir()
    data = {"DATA_DIR": str(tmp_path / "data")}
    with serving(tmp_path, **data) as first, serving(other_folder, **data) as second:
        with first.client() as one, second.client() as two:
            created = one.post("/api/tasks", json={"title": "shared"}).json()
            assert first.stop() == 0
            assert two.get("/api/tasks").json() == [created]
            assert two.post("/api/tasks", json={"title": "still"}).status_code == 201
        assert second.stop() == 0


@pytest.mark.parametrize("name", ["with space % 'quote' é", "x" * 120])
def test_data_folder_with_an_odd_or_long_path(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    folder.mkdir()
    with serving(folder) as program, program.client() as client:
        assert client.post("/api/tasks", json={"title": "x"}).status_code == 201
        assert program.stop() == 0


def test_database_url_means_no_embedded_server(tmp_path: Path, database_url: str) -> None:
    with serving(tmp_path, DATABASE_URL=database_url, **KEYS) as program:
        answer = httpx2.get(f"{program.address}/api/tasks", headers=bearer("alice"), **LOCAL)
        assert (answer.status_code, answer.json()) == (200, [])
        assert program.stop() == 0
    assert not (tmp_path / ".data").exists()


@pytest.mark.parametrize("workers", ["1", "2"])
def test_libpqs_variables_do_not_reach_the_embedded_database(tmp_path: Path, workers: str) -> None:
    services = tmp_path / "services"
    services.write_text("[other]\nhost=127.0.0.1\nport=1\n")
    variables = {
        "PGHOST": "127.0.0.1",
        "PGHOSTADDR": "127.0.0.1",
        "PGPORT": "5433",
        "PGUSER": "nobody",
        "PGDATABASE": "nothing",
        "PGPASSFILE": "/nowhere",
        "PGREQUIREAUTH": "scram-sha-256",
        "PGREQUIREPEER": "nobody",
        "PGCHANNELBINDING": "require",
        "PGSSLMODE": "verify-full",
        "PGSERVICE": "other",
        "PGSERVICEFILE": str(services),
        "PGOPTIONS": "-c default_transaction_isolation=serializable",
        "PGTARGETSESSIONATTRS": "standby",
        "PGCLIENTENCODING": "nonsense",
        "PGTZ": "nonsense",
        "PGDATESTYLE": "nonsense",
        "PGMINPROTOCOLVERSION": "nonsense",
    }
    with serving(tmp_path, "--workers", workers, **variables) as program, program.client() as call:
        created = call.post("/api/tasks", json={"title": "x"})
        assert created.status_code == 201
        assert call.get("/readyz").status_code == 200
        assert program.stop() == 0


def test_libpqs_variables_count_for_what_the_url_leaves_out(
    tmp_path: Path, database_url: str
) -> None:
    given = conninfo_to_dict(database_url)
    variables = {"PGHOST": str(given["host"]), "PGUSER": "postgres", "PGCLIENTENCODING": "LATIN1"}
    url = f"postgresql:///{given['dbname']}"
    with serving(tmp_path, DATABASE_URL=url, **variables, **KEYS) as program:
        answer = httpx2.post(
            f"{program.address}/api/tasks", json={"title": "Ä 😀"}, headers=bearer("alice"), **LOCAL
        )
        assert answer.json()["title"] == "Ä 😀"
        with psycopg.connect(database_url) as connection:
            names = connection.execute(
                "SELECT DISTINCT application_name FROM pg_stat_activity"
                " WHERE datname = current_database() AND pid <> pg_backend_pid()"
            ).fetchall()
        assert names == [("todo-api",)]


def test_neons_url_is_accepted_unchanged(tmp_path: Path) -> None:
    """The parameters of Neon's console reach libpq: here they end at a closed port."""
    url = "postgresql://u:hunter2@127.0.0.1:1/neondb?sslmode=require&channel_binding=require"
    ended = run(tmp_path, "serve", "--port", "0", DATABASE_URL=url, **KEYS)
    assert ended.returncode == 1
    assert ended.stderr == "todo-api: DATABASE_URL: Connection refused\n"


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"DATABASE_URL": "postgresql://db/x"}, "BETTER_AUTH_URL: set it, or BETTER_AUTH_SECRET"),
        ({"BETTER_AUTH_SECRET": "short"}, "BETTER_AUTH_SECRET: must be at least 32 bytes"),
        ({"HOST": "0.0.0.0"}, "HOST: must be a loopback address in development mode"),  # noqa: S104
        ({"PORT": "x"}, "PORT: "),
        ({"DATA_DIR": "/proc/nowhere"}, "DATA_DIR: "),
    ],
)
def test_what_cannot_start_says_why_in_one_line(
    tmp_path: Path, variables: dict[str, str], message: str
) -> None:
    ended = run(tmp_path, "serve", **{"PORT": "0", **variables})
    assert ended.returncode == 1
    assert ended.stderr.startswith(f"todo-api: {message}")
    assert ended.stderr.count("\n") == 1
    assert ended.stdout == ""


def test_port_in_use_is_said_before_anything_starts(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        ended = run(tmp_path, "serve", PORT=port)
    assert ended.returncode == 1
    assert ended.stderr.startswith("todo-api: HOST and PORT: cannot listen on 127.0.0.1")
    assert not (tmp_path / ".data").exists()


def test_several_programs_start_and_migrate_at_once(
    tmp_path: Path, empty_database_url: str
) -> None:
    folders = [tmp_path / str(number) for number in range(3)]
    for folder in folders:
        folder.mkdir()

    def start(folder: Path) -> int:
        with serving(folder, DATABASE_URL=empty_database_url, **KEYS) as program:
            assert accepts(program)
            return program.stop()

    with ThreadPoolExecutor() as pool:
        assert list(pool.map(start, folders)) == [0, 0, 0]


def test_token_signs_in(tmp_path: Path, database_url: str) -> None:
    made = run(
        tmp_path, "token", "alice", "--email", "a@example.com", "--expires-in", "90s", **KEYS
    )
    token = made.stdout.strip()
    with serving(tmp_path, DATABASE_URL=database_url, **KEYS) as program:
        headers = {"Authorization": f"Bearer {token}"}
        answer = httpx2.post(
            f"{program.address}/api/alice/tasks", json={"title": "x"}, headers=headers, **LOCAL
        )
        assert answer.status_code == 201
    without = run(tmp_path, "token", "alice", BETTER_AUTH_URL="https://app.example")
    assert without.stderr == "todo-api: BETTER_AUTH_SECRET: must be set to sign a token\n"
    assert run(tmp_path, "token", "alice", "--expires-in", "soon", **KEYS).returncode == 2


def test_openapi_prints_the_served_document(tmp_path: Path, database_url: str) -> None:
    printed = json.loads(run(tmp_path, "openapi").stdout)
    with serving(tmp_path, DATABASE_URL=database_url, **KEYS) as program:
        assert httpx2.get(f"{program.address}/openapi.json", **LOCAL).json() == printed
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


def test_worker_dies_while_the_database_takes_no_logins(
    tmp_path: Path, database_url: str, sql: psycopg.Connection
) -> None:
    """The other worker serves on, the new one recovers with the database."""
    sql.execute("DROP ROLE IF EXISTS flaky")
    sql.execute("CREATE ROLE flaky LOGIN IN ROLE todo_member")
    url = database_url.replace("postgres@", "flaky@")
    with serving(
        tmp_path, "--workers", "2", DATABASE_URL=url, AUTO_MIGRATE="off", **KEYS
    ) as program:
        wait_for(lambda: len(program.workers()) == 2 and accepts(program))
        sql.execute("ALTER ROLE flaky NOLOGIN")
        victim = program.workers()[0]
        victim.kill()
        wait_for(lambda: len(program.workers()) == 2 and victim not in program.workers())
        sql.execute("ALTER ROLE flaky LOGIN")
        for _ in range(20):
            answer = httpx2.get(f"{program.address}/api/tasks", headers=bearer("alice"), **LOCAL)
            assert answer.status_code in {200, 500}
        wait_for(lambda: httpx2.get(f"{program.address}/readyz", **LOCAL).status_code == 200)
        assert program.stop() == 0


def test_migration_that_is_ended_is_no_success(tmp_path: Path, database_url: str) -> None:
    with psycopg.connect(database_url) as holder:
        holder.execute("SELECT pg_advisory_lock(%s)", [ADVISORY_LOCK])
        process = subprocess.Popen(
            command("migrate"), cwd=tmp_path, env=environment(DATABASE_URL=database_url, **KEYS)
        )
        with psycopg.connect(database_url, autocommit=True) as watcher:
            wait_for(lambda: waiting_for_a_lock(watcher) == 1)
        process.terminate()
        assert process.wait(LIMIT) != 0
