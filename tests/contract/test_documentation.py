"""The examples of docs/api.md run unchanged: curl against the program, TypeScript in Node."""

import asyncio
import json
import re
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, TypeAlias

import psycopg
import pytest

from support.listening import Listening, listening
from support.network import Link, Network
from support.node import copy_sources, missing, succeed
from support.program import environment, serving
from support.requirements import need
from support.service import SECRET, token
from support.waiting import until

PAGE = (Path(__file__).parents[2] / "docs" / "api.md").read_text()
CURL = re.findall(r"^```\n(curl .*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
TYPESCRIPT = re.findall(r"^```ts\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)

Play: TypeAlias = Callable[[str], Awaitable[Any]]


def curl(command: str, address: str) -> Any:
    """Run an example and return the JSON that it prints."""
    done = subprocess.run(
        ["bash", "-euc", command.replace("curl", "curl -sS --fail-with-body", 1)],
        env=environment(TOKEN=token("alice")),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, ""), f"{command}\n{done.stdout}{done.stderr}"
    assert address in command
    return json.loads(done.stdout)


def test_curl_examples_do_what_the_page_says(
    tmp_path: Path, database_url: str, sql: psycopg.Connection
) -> None:
    """The keyed creation is sent twice and stored once."""
    assert PAGE.count("\ncurl ") == len(CURL)
    settings = {"BETTER_AUTH_SECRET": SECRET, "DATABASE_URL": database_url}
    with serving(tmp_path, **settings) as program, program.client(token("alice")) as client:
        address = program.address.removeprefix("http://")
        search, create, batch, changes = (
            command.replace("localhost:8000", address) for command in CURL
        )
        for task in (
            {"title": "Milk", "due_date": "2026-12-07"},
            {"title": "Milk", "due_date": "2026-12-08"},
            {"title": "Bread", "due_date": "2026-12-07"},
        ):
            assert client.post("/api/tasks", json=task).status_code == 201
        assert [task["due_date"] for task in curl(search, address)] == ["2026-12-07"]
        assert curl(create, address) == curl(create, address)
        made = [result["task"]["title"] for result in curl(batch, address)["results"]]
        feed = curl(changes, address)
    assert made == ["Buy milk", "Bake a cake"]
    stored = sql.execute("SELECT title FROM tasks ORDER BY version").fetchall()
    assert [title for (title,) in stored] == ["Milk", "Milk", "Bread", "Buy milk", *made]
    assert [(change["task"]["title"],) for change in feed["changes"]] == stored


class Way(Network):
    """The way to the service: it notes what passes, and cuts or holds answers."""

    def __init__(self, port: int) -> None:
        super().__init__(f"host=127.0.0.1 port={port} user=none dbname=none")
        self.requests: list[str] = []
        self.statuses: list[int] = []
        self.cuts: list[bytes] = []
        """For each cut, the last bytes that pass."""
        self.held = "nothing"
        """The answers to requests with this text wait for the answer to another request."""
        self._asked: dict[Link, str] = {}
        self._released = asyncio.Event()

    async def _ask(self, link: Link, data: bytes) -> None:
        if found := re.match(rb"([A-Z]+ \S+) HTTP/1.1\r\n", data):
            self._asked[link] = found[1].decode()
            self.requests.append(self._asked[link])
        await super()._ask(link, data)

    async def _answer(self, link: Link, data: bytes) -> None:
        if found := re.match(rb"HTTP/1.1 (\d+) ", data):
            self.statuses.append(int(found[1]))
        if self.held in self._asked[link]:
            await self._released.wait()
        if self.cuts and self.cuts[0] in data:
            last = self.cuts.pop(0)
            await super()._answer(link, data[: data.index(last) + len(last)])
            raise ConnectionResetError
        await super()._answer(link, data)
        self._released.set()


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the page's TypeScript and the scenes that use it, compiled."""
    need(missing())
    folder = tmp_path_factory.mktemp("documentation")
    copy_sources(folder)
    (folder / "documentation.ts").write_text("\n".join(TYPESCRIPT))
    succeed(folder, "tsc", "--project", "documented.json")
    return folder / "compiled"


@pytest.fixture
async def service(database_url: str) -> AsyncIterator[Listening]:
    async with listening(database_url, lock_timeout=0.3) as running:
        yield running


@pytest.fixture
async def way(service: Listening) -> AsyncIterator[Way]:
    assert service.client.base_url.port is not None
    async with Way(service.client.base_url.port) as between:
        yield between


@pytest.fixture
def play(compiled: Path, way: Way) -> Play:
    """Return a function that plays a scene of `documented.ts`, and returns what it printed."""

    async def playing(scene: str) -> Any:
        address = f"http://127.0.0.1:{way.port}"
        arguments = ("node", "documented.js", address, token("alice"), scene)
        return json.loads(await asyncio.to_thread(succeed, compiled, *arguments))

    return playing


def titles(sql: psycopg.Connection) -> list[str]:
    return [title for (title,) in sql.execute("SELECT title FROM tasks ORDER BY id").fetchall()]


async def test_retry_after_cut_connections_writes_once(
    play: Play, way: Way, sql: psycopg.Connection
) -> None:
    """One connection is cut before the answer, the next one in the middle of it."""
    way.cuts = [b"", b'{"id":']
    (task,) = await play("retry")
    assert way.statuses == [201, 201, 201]
    assert sql.execute("SELECT id, title FROM tasks").fetchall() == [(task["id"], "once")]


async def test_retry_after_503_writes_once(
    play: Play, way: Way, service: Listening, sql: psycopg.Connection
) -> None:
    await service.create("alice", title="first")
    with sql.transaction():
        sql.execute("SELECT FROM users WHERE id = 'alice' FOR UPDATE")
        playing = asyncio.ensure_future(play("retry"))
        await until(lambda: way.statuses)
    await playing
    assert (way.statuses[0], way.statuses[-1]) == (503, 201)
    assert titles(sql) == ["first", "once"]


async def test_same_key_writes_once(play: Play, sql: psycopg.Connection) -> None:
    """A page that gave up goes on with the same key."""
    first, second = await play("key")
    assert first == second
    assert titles(sql) == ["once"]


async def test_write_without_an_answer_body(play: Play, sql: psycopg.Connection) -> None:
    assert await play("deletion") == [None]
    assert titles(sql) == []


async def test_no_edit_is_lost(play: Play, way: Way, sql: psycopg.Connection) -> None:
    """Eight editors have read the same task, and one of them has a title that must not win."""
    title, priority, description = await play("editors")
    assert (title, priority, sorted(description)) == ("shared", "high", [*"abcdefgh"])
    assert way.statuses.count(412) >= 8
    stored = sql.execute("SELECT title, priority, description FROM tasks").fetchall()
    assert stored == [(title, priority, description)]


async def test_load_more_reads_every_page(play: Play, way: Way) -> None:
    assert await play("more") == [*"abcde"]
    assert len([each for each in way.requests if each.startswith("GET ")]) == 3


async def test_older_search_never_overwrites_a_newer_one(play: Play, way: Way) -> None:
    """The older request is on its way, and its answer comes last."""
    way.held = "q=old"
    assert await play("typing") == ["new milk"]
    assert [each for each in way.requests if each.endswith(("q=n", "q=ne"))] == []


async def test_refresh_reads_only_what_changed(play: Play, way: Way) -> None:
    assert await play("refresh") == [True, ["second", "first"]]
    assert way.statuses == [201, 200, 304, 201, 200]


async def test_batches_written_offline_are_stored_once(
    play: Play, way: Way, sql: psycopg.Connection
) -> None:
    """The page is reloaded before it could note that they were sent."""
    way.cuts = [b'{"results":']
    assert await play("offline") == [0, True]
    stored = sql.execute("SELECT title, status FROM tasks ORDER BY id").fetchall()
    assert stored == [("new", "complete"), ("written offline", "incomplete")]


async def test_refused_batch_names_its_operation(play: Play, sql: psycopg.Connection) -> None:
    assert await play("stale") == [412, "task_changed", 1, 1]
    assert titles(sql) == ["theirs"]


async def test_copy_follows_the_changes(play: Play, sql: psycopg.Connection) -> None:
    assert await play("copying") == [2, True]
    assert titles(sql) == ["b", "c"]
