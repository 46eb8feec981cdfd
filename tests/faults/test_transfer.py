"""`todo-api export` and `import`: one user's tasks, all of them or none, each made once."""

import asyncio
import io
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Barrier, Thread
from typing import Any

import psycopg
import pytest

from support.program import begun, command, environment, run, serving, stop
from support.service import SECRET, Service, bearer, settings, token
from support.waiting import wait_for, waiting_for_locks
from todo_api.auth.owner import named_by_operator
from todo_api.database.long_transaction import OwnersTransaction
from todo_api.database.statement import Statement
from todo_api.errors import StartupError
from todo_api.tasks.files import Format
from todo_api.tasks.transfer import TASKS_PER_ROUND_TRIP, Imported, Source, Transfer

ODD = "=1+1 'quoted', \"double\"\nline é 😀 \x7f"
CONTENT = ("title", "description", "status", "completed", "priority", "due_date")


def nothing(_: int) -> None:
    """The progress that nobody looks at."""


def transfer(url: str, user: str, **values: Any) -> Transfer:
    return Transfer(named_by_operator(user, time.time()), url, settings(**values))


def exported(url: str, user: str, form: Format = "jsonl", **values: Any) -> bytes:
    file = io.BytesIO()
    transfer(url, user, **values).export_tasks(file, form, nothing)
    return file.getvalue()


def imported(
    url: str,
    user: str,
    file: bytes | list[Any],
    form: Format = "jsonl",
    whose: str | None = None,
    **values: Any,
) -> Imported:
    if isinstance(file, list):
        file = "".join(json.dumps(each) + "\n" for each in file).encode()
    source = Source(io.BytesIO(file), form, whose)
    moving = transfer(url, user, **values)
    return moving.import_tasks(source, moving.check_tasks(source, nothing), nothing)


def titled(*titles: str) -> list[Any]:
    return [{"title": title} for title in titles]


async def tasks_of(service: Service, user: str) -> list[dict[str, Any]]:
    listed = await service.request("GET", "/api/tasks?order=asc", user)
    tasks: list[dict[str, Any]] = listed.json()
    return tasks


def content(tasks: list[dict[str, Any]]) -> list[Any]:
    return [[task[name] for name in CONTENT] for task in tasks]


async def fill(service: Service, user: str) -> list[dict[str, Any]]:
    """Make tasks with every kind of value."""
    await service.create(user, title=ODD, description=ODD, priority="high", completed=True)
    await service.create(user, title="'", description="", due_date="2026-12-01")
    await service.create(user, due_date="2026-12-01T18:00:00.5+02:00", priority="low")
    await service.create(user, title="same")
    await service.create(user, title="same")
    return await tasks_of(service, user)


@pytest.mark.parametrize("form", ["jsonl", "csv"])
async def test_an_export_makes_the_same_tasks_for_another_user(
    form: Format, service: Service, database_url: str
) -> None:
    tasks = await fill(service, "ann")
    file = exported(database_url, "ann", form)
    assert imported(database_url, "bob/é", file, form, "ann") == (5, 0)
    others = await tasks_of(service, "bob/é")
    assert content(others) == content(tasks)
    assert {task["user_id"] for task in others} == {"bob/é"}
    assert await tasks_of(service, "ann") == tasks


async def test_json_lines_are_what_the_api_shows(service: Service, database_url: str) -> None:
    tasks = await fill(service, "ann")
    await service.create("bob")
    lines = exported(database_url, "ann").splitlines()
    assert [json.loads(line) for line in lines] == tasks


async def test_a_repeat_makes_no_task_twice(service: Service, database_url: str) -> None:
    await fill(service, "ann")
    file, table = (exported(database_url, "ann", form) for form in ("jsonl", "csv"))
    imported(database_url, "bob", file, whose="ann")
    changed, removed, *_ = await tasks_of(service, "bob")
    path = f"/api/tasks/{changed['id']}"
    await service.request("PATCH", path, "bob", json={"title": "changed since"})
    before = await tasks_of(service, "bob")
    assert imported(database_url, "bob", file, whose="ann") == (0, 5)
    assert imported(database_url, "bob", table, "csv", "ann") == (0, 5)
    assert await tasks_of(service, "bob") == before
    await service.request("DELETE", f"/api/tasks/{removed['id']}", "bob")
    assert imported(database_url, "bob", file, whose="ann") == (1, 4)
    assert len(await tasks_of(service, "bob")) == 5


async def test_a_users_own_export_brings_back_what_they_have_deleted(
    service: Service, database_url: str
) -> None:
    tasks = await fill(service, "ann")
    file = exported(database_url, "ann", "csv")
    assert imported(database_url, "ann", file, "csv") == (0, 5)
    await service.request("DELETE", f"/api/tasks/{tasks[2]['id']}", "ann")
    assert imported(database_url, "ann", file, "csv") == (1, 4)
    assert imported(database_url, "ann", file, "csv") == (0, 5)
    assert content((await tasks_of(service, "ann"))[-1:]) == content([tasks[2]])


async def test_the_same_id_of_another_database_is_another_task(
    service: Service, database_url: str
) -> None:
    task = await service.create("ann")
    other = {**task, "created_at": "2020-01-01T00:00:00.000000Z"}
    same = {**task, "created_at": task["created_at"].replace("Z", "+00:00")}
    assert imported(database_url, "ann", [other, same]) == (1, 1)


def test_lines_without_an_id_are_known_by_all_that_they_say(database_url: str) -> None:
    lines = [*titled("a", "b", "a"), {"title": "a", "priority": "low"}, {"title": "a", "id": 3}]
    assert imported(database_url, "ann", lines) == (4, 1)
    assert imported(database_url, "ann", lines) == (0, 5)
    assert imported(database_url, "bob", lines) == (4, 1)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"title": "x" * 256}, "line 3: Title must be 255 characters or less"),
        ({"description": "no title"}, "line 3: Title is required"),
        ({"title": "a", "\x1b[2J": 1}, "line 3: Unknown field: ?[2J"),
        ({"title": "a\0"}, "line 3: Title must not contain the NUL character"),
        ({"title": "a", "id": "\0"}, "line 3: has text with NUL, or a number out of range"),
        ({"title": "a", "status": "complete", "completed": False}, "line 3: status and completed"),
        ({"title": "a", "due_date": "01.12.2026"}, "line 3: Invalid due_date"),
        ({"title": "a", "user_id": "bob"}, "line 3: is a task of another user"),
        ({"title": "a", "user_id": ["ann"]}, "line 3: is a task of another user"),
        ([], "line 3: it must be a JSON object"),
    ],
)
async def test_an_error_in_the_last_line_imports_nothing(
    line: Any, message: str, database_url: str, sql: psycopg.Connection
) -> None:
    with pytest.raises(StartupError) as caught:
        imported(database_url, "ann", [*titled("first", "second"), line])
    assert str(caught.value).startswith(f"FILE, {message}")
    assert str(caught.value).endswith("; nothing was imported")
    assert sql.execute("SELECT FROM users").rowcount == 0


async def test_only_the_named_users_tasks_are_taken(service: Service, database_url: str) -> None:
    ann, bob = await service.create("ann"), await service.create("bob")
    with pytest.raises(StartupError, match="line 2: is a task of another user"):
        imported(database_url, "eve", [ann, bob], whose="ann")
    with pytest.raises(StartupError, match="line 1: is a task of another user"):
        imported(database_url, "ann", [ann], whose="bob")
    assert imported(database_url, "eve", [ann], whose="ann") == (1, 0)


async def changes(service: Service, user: str, since: str, **more: Any) -> dict[str, Any]:
    answer = await service.client.get(
        "/api/tasks/changes", params={"since": since, **more}, headers=bearer(user)
    )
    assert answer.status_code == 200
    page: dict[str, Any] = answer.json()
    return page


async def test_followers_and_tags_see_an_import(service: Service, database_url: str) -> None:
    await service.create("ann")
    before = await service.request("GET", "/api/tasks", "ann")
    cursor = (await service.request("GET", "/api/tasks/changes", "ann")).json()["cursor"]
    waiting = asyncio.create_task(changes(service, "ann", cursor, wait=30, limit=2))
    names = [f"task {number}" for number in range(TASKS_PER_ROUND_TRIP + 5)]
    await asyncio.to_thread(imported, database_url, "ann", titled(*names))
    page = await asyncio.wait_for(waiting, 20)
    seen = page["changes"]
    while page["more"]:
        page = await changes(service, "ann", page["cursor"], limit=100)
        seen += page["changes"]
    assert [each["task"]["title"] for each in seen] == names
    versions = [each["task"]["version"] for each in seen]
    assert versions == sorted(set(versions))
    tag = {"If-None-Match": before.headers["etag"]}
    assert (await service.request("GET", "/api/tasks", "ann", tag)).status_code == 200
    again = await service.request("GET", "/api/tasks/changes", "ann", params={"limit": 1})
    assert again.status_code == 200


def test_two_imports_at_once_make_each_task_once(
    database_url: str, sql: psycopg.Connection
) -> None:
    lines = titled(*(f"task {number}" for number in range(3 * TASKS_PER_ROUND_TRIP)))
    start, results = Barrier(4), list[Imported]()

    def work() -> None:
        start.wait()
        results.append(imported(database_url, "ann", lines))

    threads = [Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(results) == [(0, len(lines))] * 3 + [(len(lines), 0)]
    assert sql.execute("SELECT count(*), count(DISTINCT version) FROM tasks").fetchone() == (
        len(lines),
        len(lines),
    )


async def test_an_import_while_the_user_writes(
    service: Service, database_url: str, sql: psycopg.Connection
) -> None:
    await service.create("ann")
    statuses: list[int] = []
    lines = titled(*(f"task {number}" for number in range(5 * TASKS_PER_ROUND_TRIP)))
    importing = asyncio.create_task(asyncio.to_thread(imported, database_url, "ann", lines))
    while not importing.done() or len(statuses) < 3:
        body = {"title": "meanwhile"}
        answer = await service.client.post("/api/tasks", json=body, headers=bearer("ann"))
        statuses.append(answer.status_code)
    assert await importing == (len(lines), 0)
    assert {*statuses} <= {201, 503}
    count = 1 + len(lines) + statuses.count(201)
    query = "SELECT count(*), count(DISTINCT version) FROM tasks"
    assert sql.execute(query).fetchone() == (count, count)
    await service.create("ann")
    ((newest, version),) = sql.execute(
        "SELECT max(tasks.version), max(users.version) FROM tasks, users"
    ).fetchall()
    assert newest == version


class Interrupted(BaseException):
    """What a signal raises in the middle."""


def test_an_interrupted_import_leaves_nothing(database_url: str, sql: psycopg.Connection) -> None:
    lines = titled(*(f"task {number}" for number in range(3 * TASKS_PER_ROUND_TRIP)))
    done: list[int] = []

    def interrupt(count: int) -> None:
        done.append(count)
        if len(done) == 2:
            raise Interrupted

    source = Source(
        io.BytesIO("".join(json.dumps(each) + "\n" for each in lines).encode()), "jsonl"
    )
    moving = transfer(database_url, "ann")
    with pytest.raises(Interrupted):
        moving.import_tasks(source, len(lines), interrupt)
    assert sql.execute("SELECT FROM users").rowcount == 0
    assert moving.import_tasks(source, len(lines), nothing) == (len(lines), 0)


@pytest.mark.parametrize("count", [1, 3])
def test_a_file_that_changed_meanwhile_is_refused(
    count: int, database_url: str, sql: psycopg.Connection
) -> None:
    source = Source(io.BytesIO(b'{"title": "a"}\n{"title": "b"}\n'), "jsonl")
    with pytest.raises(StartupError, match="FILE: changed while it was read; nothing was imp"):
        transfer(database_url, "ann").import_tasks(source, count, nothing)
    assert sql.execute("SELECT FROM users").rowcount == 0


async def test_an_export_is_of_one_moment(service: Service, database_url: str) -> None:
    imported(database_url, "ann", titled(*(f"task {number}" for number in range(500))))

    def erase_meanwhile(_: int) -> None:
        with psycopg.connect(database_url) as connection:
            connection.execute("DELETE FROM tasks")

    file = io.BytesIO()
    assert transfer(database_url, "ann").export_tasks(file, "jsonl", erase_meanwhile) == 500
    assert len(file.getvalue().splitlines()) == 500
    assert await tasks_of(service, "ann") == []


@pytest.mark.parametrize("read_only", [True, False])
async def test_row_security_binds_both_commands(
    read_only: bool, service: Service, database_url: str
) -> None:
    await service.create("ann")
    await service.create("bob")
    every = Statement(b"every", b"SELECT to_json(user_id) FROM tasks", (), writes=False)
    begun = OwnersTransaction.begin(
        database_url, settings(), "ann", "nothing was read", read_only=read_only
    )
    with begun as transaction:
        assert list(transaction.stream(every, {})) == [b'"ann"']


async def test_both_work_without_row_security_and_prepared_statements(
    service: Service, database_url: str
) -> None:
    tasks = await fill(service, "ann")
    await service.create("bob")
    off: dict[str, Any] = {"row_security": False, "prepared_statements": False}
    file = exported(database_url, "ann", **off)
    assert [json.loads(line) for line in file.splitlines()] == tasks
    assert imported(database_url, "eve", file, whose="ann", **off) == (5, 0)
    assert len(await tasks_of(service, "eve")) == 5


async def test_an_erased_user_is_not_brought_back_at_once(
    service: Service, database_url: str, sql: psycopg.Connection
) -> None:
    file = exported(database_url, "ann")
    await service.create("ann")
    await service.request("DELETE", "/api/account", "ann")
    sql.execute("UPDATE erasures SET tokens_from = now() + interval '1 minute'")
    with pytest.raises(StartupError, match=r"^USER: nothing was imported: the account was erased"):
        imported(database_url, "ann", titled("back"))
    assert sql.execute("SELECT FROM users").rowcount == 0
    sql.execute("UPDATE erasures SET tokens_from = now() - interval '1 second'")
    assert imported(database_url, "ann", titled("back")) == (1, 0)
    assert file == b""


def test_a_database_without_the_schema_says_what_to_run(empty_database_url: str) -> None:
    with pytest.raises(StartupError, match=r"nothing was exported: .* run `todo-api migrate`"):
        exported(empty_database_url, "ann")


def test_a_name_that_no_token_has_is_refused() -> None:
    for user in ("", " ", "a\nb", "x" * 256, os.fsdecode(b"a\xff")):
        with pytest.raises(ValueError, match=r"not a subject|surrogates"):
            named_by_operator(user, 0.0)


# The program.


@pytest.fixture
def folder(short_folder: Path) -> Path:
    return short_folder


def at(url: str) -> dict[str, str]:
    """Return the settings for a database that is not the embedded one."""
    return {"DATABASE_URL": url, "BETTER_AUTH_SECRET": SECRET}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("name", ["tasks.csv", "tasks.jsonl"])
def test_both_commands_beside_a_running_service(name: str, folder: Path) -> None:
    user, other = "org/ann b?&é", "-bob"
    with serving(folder, BETTER_AUTH_SECRET=SECRET) as program:
        with program.client(token(user)) as client:
            for title in ("first secret", ODD):
                assert client.post("/api/tasks", json={"title": title}).status_code == 201
        saved = run(folder, "export", user, name)
        assert (saved.returncode, saved.stdout) == (0, "")
        assert saved.stderr == "Exported 2 tasks.\n"
        assert (folder / name).stat().st_mode & 0o777 == 0o600
        read = run(folder, "import", "--from", user, "--", other, name)
        assert (read.returncode, read.stderr) == (0, "")
        assert read.stdout == "Imported 2 tasks, 0 were there already.\n"
        read = run(folder, "import", "--from", user, "--", other, name)
        assert read.stdout == "Imported 0 tasks, 2 were there already.\n"
        with program.client(token(other)) as client:
            titles = [task["title"] for task in client.get("/api/tasks").json()]
            assert titles == [ODD, "first secret"]
    logs = (folder / "log").read_text() + (folder / ".data" / "postgres" / "log").read_text()
    for secret in ("first secret", user, other):
        assert secret not in logs


def test_a_pipe_between_two_users(folder: Path, database_url: str) -> None:
    lines = "".join(json.dumps(each) + "\n" for each in titled("a", "b"))
    read = run(folder, "import", "ann", "-", given=lines, **at(database_url))
    assert read.stdout == "Imported 2 tasks, 0 were there already.\n"
    saved = run(folder, "export", "ann", "--format", "csv", **at(database_url))
    options = ("--format=csv", "--from=ann")
    read = run(folder, "import", "bob", "-", *options, given=saved.stdout, **at(database_url))
    assert read.stdout == "Imported 2 tasks, 0 were there already.\n"
    assert not names(folder)


def test_a_full_device_and_a_closed_pipe_are_one_line_or_none(
    folder: Path, database_url: str
) -> None:
    imported(
        database_url, "ann", [{"title": "a", "description": "x" * 5000, "id": n} for n in range(99)]
    )
    script = 'set -o pipefail; "$@" > /dev/full; echo $? >&2; "$@" | head -c 9; echo $? >&2'
    done = subprocess.run(
        ["bash", "-c", script, "-", *command("export", "ann")],
        cwd=folder,
        env=environment(**at(database_url)),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stderr == (
        "todo-api: standard output: cannot be written (No space left on device)\n1\n1\n"
    )
    refused = run(folder, "export", "ann", "/dev/full", **at(database_url))
    assert refused.stderr == "todo-api: /dev/full: exists already; choose another name\n"


@contextmanager
def locked(url: str) -> Iterator[Callable[[], bool]]:
    """Hold ann's row. Yields whether somebody waits for it."""
    with psycopg.connect(url) as holder, psycopg.connect(url, autocommit=True) as watch:
        holder.execute("INSERT INTO users (id, version) VALUES ('ann', 1)")
        yield lambda: waiting_for_locks(watch) > 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_import_leaves_nothing(
    number: signal.Signals,
    code: int,
    folder: Path,
    database_url: str,
    sql: psycopg.Connection,
) -> None:
    (folder / "tasks.jsonl").write_text('{"title": "a"}\n')
    with (
        locked(database_url) as is_waiting,
        begun(folder, "import", "ann", "tasks.jsonl", **at(database_url)) as process,
    ):
        wait_for(is_waiting)
        assert stop(process, number) == (code, "", "")
    assert sql.execute("SELECT FROM tasks").rowcount == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["import", "ann", "missing"], "missing: cannot be read (No such file or directory)"),
        (["import", "ann", "."], ".: cannot be read (Is a directory)"),
        (["export", "ann", "missing/x"], "missing/x: cannot be written (No such file or direct"),
    ],
)
def test_a_file_that_cannot_be_used_says_why(
    arguments: list[str], message: str, folder: Path, database_url: str
) -> None:
    refused = run(folder, *arguments, **at(database_url))
    assert refused.returncode == 1
    assert refused.stderr.startswith(f"todo-api: {message}")
    assert refused.stderr.count("\n") == 1


def test_a_name_that_cannot_be_a_user_is_wrong_usage(folder: Path) -> None:
    refused = run(folder, "export", "a\nb")
    assert refused.returncode == 2
    assert "the user's id must be 1 to 255 characters" in refused.stderr
    assert not names(folder)
