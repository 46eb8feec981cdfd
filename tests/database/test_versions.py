"""The version of a user, which only grows, orders their writes, and stops a void token."""

import asyncio
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest

from support.program import command, environment
from support.service import SECRET, Service, bearer, running_service, settings
from support.waiting import until, waiting_for_locks
from todo_api.database.database import Database
from todo_api.errors import StartupError
from todo_api.tasks import owned_tasks, statements
from todo_api.tasks.fields import WRITABLE

DAY = 86_400_000
NOW = 1_900_000_000_000
"""A moment in milliseconds, far in the future."""


class Clock:
    """The program's clock, in milliseconds."""

    def __init__(self) -> None:
        self.milliseconds = NOW + 1  # a write at this moment removes no tombstones

    def __call__(self) -> float:
        return self.milliseconds / 1000


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(owned_tasks, "time", clock)
    return clock


@contextmanager
def held(url: str, lock: str) -> Iterator[psycopg.Connection]:
    """Hold a lock in a transaction until the end of the block."""
    with psycopg.connect(url) as holder:
        holder.execute(lock)
        yield holder


def version_of(sql: psycopg.Connection, user: str) -> int:
    ((version,),) = sql.execute("SELECT version FROM users WHERE id = %s", [user])
    return int(version)


async def write_everything(service: Service, user: str) -> list[int]:
    """Do each kind of write that returns a task, and return the versions."""
    task = await service.create(user)
    path = f"/api/tasks/{task['id']}"
    answers = [
        await service.request("PUT", path, user, json={"title": "changed"}),
        await service.request("PATCH", f"{path}/complete", user),
        await service.request("PATCH", f"{path}/complete", user, json={"completed": False}),
    ]
    return [task["version"], *(answer.json()["version"] for answer in answers)]


async def test_each_write_gets_a_higher_version_even_if_the_clock_is_set_back(
    service: Service, sql: psycopg.Connection, clock: Clock
) -> None:
    first = (await write_everything(service, "alice"))[0]
    assert first in {NOW + 1, NOW + 2}  # creating the user may use up a number
    clock.milliseconds -= DAY + 1
    assert await write_everything(service, "alice") == [*range(first + 4, first + 8)]
    clock.milliseconds += 2 * DAY
    assert (await write_everything(service, "alice"))[0] == clock.milliseconds
    assert version_of(sql, "alice") == clock.milliseconds + 3


async def test_list_and_task_show_the_same_version(service: Service) -> None:
    task = await service.create("alice")
    (listed,) = (await service.request("GET", "/api/tasks", "alice")).json()
    one = (await service.request("GET", f"/api/tasks/{task['id']}", "alice")).json()
    assert listed == one == task


async def test_write_that_changes_nothing_keeps_the_version(service: Service) -> None:
    task = await service.create("alice", description="d")
    path = f"/api/tasks/{task['id']}"
    same = await service.request("PUT", path, "alice", json={"description": "d"})
    undone = await service.request("PATCH", f"{path}/complete", "alice", json={"completed": False})
    assert same.json() == undone.json() == task


async def test_writes_of_two_users_do_not_wait_for_each_other(
    service: Service, database_url: str
) -> None:
    await service.create("alice")
    with held(database_url, "SELECT FROM users WHERE id = 'alice' FOR UPDATE"):
        assert (await service.create("bob"))["version"] > 0


async def test_racing_first_writes_make_one_user_and_distinct_versions(
    service: Service, sql: psycopg.Connection
) -> None:
    answers = await asyncio.gather(
        *(
            service.client.post("/api/tasks", headers=bearer("alice"), json={"title": "x"})
            for _ in range(50)
        )
    )
    versions = sorted(answer.json()["version"] for answer in answers)
    assert len(set(versions)) == 50
    stored = [version for (version,) in sql.execute("SELECT version FROM tasks ORDER BY 1")]
    assert stored == versions
    assert version_of(sql, "alice") == versions[-1]


async def test_two_processes_with_different_clocks_share_one_order(
    database_url: str, short_folder: Path, tmp_path: Path, clock: Clock
) -> None:
    async with (
        running_service(database_url, short_folder) as ahead,
        running_service(database_url, tmp_path) as behind,
    ):
        task = await ahead.create("alice")
        versions = [task["version"]]
        for number in range(10):
            service, skew = ((ahead, DAY), (behind, 0))[number % 2]
            clock.milliseconds = NOW + 1 + skew
            changed = await service.request(
                "PUT", f"/api/tasks/{task['id']}", "alice", json={"title": f"{number}"}
            )
            versions.append(changed.json()["version"])
    assert versions == sorted(set(versions))


async def test_deletion_leaves_one_tombstone_with_the_version_of_the_write(
    service: Service, sql: psycopg.Connection
) -> None:
    task = await service.create("alice")
    for status in (204, 404):
        gone = await service.request("DELETE", f"/api/tasks/{task['id']}", "alice")
        assert gone.status_code == status
    tombstones = sql.execute(
        "SELECT user_id, task_id, version, deleted_at <= now() FROM tombstones"
    ).fetchall()
    ((user_id, task_id, version, is_past),) = tombstones
    assert (user_id, task_id, is_past) == ("alice", task["id"], True)
    assert task["version"] < version <= version_of(sql, "alice")


async def test_expired_tombstones_go_in_bounded_steps_with_later_writes(
    service: Service, sql: psycopg.Connection, clock: Clock
) -> None:
    await service.create("alice")
    await service.create("bob")
    at_once = statements.EXPIRED_AT_ONCE
    sql.execute(
        "INSERT INTO tombstones (user_id, version, task_id)"
        " SELECT who, %s + n, n FROM unnest(ARRAY['alice', 'bob']) AS who,"
        " generate_series(1, %s) AS n",
        [NOW, 2 * at_once + 1],
    )

    def left(user: str) -> list[int]:
        query = "SELECT task_id FROM tombstones WHERE user_id = %s ORDER BY 1"
        return [task_id for (task_id,) in sql.execute(query, [user])]

    every = list(range(1, 2 * at_once + 2))
    in_time = NOW + 30 * DAY
    cleaning = in_time + 16 - in_time % 16
    clock.milliseconds = cleaning + 8  # a write that does not clean
    await service.create("alice")
    assert left("alice") == every
    clock.milliseconds = cleaning - 16  # nothing has expired yet
    await service.create("alice")
    assert left("alice") == every
    clock.milliseconds = cleaning + 16 * at_once * 3
    for remaining in (every[at_once:], every[2 * at_once :], []):
        await service.create("alice")
        assert left("alice") == remaining
    assert left("bob") == every


VOID: list[tuple[str, str, dict[str, Any] | None]] = [
    ("POST", "/api/tasks", {"title": "x"}),
    ("PUT", "/api/tasks/{id}", {"title": "x"}),
    ("PATCH", "/api/tasks/{id}/complete", None),
    ("DELETE", "/api/tasks/{id}", None),
]


@pytest.mark.parametrize(("verb", "path", "body"), VOID)
async def test_void_token_writes_nothing_to_a_recreated_account(
    service: Service,
    sql: psycopg.Connection,
    verb: str,
    path: str,
    body: dict[str, Any] | None,
) -> None:
    """The increment of the version matches no row, so the write joined to it matches none."""
    await service.request("DELETE", "/api/account", "alice")
    sql.execute("UPDATE erasures SET tokens_from = now() - interval '50 seconds'")
    task = await service.create("alice")
    old = bearer("alice", iat=int(time.time()) - 55)
    before = sql.execute("SELECT * FROM tasks").fetchall(), version_of(sql, "alice")
    refused = await service.client.request(verb, path.format(id=task["id"]), headers=old, json=body)
    assert refused.status_code == 401
    assert (sql.execute("SELECT * FROM tasks").fetchall(), version_of(sql, "alice")) == before
    assert sql.execute("SELECT * FROM tombstones").fetchall() == []


async def test_deletion_that_waited_for_another_finds_nothing(
    service: Service, sql: psycopg.Connection, database_url: str
) -> None:
    """A look from inside the statement would still find the task in its snapshot."""
    task = await service.create("alice")
    with held(database_url, "SELECT FROM users WHERE id = 'alice' FOR UPDATE") as holder:
        deletions = [
            asyncio.create_task(
                service.client.delete(f"/api/tasks/{task['id']}", headers=bearer("alice"))
            )
            for _ in range(3)
        ]
        await until(lambda: waiting_for_locks(sql) == 3)
        holder.rollback()
    answers = await asyncio.gather(*deletions)
    assert sorted(answer.status_code for answer in answers) == [204, 404, 404]
    assert len(sql.execute("SELECT FROM tombstones").fetchall()) == 1


async def test_change_that_waited_keeps_the_changes_before_it(
    service: Service, sql: psycopg.Connection, database_url: str
) -> None:
    """PostgreSQL reads the row again after the wait (EvalPlanQual)."""
    task = await service.create("alice")
    path = f"/api/tasks/{task['id']}"
    with held(database_url, "SELECT FROM users WHERE id = 'alice' FOR UPDATE") as holder:
        changes = [
            asyncio.create_task(service.client.put(path, headers=bearer("alice"), json=body))
            for body in ({"title": "t"}, {"description": "d"}, {"priority": "low"})
        ]
        await until(lambda: waiting_for_locks(sql) == 3)
        holder.rollback()
    answers = await asyncio.gather(*changes)
    assert {answer.status_code for answer in answers} == {200}
    final = max((answer.json() for answer in answers), key=lambda each: each["version"])
    assert (final["title"], final["description"], final["priority"]) == ("t", "d", "low")
    assert len({answer.json()["version"] for answer in answers}) == 3


async def test_writes_that_change_nothing_do_not_deadlock_with_others(service: Service) -> None:
    """Every write locks the user first, even if it does not change the task."""
    task = await service.create("alice")
    path = f"/api/tasks/{task['id']}"
    bodies = [{"title": task["title"]}, {"title": "x"}, {"status": "incomplete"}] * 20
    answers = await asyncio.gather(
        *(service.client.put(path, headers=bearer("alice"), json=body) for body in bodies)
    )
    assert {answer.status_code for answer in answers} == {200}


def test_every_write_is_joined_to_the_version_and_never_sub_selects_it() -> None:
    """A sub-select lets a write that changes nothing lock the task before the user."""
    for statement in (
        statements.add_task(),
        statements.toggle_task(),
        statements.remove_task(),
        statements.change_task(frozenset(WRITABLE)),
    ):
        assert re.search(rb"(FROM|USING) (clock, )?writer", statement.sql), statement.sql
        assert re.search(rb"= ?\(SELECT", statement.sql) is None


async def test_recreated_account_continues_above_its_old_versions(
    service: Service, sql: psycopg.Connection, clock: Clock
) -> None:
    """Even if the clock of the erasing process was ahead."""
    clock.milliseconds += DAY
    last = (await write_everything(service, "alice"))[-1]
    await service.request("DELETE", "/api/account", "alice")
    sql.execute("UPDATE erasures SET tokens_from = now() - interval '1 hour'")
    clock.milliseconds -= DAY
    assert (await service.create("alice"))["version"] > last


def restore(url: str) -> str:
    """Run `todo-api restored`, and return what it prints."""
    return subprocess.run(
        command("restored"),
        env=environment(DATABASE_URL=url, BETTER_AUTH_SECRET=SECRET),
        check=True,
        capture_output=True,
        text=True,
    ).stdout


async def test_no_version_comes_back_after_a_backup_is_restored(
    database_url: str, sql: psycopg.Connection, short_folder: Path
) -> None:
    """For a user in the backup, one created after it, and one erased after it."""
    async with running_service(database_url, short_folder) as before:
        backup = {user: (await before.create(user))["version"] for user in ("alice", "carol")}
        given = {user: await write_everything(before, user) for user in ("alice", "bob", "carol")}
        await before.request("DELETE", "/api/account", "carol")
    sql.execute("DELETE FROM users")
    sql.execute("DELETE FROM erasures")
    for user, version in backup.items():
        sql.execute("INSERT INTO users (id, version) VALUES (%s, %s)", [user, version])
    assert "2 users" in restore(database_url)
    async with running_service(database_url, short_folder) as after:
        for user, versions in given.items():
            # Lost versions may be ahead of the clock by half a day.
            assert (await after.create(user))["version"] > max(versions) + DAY // 2


async def test_restoring_twice_lifts_the_versions_twice(
    service: Service, database_url: str
) -> None:
    versions = [(await service.create("alice"))["version"]]
    for _ in range(2):
        restore(database_url)
        versions.append((await service.create("alice"))["version"])
    assert versions[1] > versions[0] + DAY // 2
    assert versions[2] >= versions[1] + DAY


async def test_start_is_refused_if_transactions_are_not_read_committed(
    database_url: str, sql: psycopg.Connection
) -> None:
    """A write that waited would end with 40001 instead of reading the row again."""
    sql.execute(
        f"ALTER DATABASE {sql.info.dbname} SET default_transaction_isolation = 'repeatable read'"
    )
    for row_security in (True, False):
        database = Database(database_url, settings(row_security=row_security))
        with pytest.raises(StartupError, match="default_transaction_isolation = 'read committed'"):
            await database.open()


async def test_every_update_is_a_heap_only_tuple(service: Service, sql: psycopg.Connection) -> None:
    """No index holds a column that changes, so an update touches no index."""
    task = await service.create("alice", due_date="2026-12-01")
    for number in range(20):
        await service.request("PATCH", f"/api/tasks/{task['id']}/complete", "alice")
        body = {"title": f"{number}", "priority": "low", "due_date": f"2026-12-{number + 1:02}"}
        await service.request("PUT", f"/api/tasks/{task['id']}", "alice", json=body)
    query = "SELECT sum(n_tup_upd - n_tup_hot_upd), sum(n_tup_upd) FROM pg_stat_user_tables"

    def counted() -> tuple[Any, ...]:
        sql.execute("SELECT pg_stat_force_next_flush()")
        return sql.execute(query).fetchone() or ()

    await until(lambda: counted()[1] >= 80)
    assert counted()[0] == 0
