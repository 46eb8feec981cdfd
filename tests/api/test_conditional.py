"""Conditional requests: edits that overwrite nobody else's, and refreshes that cost nothing."""

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import psycopg
import pytest

from support.problems import problem
from support.service import Service, bearer, running_service

CHANGES: list[tuple[str, str, dict[str, Any]]] = [
    ("PUT", "", {"json": {"title": "y"}}),
    ("PATCH", "", {"json": {"title": "y"}}),
    ("PATCH", "/complete", {}),
    ("PATCH", "/complete", {"json": {"completed": True}}),
    ("PATCH", "/status", {"json": {"status": "complete"}}),
    ("DELETE", "", {}),
]
FAMILIES = ["/api/tasks", "/api/alice/tasks"]


def with_header(name: str, value: str) -> dict[str, str]:
    return {name: value}


async def changed(service: Service, task: dict[str, Any], title: str) -> dict[str, Any]:
    answer = await service.request(
        "PUT", f"/api/tasks/{task['id']}", "alice", json={"title": title}
    )
    result: dict[str, Any] = answer.json()
    return result


@pytest.mark.parametrize("tasks", FAMILIES)
@pytest.mark.parametrize(("verb", "tail", "options"), CHANGES)
async def test_change_with_the_current_version_succeeds(
    service: Service, tasks: str, verb: str, tail: str, options: dict[str, Any]
) -> None:
    task = await service.create("alice")
    answer = await service.request(
        verb,
        f"{tasks}/{task['id']}{tail}",
        "alice",
        headers=with_header("If-Match", f'"1", "{task["version"]}"'),
        **options,
    )
    assert answer.status_code in {200, 204}
    if answer.status_code == 200:
        assert answer.headers["etag"] == f'"{answer.json()["version"]}"'
        assert answer.headers["cache-control"] == "no-store"


@pytest.mark.parametrize("if_match", ['"{}"', '"1", "{}"', 'W/"{current}"', '"x"', '"0{current}"'])
@pytest.mark.parametrize(("verb", "tail", "options"), CHANGES)
async def test_change_with_another_version_is_refused_and_writes_nothing(
    service: Service,
    sql: psycopg.Connection,
    verb: str,
    tail: str,
    options: dict[str, Any],
    if_match: str,
) -> None:
    old = await service.create("alice")
    current = await changed(service, old, "theirs")
    header = if_match.format(old["version"], current=current["version"])
    path = f"/api/tasks/{old['id']}{tail}"
    answer = await service.request(
        verb, path, "alice", headers=with_header("If-Match", header), **options
    )
    assert answer.status_code == 412
    assert answer.json() == problem("task_changed", "The task has changed")
    assert answer.headers["etag"] == f'"{current["version"]}"'
    shown = await service.request("GET", f"/api/tasks/{old['id']}", "alice")
    assert shown.json() == current
    assert sql.execute("SELECT count(*) FROM tombstones").fetchone() == (0,)


@pytest.mark.parametrize(("verb", "tail", "options"), CHANGES)
async def test_task_that_is_gone_or_of_another_user_is_not_found(
    service: Service, verb: str, tail: str, options: dict[str, Any]
) -> None:
    task = await service.create("bob")
    for if_match in ('"1"', "*", f'"{task["version"]}"'):
        answer = await service.request(
            verb,
            f"/api/tasks/{task['id']}{tail}",
            "alice",
            headers=with_header("If-Match", if_match),
            **options,
        )
        assert answer.status_code == 404
        assert answer.json() == problem("task_not_found", "Task not found")
        assert "etag" not in answer.headers


async def test_any_version_matches_a_star(service: Service) -> None:
    task = await service.create("alice")
    path = f"/api/tasks/{task['id']}"
    answer = await service.request(
        "PUT", path, "alice", headers=with_header("If-Match", "*"), json={"title": "y"}
    )
    assert (answer.status_code, answer.json()["title"]) == (200, "y")


@pytest.mark.parametrize(
    "value", ["", "7", '"7', '7"', '"7" "8"', 'w/"7"', '*, "7"', '"a b"', '"7"x', '"7", 8']
)
async def test_value_that_is_no_entity_tag_is_refused(service: Service, value: str) -> None:
    task = await service.create("alice")
    path = f"/api/tasks/{task['id']}"
    change = await service.request(
        "PUT", path, "alice", headers=with_header("If-Match", value), json={"title": "y"}
    )
    message = 'If-Match must be * or a list of entity tags such as "7"'
    assert (change.status_code, change.json()) == (400, problem("invalid_parameter", message))
    for address in (path, "/api/tasks"):
        read = await service.request(
            "GET", address, "alice", headers=with_header("If-None-Match", value)
        )
        assert read.json()["error"] == message.replace("If-Match", "If-None-Match")


async def test_only_one_of_many_simultaneous_edits_of_a_version_succeeds(service: Service) -> None:
    task = await service.create("alice")
    headers = {**bearer("alice"), "If-Match": f'"{task["version"]}"'}

    async def edit(number: int) -> httpx2.Response:
        body = {"title": str(number)}
        path = f"/api/tasks/{task['id']}"
        return await service.client.put(path, headers=headers, json=body)

    answers = await asyncio.gather(*map(edit, range(20)))
    (won,) = [answer for answer in answers if answer.status_code == 200]
    assert [answer.status_code for answer in answers].count(412) == 19
    shown = await service.request("GET", f"/api/tasks/{task['id']}", "alice")
    assert shown.json() == won.json()
    assert {a.headers["etag"] for a in answers} == {f'"{shown.json()["version"]}"'}


async def test_merge_patch_is_accepted_by_patch_alone(service: Service) -> None:
    task = await service.create("alice", description="d")
    headers = {"Content-Type": "application/merge-patch+json"}
    path = f"/api/tasks/{task['id']}"
    body = b'{"description": null}'
    patched = await service.request("PATCH", path, "alice", headers=headers, content=body)
    assert (patched.status_code, patched.json()["description"]) == (200, None)
    assert (
        await service.request("PUT", path, "alice", headers=headers, content=body)
    ).status_code == 415
    empty = await service.request("PATCH", path, "alice", json={})
    assert empty.json()["code"] == "nothing_to_change"


@pytest.mark.parametrize("tasks", FAMILIES)
async def test_unchanged_task_is_not_sent_again(service: Service, tasks: str) -> None:
    task = await service.create("alice")
    path = f"{tasks}/{task['id']}"
    first = await service.request("GET", path, "alice")
    assert first.headers["cache-control"] == "private, no-cache"
    tag = first.headers["etag"]
    assert tag == f'"{task["version"]}"'
    for value in (tag, f"W/{tag}", f'"x", {tag}', "*"):
        again = await service.request(
            "GET", path, "alice", headers=with_header("If-None-Match", value)
        )
        assert (again.status_code, again.content) == (304, b"")
        assert again.headers["etag"] == tag
        assert again.headers["cache-control"] == "private, no-cache"
    await changed(service, task, "y")
    after = await service.request("GET", path, "alice", headers=with_header("If-None-Match", tag))
    assert after.status_code == 200


@pytest.mark.parametrize("tasks", FAMILIES)
async def test_unchanged_list_is_not_sent_again(service: Service, tasks: str) -> None:
    task = await service.create("alice")
    paths = (tasks, f"{tasks}?status=complete", f"{tasks}?sort=title")
    tags = [(await service.request("GET", path, "alice")).headers["etag"] for path in paths]
    for path, tag in zip(paths, tags, strict=True):
        for value in (tag, f"W/{tag}", f'"x", {tag}'):
            again = await service.request(
                "GET", path, "alice", headers=with_header("If-None-Match", value)
            )
            assert (again.status_code, again.content) == (304, b"")
            assert again.headers["etag"] == tag
    await changed(service, task, "y")
    for path, tag in zip(paths, tags, strict=True):
        fresh = await service.request(
            "GET", path, "alice", headers=with_header("If-None-Match", tag)
        )
        assert fresh.status_code == 200
        assert fresh.headers["etag"] != tag


@pytest.fixture
def locked_tasks(database_url: str) -> Iterator[Callable[[], object]]:
    """Return a function that locks the table `tasks`, even against readers, until the end."""
    with psycopg.connect(database_url) as connection:
        yield lambda: connection.execute("LOCK TABLE tasks")


async def test_refresh_of_what_is_unchanged_does_not_look_at_any_task(
    service: Service, locked_tasks: Callable[[], object]
) -> None:
    await service.create("alice")
    tag = (await service.request("GET", "/api/tasks", "alice")).headers["etag"]
    feed = await service.request("GET", "/api/tasks/changes", "alice")
    locked_tasks()
    for path in ("/api/tasks", "/api/tasks?limit=1"):
        headers = with_header("If-None-Match", tag)
        answer = await service.request("GET", path, "alice", headers=headers)
        assert answer.status_code == 304
    cursor = feed.json()["cursor"]
    poll = await service.request("GET", f"/api/tasks/changes?since={cursor}", "alice")
    assert poll.json() == {"changes": [], "cursor": cursor, "more": False}


async def test_refresh_shows_what_another_process_has_written(
    service: Service, database_url: str, tmp_path: Path
) -> None:
    first = await service.create("alice")
    tag = (await service.request("GET", "/api/tasks", "alice")).headers["etag"]
    cursor = (await service.request("GET", "/api/tasks/changes", "alice")).json()["cursor"]
    async with running_service(database_url, tmp_path) as other:
        second = await other.create("alice")
    headers = {**bearer("alice"), "If-None-Match": tag}
    fresh = await service.client.get("/api/tasks", headers=headers)
    assert fresh.json() == [second, first]
    news = await service.request("GET", f"/api/tasks/changes?since={cursor}", "alice")
    assert news.json()["changes"] == [{"task": second}]


async def test_any_of_several_tags_of_a_list_may_be_the_current_one(service: Service) -> None:
    tags = []
    for _ in range(2):
        await service.create("alice")
        tags.append((await service.request("GET", "/api/tasks", "alice")).headers["etag"])
    for sent in (tags, tags[::-1]):
        headers = with_header("If-None-Match", ", ".join(sent))
        answer = await service.request("GET", "/api/tasks", "alice", headers=headers)
        assert answer.status_code == 304


async def test_list_of_one_user_is_not_taken_for_another_users(service: Service) -> None:
    """One browser, two users, one URL."""
    tag = (await service.request("GET", "/api/tasks", "alice")).headers["etag"]
    bobs = await service.request("GET", "/api/tasks", "bob", headers={"If-None-Match": tag})
    assert bobs.status_code == 200
    assert bobs.headers["etag"] != tag


async def test_every_write_changes_the_tag_of_the_list(service: Service) -> None:
    tags = [(await service.request("GET", "/api/tasks", "alice")).headers["etag"]]
    task = await service.create("alice")
    for verb, tail, options in (*CHANGES[:2], ("PATCH", "/complete", {}), ("DELETE", "", {})):
        tags.append((await service.request("GET", "/api/tasks", "alice")).headers["etag"])
        await service.request(verb, f"/api/tasks/{task['id']}{tail}", "alice", **options)
    tags.append((await service.request("GET", "/api/tasks", "alice")).headers["etag"])
    assert len(set(tags)) == len(tags)
