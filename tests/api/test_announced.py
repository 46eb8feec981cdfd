"""Every header field that the API description announces is acted on, as a client would."""

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from support.service import ORIGIN, Service, bearer, running_service
from todo_api.http.openapi import HEADERS

QUOTA = 60
TASKS = "/api/tasks"
GET_PATHS = (TASKS, f"{TASKS}?limit=1", f"{TASKS}/changes", "/api/alice/tasks", "/health")


@pytest.fixture
async def service(database_url: str, short_folder: Path) -> AsyncIterator[Service]:
    """The service with a limit of one request per second, after the first sixty."""
    async with running_service(
        database_url, short_folder, rate_limit=QUOTA, cors_origins=[ORIGIN]
    ) as running:
        yield running


async def repeat_the_request_id(service: Service) -> None:
    answer = await service.request("GET", TASKS, "alice", headers={"X-Request-ID": "mine-1"})
    assert answer.headers["x-request-id"] == "mine-1"
    assert (await service.request("GET", TASKS)).headers["x-request-id"]


async def keep_what_may_be_kept(service: Service) -> None:
    task = await service.create("alice")
    for path in (*GET_PATHS, f"{TASKS}/{task['id']}"):
        answer = await service.request("GET", path, "alice")
        may_be_kept = answer.headers["cache-control"] == "private, no-cache"
        assert may_be_kept == ("etag" in answer.headers)
        assert may_be_kept or answer.headers["cache-control"] == "no-store"
        headers = {"If-None-Match": answer.headers.get("etag", '"1"')}
        again = await service.request("GET", path, "alice", headers=headers)
        assert again.status_code == (304 if may_be_kept else 200)
        assert again.headers["cache-control"] == answer.headers["cache-control"]


async def send_the_tag_back(service: Service) -> None:
    task = await service.create("alice")
    path = f"{TASKS}/{task['id']}"
    old = (await service.request("GET", path, "alice")).headers["etag"]
    changed = await service.request(
        "PUT", path, "alice", headers={"If-Match": old}, json={"title": "x"}
    )
    refused = await service.request(
        "PUT", path, "alice", headers={"If-Match": old}, json={"title": "y"}
    )
    assert (changed.status_code, refused.status_code) == (200, 412)
    assert refused.headers["etag"] == changed.headers["etag"] != old
    headers = {"If-None-Match": refused.headers["etag"]}
    assert (await service.request("GET", path, "alice", headers=headers)).status_code == 304


async def follow_the_link(service: Service) -> None:
    first, second = [await service.create("alice", title=title) for title in "ab"]
    page = await service.request("GET", f"{TASKS}?limit=1", "alice")
    link = re.fullmatch(r'<(.*)>; rel="next"', page.headers["link"])
    assert link
    following = await service.request("GET", link[1], "alice")
    assert [page.json(), following.json()] == [[second], [first]]
    assert "link" not in following.headers


async def count_the_tasks(service: Service) -> None:
    for _ in range(3):
        await service.create("alice")
    page = await service.request("GET", f"{TASKS}?limit=1&count=true", "alice")
    everything = await service.request("GET", TASKS, "alice")
    assert page.headers["x-total-count"] == str(len(everything.json())) == "3"


async def repeat_the_creation(service: Service) -> None:
    headers, body = {"Idempotency-Key": "a-key"}, {"title": "once"}
    first = await service.request("POST", TASKS, "alice", headers=headers, json=body)
    again = await service.request("POST", TASKS, "alice", headers=headers, json=body)
    assert "idempotency-replayed" not in first.headers
    assert (again.headers["idempotency-replayed"], again.json()) == ("true", first.json())
    assert (await service.request("GET", TASKS, "alice")).json() == [first.json()]


async def vary_the_request(service: Service) -> None:
    plain = await service.request("GET", TASKS, "alice")
    from_page = await service.request("GET", TASKS, "alice", headers={"Origin": ORIGIN})
    assert "access-control-allow-origin" not in plain.headers
    assert from_page.headers["access-control-allow-origin"] == ORIGIN
    assert plain.headers["vary"] == from_page.headers["vary"] == "Origin"


async def read_the_declared_type(service: Service) -> None:
    for path in GET_PATHS:
        answer = await service.request("GET", path, "alice")
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["content-type"] == "application/json"
        answer.json()


async def use_up_the_quota(service: Service) -> None:
    """As many requests as announced succeed, and after the announced time the next one."""
    answer = await service.request("GET", TASKS, "alice")
    assert answer.headers["ratelimit-policy"] == f'"minute";q={QUOTA};w=60'
    while answer.status_code == 200:
        remaining = int(re.findall(r";r=(\d+)", answer.headers["ratelimit"])[0])
        answer = await service.request("GET", TASKS, "alice")
    refused = answer
    assert (refused.status_code, remaining) == (429, 0)
    assert refused.headers["ratelimit"].endswith(f";t={refused.headers['retry-after']}")
    await asyncio.sleep(int(refused.headers["retry-after"]))
    assert (await service.request("GET", TASKS, "alice")).status_code == 200


async def visit_the_location(service: Service) -> None:
    for path in (TASKS, "/api/alice/tasks"):
        made = await service.request("POST", path, "alice", json={"title": "x"})
        assert made.headers["location"].startswith(f"{path}/")
        found = await service.request("GET", made.headers["location"], "alice")
        assert found.json() == made.json()


async def use_an_allowed_method(service: Service) -> None:
    for path in (TASKS, f"{TASKS}/1", f"{TASKS}/1/complete", "/api/account", "/health"):
        refused = await service.request("TRACE", path, "alice")
        assert refused.status_code == 405
        for verb in refused.headers["allow"].split(", "):
            assert (await service.request(verb, path, "alice")).status_code != 405


async def send_the_accepted_type(service: Service) -> None:
    headers = {"Content-Type": "text/plain"}
    refused = await service.request("POST", TASKS, "alice", headers=headers, content=b"{}")
    assert refused.status_code == 415
    headers = {"Content-Type": refused.headers["accept"]}
    body = b'{"title": "x"}'
    made = await service.request("POST", TASKS, "alice", headers=headers, content=body)
    assert made.status_code == 201


async def sign_in(service: Service) -> None:
    missing = await service.request("GET", TASKS)
    assert (missing.status_code, missing.headers["www-authenticate"]) == (401, "Bearer")
    wrong = await service.request("GET", TASKS, headers={"Authorization": "Bearer x"})
    assert wrong.headers["www-authenticate"] == 'Bearer error="invalid_token"'
    scheme = missing.headers["www-authenticate"]
    credentials = bearer("alice")["Authorization"].split()[1]
    headers = {"Authorization": f"{scheme} {credentials}"}
    assert (await service.request("GET", TASKS, headers=headers)).status_code == 200


ACTS: dict[str, Callable[[Service], Awaitable[Any]]] = {
    "X-Request-ID": repeat_the_request_id,
    "Cache-Control": keep_what_may_be_kept,
    "ETag": send_the_tag_back,
    "Link": follow_the_link,
    "X-Total-Count": count_the_tasks,
    "Idempotency-Replayed": repeat_the_creation,
    "Vary": vary_the_request,
    "X-Content-Type-Options": read_the_declared_type,
    "RateLimit-Policy": use_up_the_quota,
    "RateLimit": use_up_the_quota,
    "Retry-After": use_up_the_quota,
    "Location": visit_the_location,
    "Allow": use_an_allowed_method,
    "Accept": send_the_accepted_type,
    "WWW-Authenticate": sign_in,
}


def test_every_announced_field_is_acted_on() -> None:
    assert {*ACTS} == {*HEADERS}


@pytest.mark.parametrize("act", dict.fromkeys(ACTS.values()), ids=lambda act: act.__name__)
async def test_client_can_act_on_what_is_announced(
    service: Service, act: Callable[[Service], Awaitable[Any]]
) -> None:
    await act(service)
