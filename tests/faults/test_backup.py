"""`todo-api backup` and `restore`: complete and of one moment, or nothing at all."""

import gzip
import hashlib
import io
import json
import signal
import stat
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlmodel import SQLModel

from support.program import begun, command, environment, run, serving, stop
from support.service import SECRET, token
from support.waiting import LIMIT, wait_for
from todo_api.database import migrations, schema
from todo_api.database.backup import FORMAT_VERSION, MAXIMUM_LINE, TABLES, back_up, restore
from todo_api.errors import StartupError
from todo_api.tasks import model

ODD = "tab\tnew\nline back\\slash \\. é 😀 \x7f"


DAMAGED = r"^FILE: is cut off, or was altered"
NO_BACKUP = r"^FILE: is not a backup of todo-api"


def nothing(_: int) -> None:
    """The progress that nobody looks at."""


def at(url: str) -> dict[str, str]:
    """Return the settings for a database that is not the embedded one."""
    return {"DATABASE_URL": url, "BETTER_AUTH_SECRET": SECRET}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def fill(url: str, users: int = 3) -> None:
    """Put rows into every table of a backup, with every column of the first schema set."""
    with psycopg.connect(url) as connection:
        for number in range(users):
            connection.execute(
                "INSERT INTO users (id, email, version, changes_from, tokens_from)"
                " VALUES (%s, %s, %s, 3, now())",
                [f"user {number}\n{ODD}", None if number else "a@example.com", number + 5],
            )
        connection.execute(
            "INSERT INTO tasks (user_id, title, title_key, description, description_key, status,"
            " priority, due_date, due_is_day, completed_at, version)"
            " SELECT id, %s, 'key', %s, '', 'complete', 'high', '2026-12-01 00:00Z', true, now(), 7"
            " FROM users",
            [ODD, ODD],
        )
        connection.execute(
            "INSERT INTO tasks (user_id, title, version) SELECT id, '-', 8 FROM users"
        )
        connection.execute("DELETE FROM tasks WHERE id = (SELECT max(id) FROM tasks)")
        connection.execute("INSERT INTO tombstones SELECT id, 9, 77 FROM users")
        connection.execute(
            "INSERT INTO answers SELECT id, 'key', 0, '\\x00ff', %s FROM users", [ODD]
        )
        connection.execute("INSERT INTO erasures VALUES ('\\x0102', 11, now())")
        connection.execute("INSERT INTO restorations VALUES (12)")


def content(url: str) -> dict[str, list[Any]]:
    with psycopg.connect(url) as connection:
        return {
            table: connection.execute(f"SELECT * FROM {table} ORDER BY 1, 2").fetchall()  # noqa: S608  names of this module
            for table in TABLES
        }


def is_empty(url: str) -> bool:
    return not any(content(url).values())


def made_from(url: str) -> bytes:
    file = io.BytesIO()
    back_up(url, file, nothing)
    return file.getvalue()


@pytest.fixture
def copy_url(empty_database_url: str) -> str:
    """The address of an empty database with the schema, beside `database_url`."""
    migrations.migrate(empty_database_url)
    return empty_database_url


def without_versions(found: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Leave out what a restore lifts."""
    users = [(row[0], row[1], *row[4:]) for row in found["users"]]
    erasures = [(row[0], row[2]) for row in found["erasures"]]
    return {**found, "users": users, "erasures": erasures, "restorations": []}


def test_every_row_and_column_comes_back(database_url: str, copy_url: str) -> None:
    fill(database_url)
    with psycopg.connect(database_url) as connection:
        connection.execute("UPDATE tasks SET description_filter = '\\x00ff', source = int8send(id)")
    before = content(database_url)
    restored = restore(copy_url, io.BytesIO(made_from(database_url)), nothing)
    assert without_versions(content(copy_url)) == without_versions(before)
    assert restored == sum(map(len, before.values()))
    assert content(database_url) == before


def test_backup_has_every_table_but_the_rate_limits() -> None:
    assert model.Task.__tablename__
    assert {*TABLES, "rate_limits"} == set(SQLModel.metadata.tables)


def test_backup_does_not_depend_on_the_logins_settings(database_url: str, copy_url: str) -> None:
    fill(database_url)
    before = content(database_url)
    with psycopg.connect(database_url, autocommit=True) as connection:
        name = connection.info.dbname
        for setting in (
            "DateStyle TO 'German'",
            "TimeZone TO 'Asia/Kolkata'",
            "bytea_output TO 'escape'",
        ):
            connection.execute(f"ALTER DATABASE {name} SET {setting}")
    file = io.BytesIO(made_from(database_url))
    restore(copy_url, file, nothing)
    assert without_versions(content(copy_url)) == without_versions(before)


def test_backup_is_of_one_moment(database_url: str, copy_url: str) -> None:
    fill(database_url, users=700)
    before = content(database_url)
    file = io.BytesIO()
    writes = iter(range(1))

    def write_meanwhile(_: int) -> None:
        for _ in writes:
            with psycopg.connect(database_url) as connection:
                connection.execute("INSERT INTO users (id, version) VALUES ('late', 1)")
                connection.execute("UPDATE tasks SET title = 'late'")
                connection.execute("DELETE FROM answers")

    back_up(database_url, file, write_meanwhile)
    assert not content(database_url)["answers"]
    file.seek(0)
    restore(copy_url, file, nothing)
    assert without_versions(content(copy_url)) == without_versions(before)


def test_a_new_task_gets_an_id_that_was_never_used(database_url: str, copy_url: str) -> None:
    fill(database_url)
    with psycopg.connect(database_url) as connection:
        connection.execute("DELETE FROM tasks WHERE id > 1")
    last = "SELECT last_value FROM tasks_id_seq"
    restore(copy_url, io.BytesIO(made_from(database_url)), nothing)
    with psycopg.connect(copy_url) as connection, psycopg.connect(database_url) as original:
        given = original.execute(last).fetchone()
        assert given is not None
        query = "INSERT INTO tasks (user_id, title, version) SELECT min(id), 'new', 1 FROM users"
        assert connection.execute(f"{query} RETURNING id").fetchone() == (given[0] + 1,)


def test_an_empty_database_is_restored_too(database_url: str, copy_url: str) -> None:
    assert restore(copy_url, io.BytesIO(made_from(database_url)), nothing) == 0
    with psycopg.connect(copy_url) as connection:
        connection.execute("INSERT INTO users (id, version) VALUES ('first', 1)")
        query = (
            "INSERT INTO tasks (user_id, title, version) VALUES ('first', 'new', 1) RETURNING id"
        )
        assert connection.execute(query).fetchone() == (1,)


def test_a_file_cut_anywhere_is_refused(database_url: str, copy_url: str) -> None:
    fill(database_url)
    whole = made_from(database_url)
    for length in [*range(0, len(whole) - 20, 97), *range(len(whole) - 20, len(whole), 3)]:
        with pytest.raises(StartupError, match=r"^FILE: is (cut off|not a backup)"):
            restore(copy_url, io.BytesIO(whole[:length]), nothing)
        assert is_empty(copy_url)


def test_a_flipped_bit_is_refused_or_changes_nothing(database_url: str, copy_url: str) -> None:
    """Some bits of gzip's header mean nothing."""
    fill(database_url)
    whole = made_from(database_url)
    refused = 0
    for place in [*range(10), *range(10, len(whole), 41)]:
        altered = bytearray(whole)
        altered[place] ^= 1 << place % 8
        try:
            restore(copy_url, io.BytesIO(altered), nothing)
        except StartupError:
            assert is_empty(copy_url)
            refused += 1
            continue
        assert place < 10
        assert without_versions(content(copy_url)) == without_versions(content(database_url))
        with psycopg.connect(copy_url) as connection:
            connection.execute(f"TRUNCATE {', '.join(TABLES)}")
    assert refused > 20


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"restorations"', b'"alembic_version"'),
        (b'"table": "erasures"', b'"table": "restorations"'),
        (b'"email"', b'"mail"'),
        (b'{"table": "users"', b'["table", "users"'),
        (b'"rows": ', b'"rows": 1'),
        (b'"last_task_id"', b'"last"'),
        *(
            (b'"last_task_id": ', b'"last_task_id": %b, "id": ' % it)
            for it in (b"null", b"[]", b"true")
        ),
        *(
            (b'"last_task_id": ', b'"last_task_id": %b, "id": ' % it)
            for it in (b"Infinity", b"9" * 30)
        ),
        (b'"last_task_id"', b'"deep": ' + b"[" * 100_000 + b"]" * 100_000 + b', "last_task_id"'),
        (b'"revision": "', b'"revision": "\\u001b[31m'),
        (b'"revision": "', b'"revision": ["x"], "was": "'),
        (b"\n\\.\n", b"\n"),
        (b"\ta@example.com\t", b"\ta@example.com\tmore\t"),
        (b"\ta@example.com\t", b"\t" + b"x" * MAXIMUM_LINE + b"\t"),
        (b"\tcomplete\t", b"\tdone\t"),
        (b"\t77\t", b"\tseventy-seven\t"),
    ],
    ids=lambda value: value[:20].decode(),
)
def test_an_altered_file_with_a_right_checksum_is_refused(
    old: bytes, new: bytes, database_url: str, copy_url: str
) -> None:
    fill(database_url)
    lines = gzip.decompress(made_from(database_url))
    altered = lines[: lines.rindex(b'{"sha256"')].replace(old, new, 1)
    assert altered != lines
    checksum = hashlib.sha256(altered).hexdigest()
    file = gzip.compress(altered + b'{"sha256": "' + checksum.encode() + b'"}\n')
    with pytest.raises(StartupError, match=DAMAGED):
        restore(copy_url, io.BytesIO(file), nothing)
    assert is_empty(copy_url)


def test_an_altered_task_is_refused(database_url: str, copy_url: str) -> None:
    fill(database_url)
    lines = gzip.decompress(made_from(database_url))
    altered = gzip.compress(lines.replace(b"a@example.com", b"b@example.com"))
    with pytest.raises(StartupError, match=DAMAGED):
        restore(copy_url, io.BytesIO(altered), nothing)
    assert is_empty(copy_url)


@pytest.mark.parametrize("more", [b"more", gzip.compress(b"more", mtime=0), b"\0\0more"])
def test_a_file_with_something_after_its_end_is_refused(
    more: bytes, database_url: str, copy_url: str
) -> None:
    fill(database_url)
    with pytest.raises(StartupError, match=DAMAGED):
        restore(copy_url, io.BytesIO(made_from(database_url) + more), nothing)
    assert is_empty(copy_url)


@pytest.mark.parametrize(
    "file",
    [
        *(b"", b"{}", gzip.compress(b"{}\n", mtime=0), gzip.compress(b"[1]\n", mtime=0)),
        b"PGDMP\1\x10",
        gzip.compress(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}\n", mtime=0),
        gzip.compress(b'{"format": "todo-api backup", "format_version": "\\u001b"}\n', mtime=0),
    ],
)
def test_another_file_is_no_backup(file: bytes, copy_url: str) -> None:
    with pytest.raises(StartupError, match=NO_BACKUP):
        restore(copy_url, io.BytesIO(file), nothing)


def test_another_version_of_the_format_is_refused(copy_url: str) -> None:
    head = json.dumps({"format": "todo-api backup", "format_version": FORMAT_VERSION + 1})
    file = gzip.compress(head.encode() + b"\n")
    with pytest.raises(StartupError, match=f"^FILE: has version {FORMAT_VERSION + 1} of"):
        restore(copy_url, io.BytesIO(file), nothing)


@pytest.mark.parametrize("table", TABLES)
def test_a_database_with_a_row_is_refused(table: str, database_url: str, copy_url: str) -> None:
    file = made_from(database_url)
    fill(copy_url)
    with psycopg.connect(copy_url) as connection:
        before = TABLES[: TABLES.index(table)]
        connection.execute("ALTER TABLE tasks DROP CONSTRAINT tasks_user")
        for each in before:
            connection.execute(f"DELETE FROM {each}")  # noqa: S608  names of this module
    found = content(copy_url)
    with pytest.raises(StartupError, match=f"^DATABASE_URL: the table {table} has rows"):
        restore(copy_url, io.BytesIO(file), nothing)
    assert content(copy_url) == found


def test_another_revision_is_refused(database_url: str, copy_url: str) -> None:
    file = made_from(database_url)
    with psycopg.connect(copy_url) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(StartupError, match=f"at revision 9999, and FILE at {schema.newest()}"):
        restore(copy_url, io.BytesIO(file), nothing)


def test_tables_in_use_are_refused_in_time(database_url: str, copy_url: str) -> None:
    file = made_from(database_url)
    with psycopg.connect(copy_url) as connection:
        connection.execute("INSERT INTO users (id, version) VALUES ('writer', 1)")
        with pytest.raises(StartupError, match="nothing was restored: a table was in use"):
            restore(copy_url, io.BytesIO(file), nothing)


def test_without_a_schema_there_is_nothing_to_back_up(empty_database_url: str) -> None:
    with pytest.raises(StartupError, match="nothing was backed up: the database does not have"):
        made_from(empty_database_url)


def test_a_login_that_row_security_binds_is_refused(database_url: str) -> None:
    """It would see no row, and back up nothing."""
    fill(database_url)
    with psycopg.connect(database_url) as connection:
        connection.execute("CREATE ROLE reader LOGIN")
        connection.execute(f"GRANT SELECT ON {', '.join(TABLES)}, alembic_version TO reader")
        connection.execute("GRANT SELECT ON SEQUENCE tasks_id_seq TO reader")
    try:
        with pytest.raises(StartupError, match="nothing was backed up: its login may not do that"):
            made_from(database_url.replace("postgres@", "reader@"))
    finally:
        with psycopg.connect(database_url) as connection:
            connection.execute("DROP OWNED BY reader")
            connection.execute("DROP ROLE reader")


def test_a_server_that_is_not_there_says_why(unused_port: int) -> None:
    with pytest.raises(StartupError, match="nothing was backed up: Connection refused"):
        made_from(f"postgresql://127.0.0.1:{unused_port}/x")


# The program.


@pytest.fixture
def folder(short_folder: Path) -> Path:
    return short_folder


def test_backup_of_a_running_service_is_restored_without_one(folder: Path) -> None:
    there = folder / "there"
    there.mkdir()
    keys = {"BETTER_AUTH_SECRET": SECRET}
    with serving(folder, **keys) as program, program.client(token("ann")) as client:
        for title in ("first", ODD, "third"):
            assert client.post("/api/tasks", json={"title": title}).status_code == 201
        tasks = client.get("/api/tasks").json()
        assert client.delete(f"/api/tasks/{tasks[0]['id']}").status_code == 204
        cursor = client.get("/api/tasks/changes").json()["cursor"]
        tasks = client.get("/api/tasks").json()
        saved = run(folder, "backup", "tasks.backup")
        assert (saved.returncode, saved.stderr) == (0, "")
        assert saved.stdout == "Backed up 4 rows.\n"
        assert client.post("/api/tasks", json={"title": "too late"}).status_code == 201
    file = folder / "tasks.backup"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert names(folder) == {".data", "log", "tasks.backup", "there"}
    restored = run(there, "restore", str(file))
    assert (restored.returncode, restored.stderr) == (0, "")
    assert restored.stdout == "Restored 4 rows.\n"
    with serving(there, **keys) as program, program.client(token("ann")) as client:
        assert client.get("/api/tasks").json() == tasks
        old = client.get("/api/tasks/changes", params={"since": cursor})
        assert (old.status_code, old.json()["code"]) == (410, "cursor_expired")
        new = client.post("/api/tasks", json={"title": "new"}).json()
        assert new["id"] == 4
        assert new["version"] > max(task["version"] for task in tasks)
        again = run(there, "restore", str(file))
        assert again.returncode == 1
        assert "the table users has rows" in again.stderr
        assert len(client.get("/api/tasks").json()) == 3


def test_a_backup_of_an_older_schema_is_restored_and_migrated(
    folder: Path, empty_database_url: str
) -> None:
    migrations.migrate(empty_database_url, "0001")
    fill(empty_database_url)
    saved = run(folder, "backup", "old.backup", **at(empty_database_url))
    assert saved.returncode == 0
    with serving(folder, BETTER_AUTH_SECRET=SECRET) as program:
        refused = run(folder, "restore", "old.backup")
        assert refused.returncode == 1
        assert f"is at revision {schema.newest()}, and FILE at 0001" in refused.stderr
        program.stop()
    new = {"DATA_DIR": str(folder / "new"), "BETTER_AUTH_SECRET": SECRET}
    assert run(folder, "restore", "old.backup", **new).stdout == saved.stdout.replace(
        "Backed up", "Restored"
    )
    with serving(folder, **new) as program, program.client(token("ann")) as client:
        assert client.post("/api/tasks", json={"title": "new"}).status_code == 201


def test_backup_of_a_service_that_does_not_run(folder: Path) -> None:
    with serving(folder) as program, program.client() as client:
        assert client.post("/api/tasks", json={"title": "kept"}).status_code == 201
        program.stop()
    saved = run(folder, "backup", "tasks.backup")
    assert (saved.returncode, saved.stdout) == (0, "Backed up 2 rows.\n")


@pytest.mark.parametrize("kind", ["file", "folder", "link to nothing"])
def test_an_existing_file_is_not_replaced(kind: str, folder: Path, database_url: str) -> None:
    file = folder / "tasks.backup"
    if kind == "file":
        file.write_text("precious")
    elif kind == "folder":
        file.mkdir()
    else:
        file.symlink_to("elsewhere")
    refused = run(folder, "backup", "tasks.backup", **at(database_url))
    assert refused.returncode == 1
    assert refused.stderr == "todo-api: tasks.backup: exists already; choose another name\n"
    assert names(folder) == {"tasks.backup"}
    assert kind != "file" or file.read_text() == "precious"


def test_a_file_that_appears_meanwhile_is_not_replaced(folder: Path, database_url: str) -> None:
    with blocked(folder, database_url, "backup", "tasks.backup") as (process, lock):
        (folder / "tasks.backup").write_text("precious")
        lock.rollback()
        assert process.wait(LIMIT) == 1
        assert process.stderr is not None
        assert "exists already" in process.stderr.read()
    assert (folder / "tasks.backup").read_text() == "precious"
    assert names(folder) == {"tasks.backup"}


@pytest.mark.parametrize("path", ["missing/tasks.backup", "/dev/full", "/proc/tasks.backup"])
def test_a_file_that_cannot_be_made_says_why(path: str, folder: Path, database_url: str) -> None:
    refused = run(folder, "backup", path, **at(database_url))
    assert refused.returncode == 1
    assert refused.stderr.startswith(f"todo-api: {path}: ")
    assert refused.stderr.count("\n") == 1


def test_a_full_disk_leaves_no_file(folder: Path, database_url: str) -> None:
    fill(database_url, users=2000)
    limited = ["bash", "-c", 'ulimit -f 8; exec "$@"', "-", *command("backup", "tasks.backup")]
    refused = subprocess.run(
        limited,
        cwd=folder,
        # The limit would also cut off Python's compiled modules, which later programs load.
        env=environment(PYTHONDONTWRITEBYTECODE="1", **at(database_url)),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert refused.returncode == 1
    assert refused.stderr == "todo-api: tasks.backup: cannot be written (File too large)\n"
    assert not names(folder)


@contextmanager
def blocked(
    folder: Path, url: str, *arguments: str
) -> Iterator[tuple[subprocess.Popen[str], psycopg.Connection]]:
    """Run a command until it waits for the table of tasks, which this locks."""
    fill(url)
    with psycopg.connect(url) as lock:
        lock.execute("LOCK TABLE tasks")
        with (
            begun(folder, *arguments, **at(url)) as process,
            psycopg.connect(url, autocommit=True) as watch,
        ):
            waits = "SELECT FROM pg_locks WHERE NOT granted AND relation = 'tasks'::regclass"
            wait_for(lambda: watch.execute(waits).rowcount)
            yield process, lock


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_backup_leaves_no_file(
    number: signal.Signals, code: int, folder: Path, database_url: str
) -> None:
    with blocked(folder, database_url, "backup", "tasks.backup") as (process, _):
        assert names(folder)
        assert stop(process, number) == (code, "", "")
    assert not names(folder)


def test_a_missing_file_is_not_restored(folder: Path, database_url: str) -> None:
    refused = run(folder, "restore", "missing", **at(database_url))
    assert refused.returncode == 1
    assert refused.stderr == "todo-api: missing: cannot be read (No such file or directory)\n"
