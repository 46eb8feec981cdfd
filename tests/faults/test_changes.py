"""The feed of changes on real processes: shutdown, clients that leave, another process, kills."""

import select
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import psycopg
import pytest

from support.http import LOCAL
from support.own_postgres import OwnPostgres
from support.program import Program, serving
from support.service import SECRET, bearer, token
from support.waiting import wait_for

PATH = "/api/tasks/changes"


@pytest.fixture
def variables(database_url: str) -> Mapping[str, str]:
    return {"DATABASE_URL": database_url, "BETTER_AUTH_SECRET": SECRET, "LOG_LEVEL": "warning"}


def call(program: Program, verb: str, path: str, **options: Any) -> httpx2.Response:
    return httpx2.request(
        verb, program.address + path, headers=bearer("alice"), **LOCAL | {"timeout": 70} | options
    )


def follow(program: Program, copy: dict[int, Any], since: str | None) -> str:
    """Bring a copy up to date, and return the cursor."""
    while True:
        params = {"limit": "3"} | ({"since": since} if since else {})
        answer = call(program, "GET", PATH, params=params)
        assert answer.status_code == 200, answer.text
        body = answer.json()
        for change in body["changes"]:
            if "deleted" in change:
                copy.pop(change["deleted"], None)
            else:
                copy[change["task"]["id"]] = change["task"]
        since = str(body["cursor"])
        if not body["more"]:
            return since


@contextmanager
def waiting(program: Program, since: str) -> Iterator[Callable[[], httpx2.Response]]:
    """Send a request that waits. Gives a function that returns its answer."""
    answers: list[httpx2.Response] = []

    def ask() -> None:
        answers.append(call(program, "GET", PATH, params={"since": since, "wait": "60"}))

    def answer() -> httpx2.Response:
        thread.join(70)
        return answers[0]

    thread = threading.Thread(target=ask)
    thread.start()
    yield answer
    thread.join(70)


def until_it_waits(database_url: str) -> None:
    """Wait until a process asks for the versions of waiting users."""
    asked = (
        "SELECT FROM pg_stat_activity WHERE datname = current_database()"
        " AND query LIKE '%versions_of%' AND pid <> pg_backend_pid()"
    )
    with psycopg.connect(database_url, autocommit=True) as sql:
        wait_for(lambda: sql.execute(asked).fetchone() is not None)


def test_shutdown_ends_the_wait(
    tmp_path: Path, variables: Mapping[str, str], database_url: str
) -> None:
    with serving(tmp_path, **variables) as program:
        cursor = follow(program, {}, None)
        with waiting(program, cursor) as answer:
            until_it_waits(database_url)
            assert program.stop() == 0
            assert answer().json() == {"changes": [], "cursor": cursor, "more": False}


def test_write_through_another_process_ends_the_wait(
    tmp_path: Path, variables: Mapping[str, str], database_url: str
) -> None:
    folders = tmp_path / "a", tmp_path / "b"
    for folder in folders:
        folder.mkdir()
    with serving(folders[0], **variables) as one, serving(folders[1], **variables) as other:
        cursor = follow(one, {}, None)
        with waiting(one, cursor) as answer:
            until_it_waits(database_url)
            task = call(other, "POST", "/api/tasks", json={"title": "x"}).json()
            assert answer().json()["changes"] == [{"task": task}]


def test_client_that_leaves_gives_up_its_place(
    tmp_path: Path, variables: Mapping[str, str]
) -> None:
    """At most twenty requests of one user wait."""
    with serving(tmp_path, **variables) as program:
        cursor = follow(program, {}, None)
        head = f"Host: x\r\nAuthorization: Bearer {token('alice')}\r\n"
        request = f"GET {PATH}?since={cursor}&wait=60 HTTP/1.1\r\n{head}\r\n".encode()
        waits = {"since": cursor, "wait": "1"}
        with program.connect() as first:
            first.sendall(request)
            with ExitStack() as others:
                for _ in range(19):
                    others.enter_context(program.connect()).sendall(request)
                wait_for(lambda: call(program, "GET", PATH, params=waits).status_code == 429)
            wait_for(lambda: call(program, "GET", PATH, params=waits).status_code == 200)
            answered, _, _ = select.select([first], [], [], 0)
            assert not answered, "places were free only when the waits were over"


@pytest.fixture
def own_postgres(tmp_path: Path) -> Iterator[OwnPostgres]:
    postgres = OwnPostgres(tmp_path)
    yield postgres
    postgres.stop()


def test_follower_survives_kills(tmp_path: Path, own_postgres: OwnPostgres) -> None:
    """The program and PostgreSQL are killed in turn, in the middle of writes."""
    copy: dict[int, Any] = {}
    cursor: str | None = None
    variables = {"DATABASE_URL": own_postgres.at("migrated"), "BETTER_AUTH_SECRET": SECRET}
    for number in range(4):
        folder = tmp_path / str(number)
        folder.mkdir()
        with serving(folder, **variables, LOG_LEVEL="error") as program:
            cursor = follow(program, copy, cursor)
            with writing(program):
                for _ in range(3):
                    cursor = follow(program, copy, cursor)
                if number % 2:
                    own_postgres.crash(signal.SIGKILL)
                    own_postgres.start()
                    wait_for(partial(is_ready, program))
                    cursor = follow(program, copy, cursor)
                else:
                    program.process.kill()
                    program.process.wait()
    with serving(tmp_path, **variables, LOG_LEVEL="error") as program:
        follow(program, copy, cursor)
        listed = call(program, "GET", "/api/tasks").json()
        assert copy == {task["id"]: task for task in listed}
        assert listed


def is_ready(program: Program) -> bool:
    return httpx2.get(f"{program.address}/readyz", **LOCAL).status_code == 200


@contextmanager
def writing(program: Program) -> Iterator[None]:
    """Write until the end of the block, whatever the program answers."""
    ended = threading.Event()
    thread = threading.Thread(target=write_until, args=(program, ended))
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def write_until(program: Program, ended: threading.Event) -> None:
    operations = [{"op": "create", "task": {"title": "x"}}] * 3
    while not ended.is_set():
        with suppress(httpx2.HTTPError):
            batch = call(program, "POST", "/api/tasks/batch", json={"operations": operations})
            if batch.status_code == 200:
                first, second, _ = (each["task"]["id"] for each in batch.json()["results"])
                call(program, "PATCH", f"/api/tasks/{first}/complete")
                call(program, "DELETE", f"/api/tasks/{second}")
