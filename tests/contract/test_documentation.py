"""The examples of docs/api.md run unchanged: curl against the program, TypeScript in Node."""

import asyncio
import json
import random
import re
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
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

Play: TypeAlias = Callable[..., Awaitable[Any]]


def curl(command: str, address: str) -> Any:
    """Run an example and return the JSON that it prints."""
    return json.loads(printed(command, address))


def printed(command: str, address: str) -> str:
    """Run an example and return what it prints."""
    done = subprocess.run(
        ["bash", "-euc", command.replace("curl", "curl -sS --fail-with-body", 1)],
        env=environment(TOKEN=token("alice")),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, ""), f"{command}\n{done.stdout}{done.stderr}"
    assert address in command
    return done.stdout


def test_curl_examples_do_what_the_page_says(
    tmp_path: Path, database_url: str, sql: psycopg.Connection
) -> None:
    """The keyed creation is sent twice and stored once."""
    assert PAGE.count("\ncurl ") == len(CURL)
    settings = {"BETTER_AUTH_SECRET": SECRET, "DATABASE_URL": database_url}
    with serving(tmp_path, **settings) as program, program.client(token("alice")) as client:
        address = program.address.removeprefix("http://")
        search, page, refresh, edit, create, batch, changes = (
            command.replace("localhost:8000", address) for command in CURL
        )
        for task in (
            {"title": "Milk", "due_date": "2026-12-07"},
            {"title": "Milk", "due_date": "2026-12-08"},
            {"title": "Bread", "due_date": "2026-12-07"},
        ):
            created = client.post("/api/tasks", json=task)
            assert created.status_code == 201
        shown = printed(page, address).lower()
        assert "\nx-total-count: 3\n" in shown.replace("\r", "")
        assert "\nlink: </api/tasks?limit=1&count=true&cursor=" in shown
        refresh, edit = (
            each.replace("tasks/42", f"tasks/{created.json()['id']}").replace(
                '"7"', created.headers["ETag"]
            )
            for each in (refresh, edit)
        )
        assert printed(refresh, address).startswith("HTTP/1.1 304 ")
        assert printed(edit, address).startswith("HTTP/1.1 200 ")
        assert printed(refresh, address).startswith("HTTP/1.1 200 ")
        with pytest.raises(AssertionError, match="task_changed"):
            printed(edit, address)
        assert [task["due_date"] for task in curl(search, address)] == ["2026-12-07"]
        assert curl(create, address) == curl(create, address)
        made = [result["task"]["title"] for result in curl(batch, address)["results"]]
        feed = curl(changes, address)
    assert made == ["Buy milk", "Bake a cake"]
    stored = sql.execute("SELECT title FROM tasks ORDER BY version").fetchall()
    assert [title for (title,) in stored] == ["Milk", "Milk", "Rye bread", "Buy milk", *made]
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
        self.is_down = False
        """Every connection breaks at its next request, which does not reach the service."""
        self._asked: dict[Link, str] = {}
        self._released = asyncio.Event()

    async def _ask(self, link: Link, data: bytes) -> None:
        if self.is_down:
            raise ConnectionResetError
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

    async def playing(scene: str, *words: str) -> Any:
        address = f"http://127.0.0.1:{way.port}"
        arguments = ("node", "documented.js", address, token("alice"), scene, *words)
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


class Device:
    """A follower of docs/api.md. Each call opens its page, does something there and closes it."""

    def __init__(self, play: Play, storage: Path) -> None:
        self._play = play
        self._storage = storage
        self.tasks: dict[str, dict[str, Any]] = {}
        """What the page showed last, by title."""
        self.conflicts: list[tuple[str, str | None, str | None]] = []
        """The code of each, and both titles."""
        self.wanted = ""
        """The descriptions that the user wants in conflicts."""
        self.failure: str | None = None

    async def __call__(self, *steps: tuple[object, ...]) -> None:
        shown = await self._play("page", str(self._storage), json.dumps(steps))
        self.tasks = {task["title"]: task for task in shown["tasks"]}
        assert len(self.tasks) == len(shown["tasks"])
        self.conflicts = [
            (each["edit"]["code"], *(each.get(side, {}).get("title") for side in SIDES))
            for each in shown["conflicts"]
        ]
        self.wanted = "".join(
            each["mine"]["description"] or "" for each in shown["conflicts"] if "mine" in each
        )
        self.failure = shown["failure"]


SIDES = ("mine", "theirs")
SYNC = ("sync", "")


@pytest.fixture
def phone(play: Play, tmp_path: Path) -> Device:
    return Device(play, tmp_path / "phone")


@pytest.fixture
def laptop(play: Play, tmp_path: Path) -> Device:
    return Device(play, tmp_path / "laptop")


def rows(sql: psycopg.Connection) -> dict[str, tuple[object, ...]]:
    """Return what the database has of each task, by title."""
    found = sql.execute("SELECT title, id, version, description, priority FROM tasks").fetchall()
    assert len({title for title, *_ in found}) == len(found)
    return {title: tuple(rest) for title, *rest in found}


def copy(device: Device) -> dict[str, tuple[object, ...]]:
    """Return the same of what a device shows."""
    fields = ("id", "version", "description", "priority")
    return {title: tuple(task[each] for each in fields) for title, task in device.tasks.items()}


async def test_follower_works_offline_and_catches_up(
    phone: Device, laptop: Device, way: Way, sql: psycopg.Connection
) -> None:
    """Both edit offline, the phone's network breaks off during the replay, and both agree."""
    await phone(("create", "milk"), ("create", "bread"), ("create", "old"), SYNC)
    await laptop(SYNC)
    assert copy(laptop) == copy(phone) == rows(sql)

    way.is_down = True
    await phone(("change", "milk", {"title": "oat milk"}), ("create", "eggs"))
    await phone(("change", "eggs", {"priority": "high"}), ("delete", "bread"), SYNC)
    assert phone.failure
    await phone(("change", "oat milk", {"priority": "low"}), ("delete", "old"))
    assert {title: task["priority"] for title, task in phone.tasks.items()} == {
        "oat milk": "low",
        "eggs": "high",
    }
    await laptop(("change", "milk", {"title": "soy milk"}), ("create", "tea"))
    await laptop(("change", "bread", {"title": "rye bread"}), ("delete", "old"), SYNC)
    assert [*laptop.tasks] == ["soy milk", "rye bread", "tea"]

    way.is_down = False
    way.cuts = [b'"title":"eggs"']
    await phone(SYNC)
    assert phone.failure
    assert phone.tasks["eggs"]["priority"] == "high"
    assert rows(sql).keys() == {"bread", "old", "oat milk", "eggs"}
    await phone(SYNC)
    assert not phone.failure
    assert not phone.conflicts
    assert copy(phone) == rows(sql)
    assert {title: row[-1] for title, row in rows(sql).items()} == {
        "oat milk": "low",
        "eggs": "high",
    }

    await laptop(SYNC)
    assert laptop.conflicts == [
        ("task_changed", "soy milk", "oat milk"),
        ("task_not_found", "rye bread", None),
    ]
    assert copy(laptop) == rows(sql)
    assert {"oat milk", "eggs", "tea"} == laptop.tasks.keys()
    await laptop(("keep mine", "soy milk"), ("keep mine", "rye bread"))
    assert not laptop.conflicts
    assert laptop.tasks.keys() == {"soy milk", "rye bread", "eggs", "tea"}
    for device in (laptop, phone):
        await device(SYNC)
        assert not device.conflicts
        assert copy(device) == rows(sql)
    assert {title: row[-1] for title, row in rows(sql).items()} == {
        "soy milk": "low",
        "eggs": "high",
        "tea": None,
        "rye bread": None,
    }


async def test_follower_sends_the_version_that_the_user_saw(
    phone: Device, laptop: Device, sql: psycopg.Connection
) -> None:
    """A form keeps what it read: over the user's own edits it wins, over others' it does not."""
    await phone(("create", "milk"), SYNC)
    mine = ("change as read", "milk", {"priority": "high"})
    await phone(("change", "milk", {"description": "my own"}), SYNC, mine, SYNC)
    assert not phone.conflicts
    assert [row[2:] for row in rows(sql).values()] == [("my own", "high")]

    await laptop(SYNC)
    await phone(("change", "milk", {"description": "theirs"}), SYNC)
    stale = ("change as read", "milk", {"description": "not theirs"})
    await laptop(SYNC, stale, ("append", "milk", {"description": " either"}), SYNC)
    assert laptop.conflicts == [("task_changed", "milk", "milk")] * 2
    assert laptop.wanted == "not theirs" + "not theirs either"
    await laptop(*[("keep theirs", "milk")] * 2, ("change", "milk", {"priority": "medium"}), SYNC)
    assert not laptop.conflicts
    assert [row[2:] for row in rows(sql).values()] == [("theirs", "medium")]


async def test_edit_of_a_new_task_meets_an_edit_of_somebody_else(
    phone: Device, laptop: Device, way: Way, sql: psycopg.Connection
) -> None:
    """The phone does not learn that its task was created, and the laptop changes it."""
    way.cuts = [b'"title":"eggs"']
    await phone(("create", "eggs"), ("change", "eggs", {"priority": "high"}), SYNC)
    assert phone.failure
    await laptop(SYNC, ("change", "eggs", {"description": "brown"}), SYNC)
    await phone(SYNC)
    assert phone.conflicts == [("task_changed", "eggs", "eggs")]
    await phone(("keep mine", "eggs"), SYNC)
    assert [row[2:] for row in rows(sql).values()] == [("brown", "high")]


async def test_refused_edit_does_not_block_the_queue(
    phone: Device, laptop: Device, sql: psycopg.Connection
) -> None:
    """A deletion that finds nothing is not refused, and an edit may change nothing."""
    await phone(("create", "milk"), ("create", "bread"), SYNC)
    await laptop(SYNC, ("delete", "milk"), ("delete", "bread"))
    rye = ("change", "bread", {"description": "rye"})
    await phone(("delete", "milk"), ("change", "bread", {"title": "bread"}), SYNC, rye, SYNC)
    await phone(("create", "b" * 256), ("change", "b" * 256, {"priority": "low"}), SYNC)
    assert phone.conflicts == [("invalid_fields", "b" * 256, None)] * 2
    await phone(("create", "tea"), SYNC)
    assert rows(sql).keys() == phone.tasks.keys() == {"bread", "tea"}
    await laptop(SYNC)
    assert laptop.conflicts == [("task_changed", None, "bread")]
    assert copy(laptop) == rows(sql)


async def test_follower_starts_anew_when_its_cursor_has_expired(
    phone: Device, way: Way, sql: psycopg.Connection
) -> None:
    """The service has forgotten a deletion. What waits is still sent."""
    await phone(("create", "milk"), ("create", "bread"), SYNC)
    sql.execute("DELETE FROM tasks WHERE title = 'milk'")
    sql.execute("UPDATE users SET version = version + 1, changes_from = version + 1")
    await phone(("change", "bread", {"priority": "high"}), SYNC)
    assert 410 in way.statuses
    assert copy(phone) == rows(sql)
    assert [(title, row[-1]) for title, row in rows(sql).items()] == [("bread", "high")]


async def test_waiting_follower_sends_an_edit_at_once(play: Play) -> None:
    assert await play("live") == [["mine"], ["mine", "theirs"]]


@pytest.mark.parametrize("seed", range(2))
async def test_followers_lose_no_edit_and_agree_at_last(
    phone: Device, laptop: Device, way: Way, sql: psycopg.Connection, seed: int
) -> None:
    """Each edit appends its own word to a description, and the network breaks at random.

    In the end each word is in the database once, or in a conflict, or its task is deleted.
    """
    chance = random.Random(seed)  # noqa: S311  a repeatable test
    titles: dict[str, str] = {}
    deleted: set[str] = set()
    for _ in range(12):
        for device in (phone, laptop):
            steps = list(random_steps(chance, device, titles, deleted))
            way.is_down = chance.random() < 0.2
            way.cuts = [chance.choice((b'{"results":', b'"cursor":'))] * chance.randrange(2)
            await device(*steps, *[SYNC] * chance.randrange(2))
    way.is_down = False
    way.cuts = []
    for device in (phone, laptop, phone):
        await device(SYNC)
        assert not device.failure
    assert copy(phone) == copy(laptop) == rows(sql)
    stored = "".join(str(description) for _, _, description, _ in rows(sql).values())
    refused = phone.wanted + laptop.wanted
    for word, title in titles.items():
        assert stored.count(word) <= 1, word
        assert word in stored or word in refused or title in deleted - rows(sql).keys(), word
    assert stored
    assert refused


def random_steps(
    chance: random.Random, device: Device, titles: dict[str, str], deleted: set[str]
) -> Iterator[tuple[object, ...]]:
    """Yield three edits of what a device shows, and note the task of each word."""
    shown = {*device.tasks}
    for _ in range(3):
        word = f"<{len(titles)}>"
        title = f"task {len(titles)}"
        if shown and chance.random() < 0.1:
            title = chance.choice(sorted(shown))
            shown.remove(title)
            deleted.add(title)
            yield ("delete", title)
            continue
        action = "create"
        if len(shown) > 2 or (shown and chance.random() < 0.5):
            action, title = "append", chance.choice(sorted(shown))
        shown.add(title)
        titles[word] = title
        yield (action, title, {"description": word})
