"""`make load` and `make soak` in short, judged by what they count, and proof that they can fail."""

import asyncio
import subprocess
import sys
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.rows import dict_row
from soak.calls import KEPT, REPEATED, Connections
from soak.clients import Client
from soak.comparison import (
    ALIEN,
    BACK,
    COPIES,
    KEYED_ONCE,
    LATEST,
    LOST,
    REFUSED,
    REFUSED_TEXT,
    STORED,
    TWICE,
    WHOLE,
    compared,
    rows,
)
from soak.followers import Follower
from soak.ledger import NEVER_STORED, Fate, Ledger, Task

from support.program import serving
from support.service import SECRET

ROOT = Path(__file__).parents[2]
USERS = ("ada", "Zoë")
REQUESTS = 600
BATCHES_UNDONE = 3
"""Batches that fail after a creation. They are rare, and a service may store half of them."""

Copies = Mapping[str, dict[int, dict[str, Any]]]


def run(module: str, *arguments: str) -> None:
    """Run one of them, and show its table if it says FAIL."""
    finished = subprocess.run(
        [sys.executable, "-m", module, "--counts-alone", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr


def test_excess_requests_are_refused_in_shape_and_never_reach_the_database() -> None:
    # At this distance, the network and not the CPU limits the capacity. So another program that
    # uses the CPU does not change how many requests are too many.
    network = ("--milliseconds", "100", "--wait", "0.4")
    run("soak.load", "--seconds", "4", "--max-in-flight", "6", *network)


def test_every_acknowledged_operation_is_stored_whatever_breaks() -> None:
    run("soak.soak", "--minutes", "0.06", "--seed", "3")


@dataclass
class Calm:
    """What clients and followers know after a short run without faults."""

    ledger: Ledger
    copies: Copies

    def task(self, fits: Callable[[Task], bool]) -> Task:
        """Return a task that is still there."""
        return next(
            task for task in self.ledger.tasks.values() if not task.is_deleted and fits(task)
        )


@pytest.fixture(scope="module")
def calm_url(database_url_of_module: str) -> str:
    return database_url_of_module


@pytest.fixture(scope="module")
def calm(calm_url: str, tmp_path_factory: pytest.TempPathFactory) -> Calm:
    return calm_run(calm_url, tmp_path_factory.mktemp("calm"))


def calm_run(url: str, folder: Path, prelude: str | None = None) -> Calm:
    """Let clients and followers use the program for a while."""
    variables = {"DATABASE_URL": url, "BETTER_AUTH_SECRET": SECRET, "LOG_LEVEL": "error"}
    with serving(folder, prelude=prelude, **variables) as program:
        return asyncio.run(used(program.address))


async def used(address: str) -> Calm:
    ledger, connections = Ledger(), Connections(15)
    connections.lead_to(address)
    clients = [
        Client(f"{user} {number}", user, connections, ledger, f"{user} {number}")
        for user in USERS
        for number in range(2)
    ]
    followers = [Follower(user, connections, ledger, user) for user in USERS]

    def stopped() -> bool:
        undone = ledger.events["batches undone"]
        return ledger.fates.total() >= REQUESTS and undone >= BATCHES_UNDONE

    await asyncio.gather(
        *(client.run(stopped) for client in clients),
        *(follower.run(stopped) for follower in followers),
    )
    for follower in followers:
        await follower.finish(10)
    await connections.close()
    return Calm(ledger, {follower.user: follower.copy for follower in followers})


def failed(calm: Calm, stored: list[dict[str, Any]]) -> set[str]:
    """Return the promises that the verdict calls broken."""
    checks = compared(deepcopy(calm.ledger), stored, calm.copies)
    return {check.promise for check in checks if not check.kept}


def test_calm_run_breaks_no_promise(calm: Calm, calm_url: str) -> None:
    assert calm.ledger.violations == {}
    assert failed(calm, rows(calm_url, STORED)) == set()


@pytest.mark.parametrize(
    "event",
    [
        *("304", "412", "twins", "hang-ups", "changes followed"),
        *("repeats of lost answers", "repeats of acknowledged writes"),
    ],
)
def test_calm_run_contains_every_kind_of_request(calm: Calm, event: str) -> None:
    assert calm.ledger.events[event] > 0


def lose_keyed_task(calm: Calm, sql: psycopg.Connection[Any]) -> None:
    task = calm.task(lambda it: it.title in calm.ledger.keyed)
    sql.execute("DELETE FROM tasks WHERE id = %s", [task.id])


def store_twice(calm: Calm, sql: psycopg.Connection[Any]) -> None:
    task = calm.task(lambda it: it.title in calm.ledger.keyed)
    insert(sql, task.owner, task.title)


def carry_out_what_answered_412(calm: Calm, sql: psycopg.Connection[Any]) -> None:
    numbers = {task.id for task in calm.ledger.tasks.values() if not task.is_deleted}
    text, number = next(
        (text, it.task_id)
        for text, it in calm.ledger.texts.items()
        if it.fate is Fate.REFUSED and it.task_id in numbers
    )
    sql.execute("UPDATE tasks SET description = %s WHERE id = %s", [text, number])


def keep_part_of_a_failed_batch(calm: Calm, sql: psycopg.Connection[Any]) -> None:
    titles = calm.ledger.titles
    title = next(
        title for batch in calm.ledger.batches for title in batch if titles[title] in NEVER_STORED
    )
    insert(sql, USERS[0], title)


def bring_back(calm: Calm, sql: psycopg.Connection[Any]) -> None:
    task = next(task for task in calm.ledger.tasks.values() if task.is_deleted)
    insert(sql, task.owner, task.title)


def lose_change(calm: Calm, sql: psycopg.Connection[Any]) -> None:
    task = calm.task(lambda it: it.values["description"] is not None)
    sql.execute("UPDATE tasks SET description = NULL WHERE id = %s", [task.id])


def invent(_: Calm, sql: psycopg.Connection[Any]) -> None:
    insert(sql, USERS[0], "nobody asked for this")


def insert(sql: psycopg.Connection[Any], owner: str, title: str) -> None:
    sql.execute("INSERT INTO tasks (user_id, title, version) VALUES (%s, %s, 1)", [owner, title])


@pytest.mark.parametrize(
    ("tamper", "broken"),
    [
        (lose_keyed_task, {LOST, KEYED_ONCE, COPIES}),
        (store_twice, {TWICE, KEYED_ONCE, LATEST, COPIES}),
        (carry_out_what_answered_412, {REFUSED_TEXT, LATEST, COPIES}),
        (keep_part_of_a_failed_batch, {REFUSED, COPIES}),
        (bring_back, {BACK, LATEST, COPIES}),
        (lose_change, {LATEST, COPIES}),
        (invent, {ALIEN, COPIES}),
    ],
)
def test_verdict_finds_what_is_wrong_in_the_database(
    calm: Calm,
    calm_url: str,
    tamper: Callable[[Calm, psycopg.Connection[Any]], None],
    broken: set[str],
) -> None:
    with psycopg.connect(calm_url, row_factory=dict_row) as sql:
        tamper(calm, sql)
        stored = sql.execute(STORED).fetchall()
        sql.rollback()
    assert failed(calm, stored) == broken


def test_verdict_finds_half_a_batch_whose_answer_was_lost(calm: Calm, calm_url: str) -> None:
    stored = rows(calm_url, STORED)
    there = {row["title"] for row in stored}
    batch = next(
        titles for titles in calm.ledger.batches if len(titles) > 1 and there >= set(titles)
    )
    unsure = deepcopy(calm)
    for title in batch:
        unsure.ledger.titles[title] = Fate.UNKNOWN
        del unsure.ledger.tasks[title]
    assert failed(unsure, stored) == set()
    half = [row for row in stored if row["title"] != batch[0]]
    assert failed(unsure, half) == {WHOLE, COPIES}


def test_verdict_finds_a_follower_that_missed_a_deletion(calm: Calm, calm_url: str) -> None:
    behind = deepcopy(calm)
    gone = next(task for task in calm.ledger.tasks.values() if task.is_deleted)
    behind.copies[gone.owner][gone.id] = {"id": gone.id}
    assert failed(behind, rows(calm_url, STORED)) == {COPIES}


CHANGES_ALWAYS = "from todo_api.tasks import routes; routes.read_entity_tags = lambda *_: None"
FORGETS_KEYS = "from todo_api.tasks import routes; routes.read_idempotency_key = lambda _: None"
ALWAYS_UNCHANGED = """
from todo_api.tasks.owned_tasks import OwnedTasks, TaskList
read = OwnedTasks.list
async def read_once(self, query, known=None):
    return await read(self, query) if known is None else TaskList(known, [], None)
OwnedTasks.list = read_once
"""
WRITES_HALF_BATCHES = """
from todo_api.errors import ApiError
from todo_api.tasks.owned_tasks import OwnedTasks
write = OwnedTasks.run_batch
async def write_some(self, operations, retry=None):
    try:
        return await write(self, operations, retry)
    except ApiError as error:
        if error.operation:
            await write(self, operations[:error.operation])
        raise
OwnedTasks.run_batch = write_some
"""
HIDES_DELETIONS = """
from todo_api.tasks.changes import ChangesPage
show = ChangesPage.shown
def without_deletions(self, user_id):
    rows = [row for row in self.rows if not row.startswith(b'{"deleted"')]
    return show(self._replace(rows=rows), user_id)
ChangesPage.shown = without_deletions
"""


@pytest.mark.parametrize(
    ("defect", "broken"),
    [
        pytest.param(CHANGES_ALWAYS, {KEPT}, id="changes always"),
        pytest.param(FORGETS_KEYS, {REPEATED}, id="forgets keys"),
        pytest.param(ALWAYS_UNCHANGED, {KEPT}, id="always unchanged"),
        pytest.param(WRITES_HALF_BATCHES, {KEPT, REFUSED}, id="writes half batches"),
        pytest.param(HIDES_DELETIONS, {COPIES}, id="hides deletions"),
    ],
)
def test_verdict_finds_a_defect_of_the_service(
    database_url: str, tmp_path: Path, defect: str, broken: set[str]
) -> None:
    calm = calm_run(database_url, tmp_path, defect)
    found = failed(calm, rows(database_url, STORED)) | calm.ledger.violations.keys()
    assert found & broken
