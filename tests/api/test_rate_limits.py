"""Rate limits: requests of a user, and refused tokens from an address."""

import asyncio
import math
import re
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import httpx2
import psycopg
import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.listening import Listening, listening
from support.problems import problem
from support.service import ORIGIN, SECRET, Service, bearer, running_service, settings, token
from support.waiting import until
from support.watching import waiting
from todo_api import server
from todo_api.auth import rate_limits
from todo_api.auth.rate_limits import Buckets, RateLimits
from todo_api.errors import StartupError, TooManyRequests
from todo_api.settings import Settings

REFUSED = problem("too_many_requests", "Too many requests")
EVEN = [1, 2, 3, 4, 5, 6, 8, 10, 50, 60, 100, 600, 1000]
"""Quotas with a step of whole milliseconds, so that the model below is exact."""


class Clock:
    """A clock in whole milliseconds that moves only when a test moves it."""

    def __init__(self, milliseconds: int = 12_345_678) -> None:
        self.milliseconds = milliseconds

    def __call__(self) -> float:
        return self.milliseconds / 1000


# A bucket


@pytest.mark.parametrize("quota", [*EVEN, 7, 13, 997, 10_000])
@pytest.mark.parametrize("start", [0, 12_345_678, 987_654_321_987])
def test_bucket_holds_exactly_its_quota(quota: int, start: int) -> None:
    buckets = Buckets(quota, Clock(start))
    assert [buckets.take("a") for _ in range(quota)] == [
        (left, 0.0) for left in reversed(range(quota))
    ]
    left, wait = buckets.take("a")
    assert left == 0
    assert wait == pytest.approx(60 / quota, abs=1e-6)


@pytest.mark.parametrize("quota", [1, 7, 50, 1000])
def test_bucket_refills_within_a_minute_up_to_its_quota(quota: int) -> None:
    clock = Clock()
    buckets = Buckets(quota, clock)
    for pause in (60_000, 60_001, 3_600_000):
        assert [buckets.take("a")[1] > 0 for _ in range(quota + 1)] == [False] * quota + [True]
        clock.milliseconds += pause


@pytest.mark.parametrize("quota", EVEN)
def test_request_succeeds_exactly_when_its_wait_ends(quota: int) -> None:
    clock = Clock()
    buckets = Buckets(quota, clock)
    for _ in range(quota):
        buckets.take("a")
    clock.milliseconds += 60_000 // quota - 1
    assert buckets.take("a")[1] == pytest.approx(0.001)
    clock.milliseconds += 1
    assert buckets.take("a") == (0, 0.0)
    assert buckets.take("a")[1] > 0


def test_refused_request_does_not_use_the_quota() -> None:
    clock = Clock()
    buckets = Buckets(2, clock)
    for _ in range(1000):
        buckets.take("a")
    clock.milliseconds += 30_000
    assert buckets.take("a") == (0, 0.0)


def test_key_does_not_affect_another_key() -> None:
    buckets = Buckets(2, Clock())
    for _ in range(100):
        buckets.take("a")
    assert buckets.take("b") == (1, 0.0)
    assert buckets.take("A") == (1, 0.0)


class Model:
    """A simple token bucket. Its unit is the refill of one millisecond."""

    def __init__(self, quota: int) -> None:
        self._step = 60_000 // quota
        self._levels: dict[str, int] = {}

    def pass_time(self, milliseconds: int) -> None:
        self._levels = {
            key: min(level + milliseconds, 60_000) for key, level in self._levels.items()
        }

    def take(self, key: str) -> tuple[int, bool]:
        level = self._levels.get(key, 60_000)
        allowed = level >= self._step
        self._levels[key] = level - self._step if allowed else level
        return self._levels[key] // self._step, allowed


@given(
    quota=st.sampled_from(EVEN[:10]),
    start=st.integers(0, 10**9),
    actions=st.lists(
        st.one_of(st.sampled_from("abc"), st.integers(0, 70_000), st.sampled_from([1000, 30_000])),
        max_size=150,
    ),
)
def test_bucket_behaves_like_a_token_bucket(
    quota: int, start: int, actions: list[str | int]
) -> None:
    clock = Clock(start)
    buckets, model = Buckets(quota, clock), Model(quota)
    for action in actions:
        if isinstance(action, int):
            clock.milliseconds += action
            model.pass_time(action)
        else:
            left, wait = buckets.take(action)
            assert (left, wait == 0) == model.take(action)


def test_many_keys_need_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rate_limits, "MAXIMUM_KEYS", 1_000)
    buckets = Buckets(1, Clock())
    for number in range(1_500):
        buckets.take(str(number))
    assert len(buckets._full_at) <= 1_000


def test_limiter_forgets_the_least_recently_used_key_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rate_limits, "MAXIMUM_KEYS", 3)
    buckets = Buckets(1, Clock())
    for key in "abcad":  # the refused second `a` makes it the most recently used
        buckets.take(key)
    assert buckets.take("a")[1] > 0
    assert buckets.take("b")[1] == 0


def test_limiter_forgets_full_buckets() -> None:
    clock = Clock()
    buckets = Buckets(10, clock)
    for number in range(1000):
        buckets.take(str(number))
    clock.milliseconds += 6_000
    buckets.take("another")
    assert len(buckets._full_at) == 1


# A user's requests, counted in the memory of one process


@asynccontextmanager
async def limited(url: str, folder: Path, **values: Any) -> AsyncIterator[Service]:
    async with running_service(url, folder, **values) as service:
        yield service


@pytest.fixture
async def service(database_url: str, short_folder: Path) -> AsyncIterator[Service]:
    """The service, with three requests per user and two refused tokens per address."""
    values = {"rate_limit": 3, "rate_limit_failures": 2}
    async with running_service(database_url, short_folder, **values) as running:
        yield running


def left(answer: httpx2.Response) -> int:
    """Check the rate limit headers of an answer, and return the remaining quota."""
    assert answer.headers["ratelimit-policy"] == '"minute";q=3;w=60'
    found = re.fullmatch(r'"minute";r=(\d+);t=(\d+)', answer.headers["ratelimit"])
    assert found is not None
    return int(found[1])


def assert_is_refused(answer: httpx2.Response, seconds: int = 60) -> None:
    assert (answer.status_code, answer.json()) == (429, REFUSED)
    assert 1 <= int(answer.headers["retry-after"]) <= seconds
    assert answer.headers["content-type"] == "application/json"
    assert "x-request-id" in answer.headers


async def test_every_response_shows_the_remaining_quota(service: Service) -> None:
    listed = await service.request("GET", "/api/tasks", "alice")
    wrong = await service.request("POST", "/api/tasks", "alice", json={})
    missing = await service.request("GET", "/api/alice/tasks/1", "alice")
    answers = listed, wrong, missing
    assert [answer.status_code for answer in answers] == [200, 400, 404]
    assert [left(answer) for answer in answers] == [2, 1, 0]
    refused = await service.request("GET", "/api/tasks", "alice")
    assert_is_refused(refused, 20)
    assert left(refused) == 0
    assert refused.headers["ratelimit"].endswith(f";t={refused.headers['retry-after']}")
    assert service.wire.round_trips == 0


async def test_all_methods_and_paths_share_one_quota(service: Service) -> None:
    await service.request("HEAD", "/api/tasks", "alice")
    await service.request("POST", "/api/tasks", "alice", json={"title": "x"})
    await service.request("PATCH", "/api/alice/tasks/1/complete", "alice")
    for verb, path in (("DELETE", "/api/account"), ("DELETE", "/api/alice/tasks/1")):
        assert_is_refused(await service.request(verb, path, "alice"))
    listed = await service.request("GET", "/api/tasks", "bob")
    assert (listed.status_code, left(listed)) == (200, 2)


async def test_refused_write_does_not_store_a_task(
    service: Service, sql: psycopg.Connection
) -> None:
    statuses = [
        (await service.request("POST", "/api/tasks", "alice", json={"title": "x"})).status_code
        for _ in range(6)
    ]
    assert statuses == [201] * 3 + [429] * 3
    assert sql.execute("SELECT count(*) FROM tasks").fetchone() == (3,)


async def test_new_token_does_not_start_a_new_bucket(service: Service) -> None:
    for number in range(3):
        signed = {"Authorization": f"Bearer {token('alice', jti=number, email=f'{number}@x.org')}"}
        assert (await service.request("GET", "/api/tasks", headers=signed)).status_code == 200
    assert_is_refused(await service.request("GET", "/api/tasks", "alice"))
    assert (await service.request("GET", "/api/tasks", "Alice")).status_code == 200


async def test_page_can_read_the_rate_limit_headers(service: Service) -> None:
    headers = {"Origin": ORIGIN}
    for _ in range(4):
        answer = await service.request("GET", "/api/tasks", "alice", headers=headers)
        assert answer.headers["access-control-allow-origin"] == ORIGIN
        exposed = answer.headers["access-control-expose-headers"].split(", ")
        assert {"RateLimit", "RateLimit-Policy", "Retry-After"} <= set(exposed)
    assert_is_refused(answer)


async def test_401_and_403_come_before_429_and_do_not_use_the_quota(service: Service) -> None:
    for _ in range(5):
        assert (await service.request("GET", "/api/bob/tasks", "alice")).status_code == 403
        assert (await service.request("GET", "/api/tasks")).status_code == 401
        assert (await service.request("GET", "/api/nothing", "alice")).status_code == 404
        assert (await service.request("PATCH", "/api/tasks", "alice")).status_code == 405
    assert [
        (await service.request("GET", "/api/tasks", "alice")).status_code for _ in range(4)
    ] == [200, 200, 200, 429]
    forbidden = await service.request("GET", "/api/bob/tasks", "alice")
    assert (forbidden.status_code, "ratelimit" in forbidden.headers) == (403, False)
    assert (await service.request("GET", "/api/tasks")).status_code == 401
    expired = bearer("alice", exp=1)
    assert (await service.request("GET", "/api/tasks", headers=expired)).status_code == 401


async def test_path_spelling_does_not_bypass_the_quota(service: Service) -> None:
    paths = {
        "/api/tasks?status=all": 429,
        "/api/%61lice/tasks": 429,
        "/api/alice/tasks/": 404,
        "//api/tasks": 404,
        "/api//tasks": 404,
        "/%61pi/tasks": 404,
        "/api/tasks%00": 404,
    }
    for _ in range(3):
        await service.request("GET", "/api/tasks", "alice")
    for path, expected in paths.items():
        assert (await service.request("GET", path, "alice")).status_code == expected, path


async def test_response_has_no_rate_limit_headers_without_a_quota(
    database_url: str, short_folder: Path
) -> None:
    async with limited(database_url, short_folder) as service:
        answer = await service.request("GET", "/api/tasks", "alice")
    assert not {"ratelimit", "ratelimit-policy"} & set(answer.headers)


# Refused tokens


async def test_address_gets_429_after_too_many_bad_tokens(service: Service) -> None:
    bad = {"Authorization": "Bearer nonsense"}
    answers = [await service.request("GET", "/api/tasks", headers=bad) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [401, 401, 429]
    assert_is_refused(answers[2], 30)
    assert (await service.request("GET", "/api/tasks", "alice")).status_code == 200
    assert (await service.request("GET", "/api/tasks")).status_code == 401
    assert (await service.request("GET", "/livez")).status_code == 200


async def test_429_does_not_depend_on_the_token(service: Service) -> None:
    """All wrong tokens get the same answer."""
    bad = {"Authorization": "Bearer nonsense"}
    for _ in range(2):
        await service.request("GET", "/api/tasks", headers=bad)
    sent = [bad, bearer("alice", exp=1), bearer("nobody", exp=1), bearer("alice", sub="")]
    answers = [await service.request("GET", "/api/tasks", headers=each) for each in sent]
    seen = {
        (answer.status_code, answer.content, tuple(sorted(set(answer.headers) - {"date"})))
        for answer in answers
    }
    assert len(seen) == 1


def fails(limits: RateLimits, address: str) -> bool:
    """Return whether one more refused token from this address gets 429."""
    try:
        limits.count_failure(address)
    except TooManyRequests:
        return True
    return False


@pytest.mark.parametrize(
    ("first", "second", "is_one"),
    [
        ("192.0.2.1", "192.0.2.1", True),
        ("192.0.2.1", "192.0.2.2", False),
        ("2001:db8::1", "2001:db8::ffff:1", True),
        ("2001:db8::1", "2001:DB8:0::2", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("fe80::1%eth0", "fe80::2%eth0", True),
        # A listener on :: sees IPv4 in this form. The /64 rule would make all of it one subscriber.
        ("::ffff:192.0.2.1", "::ffff:192.0.2.2", False),
        ("::ffff:192.0.2.1", "192.0.2.1", True),
        ("unknown", "unknown", True),
        ("unknown", "other", False),
    ],
)
def test_addresses_of_one_subscriber_share_a_limit(first: str, second: str, is_one: bool) -> None:
    limits = RateLimits(settings(rate_limit_failures=1))
    assert not fails(limits, first)
    assert fails(limits, second) == is_one


def test_limiter_does_not_limit_requests_without_an_address() -> None:
    limits = RateLimits(settings(rate_limit_failures=1))
    for _ in range(3):
        limits.count_failure(None)


async def statuses(service: Listening, *forwarded: str) -> list[int]:
    """Send a bad token with each value of X-Forwarded-For, and return the statuses."""
    answers = []
    for value in forwarded:
        headers = {"Authorization": "Bearer nonsense", "X-Forwarded-For": value}
        answers.append(await service.client.get("/api/tasks", headers=headers))
    return [answer.status_code for answer in answers]


@pytest.mark.parametrize("proxies", [(), ("10.0.0.0/8",), ("::1", "127.0.0.2")])
async def test_untrusted_client_cannot_choose_its_address(
    database_url: str, proxies: tuple[str, ...]
) -> None:
    values = {"rate_limit_failures": 1, "trusted_proxies": proxies}
    async with listening(database_url, **values) as service:
        assert await statuses(service, "192.0.2.1", "192.0.2.2", "127.0.0.1") == [401, 429, 429]


@pytest.mark.parametrize("proxies", [("127.0.0.1",), ("10.0.0.0/8", "127.0.0.0/8")])
async def test_trusted_proxy_can_name_the_client_address(
    database_url: str, proxies: tuple[str, ...]
) -> None:
    values = {"rate_limit_failures": 1, "trusted_proxies": proxies}
    async with listening(database_url, **values) as service:
        assert await statuses(service, "192.0.2.1", "192.0.2.2", "192.0.2.1") == [401, 401, 429]
        # The client's own value is on the left, and the proxy adds the address on the right.
        forged = [f"198.51.100.{number}, 192.0.2.3" for number in range(3)]
        assert await statuses(service, *forged) == [401, 429, 429]
        assert await statuses(service, "2001:db8::1", "2001:db8::2") == [401, 429]
        assert await statuses(service, "[2001:db8:1::1]:443", "192.0.2.4:80") == [401, 401]
        odd = ["", "unknown", "a" * 5000, ", ,", "%s%n", "-1:99999999999999"]
        assert set(await statuses(service, *odd)) <= {401, 429}


def test_settings_read_trusted_proxies_from_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("BETTER_AUTH_SECRET", SECRET)
    monkeypatch.setenv("TRUSTED_PROXIES", "10.0.0.0/8, ::1")
    assert Settings.load().trusted_proxies == (ip_network("10.0.0.0/8"), ip_network("::1"))
    for wrong in ("*", "proxy.example", "10.0.0.1/8", "10.0.0.0/8;::1"):
        monkeypatch.setenv("TRUSTED_PROXIES", wrong)
        with pytest.raises(StartupError, match=r"^TRUSTED_PROXIES: must be addresses or networks"):
            Settings.load()


# A user's requests, counted by PostgreSQL

QUOTA = 50


@pytest.fixture(params=[True, False], ids=["row_security", "no_row_security"])
def shared(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Settings with which PostgreSQL counts, for fifty requests."""
    return {
        "rate_limit": QUOTA,
        "rate_limit_store": "postgresql",
        "row_security": request.param,
        "pool_timeout": 30,
        "lock_timeout": 30,
    }


async def test_failed_batch_counts(
    shared: dict[str, Any], database_url: str, short_folder: Path
) -> None:
    """Although its transaction, with the count, is rolled back."""
    bodies = [
        {"operations": [{"op": "delete", "id": 10**12}]},
        {"operations": [{"op": "complete", "id": 10**12, "if_match": 1}]},
    ]
    settings = {**shared, "rate_limit": 4}
    async with running_service(database_url, short_folder, **settings) as service:
        statuses = [
            (await service.client.post("/api/tasks/batch", json=body, headers=bearer("alice")))
            for body in bodies * 3
        ]
    assert [each.status_code for each in statuses] == [404] * 4 + [429] * 2


WRITES: list[tuple[str, str, Any]] = [("POST", "/api/tasks", {"title": "new"})]
EVERYTHING: list[tuple[str, str, Any]] = [
    ("GET", "/api/alice/tasks", None),
    ("POST", "/api/alice/tasks", {"title": "new"}),
    ("PATCH", "/api/tasks/1/complete", None),
    ("GET", "/api/tasks/1", None),
    ("PUT", "/api/tasks/1", {"title": "y"}),
]


@pytest.mark.parametrize("requests", [WRITES, EVERYTHING], ids=["writes", "everything"])
async def test_quota_is_exact_across_processes(
    shared: dict[str, Any],
    database_url: str,
    sql: psycopg.Connection,
    requests: list[tuple[str, str, Any]],
) -> None:
    """Of two hundred concurrent requests, fifty pass, plus those refilled meanwhile."""
    async with (
        listening(database_url, **shared) as first,
        listening(database_url, **shared) as second,
    ):
        started = time.monotonic()
        await first.create("alice")
        asked = [requests[number // 2 % len(requests)] for number in range(200)]
        answers = await asyncio.gather(
            *(
                (first, second)[number % 2].request(verb, path, "alice", json=body)
                for number, (verb, path, body) in enumerate(asked)
            )
        )
        came_back = math.ceil((time.monotonic() - started) * QUOTA / 60)
    seen = Counter(answer.status_code for answer in answers)
    passed = seen[200] + seen[201] + 1
    assert passed + seen[429] == 201
    assert QUOTA <= passed <= QUOTA + came_back
    stored = sql.execute("SELECT count(*) FROM tasks WHERE title = 'new'").fetchone()
    assert stored == (seen[201],)


async def test_refusal_of_the_shared_quota_has_the_error_shape(
    shared: dict[str, Any], database_url: str
) -> None:
    async with listening(database_url, **{**shared, "rate_limit": 2}) as service:
        answers = [await service.request("GET", "/api/tasks", "alice") for _ in range(3)]
        assert [answer.status_code for answer in answers] == [200, 200, 429]
        for answer in answers:
            assert answer.headers["ratelimit-policy"] == '"minute";q=2;w=60'
        assert_is_refused(answers[2], 30)
        assert (await service.request("GET", "/api/tasks", "bob")).status_code == 200
        assert (await service.request("GET", "/api/bob/tasks", "alice")).status_code == 403
        assert (await service.request("GET", "/api/tasks")).status_code == 401


async def test_shared_quota_does_not_add_a_round_trip(
    shared: dict[str, Any], database_url: str, short_folder: Path
) -> None:
    async with limited(database_url, short_folder, **{**shared, "rate_limit": 4}) as service:
        for verb, path, body in (
            ("POST", "/api/tasks", {"title": "x"}),
            ("GET", "/api/tasks/1", None),
            ("PUT", "/api/tasks/1", {"title": "y"}),
            ("GET", "/api/tasks/9", None),
            ("DELETE", "/api/tasks/1", None),  # refused
        ):
            answer = await service.request(verb, path, "alice", json=body)
            assert service.wire.round_trips == 1
    assert answer.status_code == 429


async def test_write_that_finds_no_task_counts_once(
    database_url: str, short_folder: Path, shared: dict[str, Any]
) -> None:
    """The service asks the database a second time for the reason."""
    async with limited(database_url, short_folder, **{**shared, "rate_limit": 3}) as service:
        answers = [await service.request("DELETE", "/api/tasks/1", "alice") for _ in range(4)]
    assert [answer.status_code for answer in answers] == [404, 404, 404, 429]


async def test_shared_quota_refills(
    shared: dict[str, Any], database_url: str, sql: psycopg.Connection
) -> None:
    async with listening(database_url, **{**shared, "rate_limit": 2}) as service:

        async def ask() -> int:
            return (await service.request("GET", "/api/tasks", "alice")).status_code

        assert [await ask() for _ in range(4)] == [200, 200, 429, 429]
        sql.execute("UPDATE rate_limits SET full_at = full_at - interval '30 s'")
        assert [await ask() for _ in range(2)] == [200, 429]
        sql.execute("UPDATE rate_limits SET full_at = full_at - interval '1 hour'")
        assert [await ask() for _ in range(3)] == [200, 200, 429]


async def test_probes_and_starts_do_not_use_a_quota(
    shared: dict[str, Any], database_url: str, sql: psycopg.Connection
) -> None:
    for _ in range(3):
        async with listening(database_url, **{**shared, "rate_limit": 1}) as service:
            assert (await service.request("GET", "/readyz")).status_code == 200
    assert sql.execute("SELECT count(*) FROM rate_limits").fetchone() == (0,)


async def test_locked_bucket_does_not_delay_other_users(
    shared: dict[str, Any], database_url: str, sql: psycopg.Connection
) -> None:
    async with listening(database_url, **shared) as service:
        await service.create("alice")
        with psycopg.connect(sql.info.dsn) as holder:
            holder.execute("SELECT FROM rate_limits FOR UPDATE")
            waits = asyncio.create_task(service.request("GET", "/api/tasks", "alice"))
            await until(lambda: waiting(sql) == 1)
            for user in ("bob", "carol"):
                assert (await service.request("GET", "/api/tasks", user)).status_code == 200
            holder.rollback()
        assert (await waits).status_code == 200


@pytest.fixture
def _little_buffered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the server's sockets a small send buffer."""
    listener = server.listener

    def small(given: Settings) -> Any:
        made = listener(given)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        return made

    monkeypatch.setattr(server, "listener", small)


@pytest.fixture
def long_list(sql: psycopg.Connection) -> str:
    """A user with a list of several batches."""
    sql.execute("INSERT INTO users (id, version) VALUES ('alice', 1)")
    sql.execute(
        "INSERT INTO tasks (user_id, title, description, version)"
        " SELECT 'alice', 'x', repeat('y', 4000), 1 FROM generate_series(1, 3000)"
    )
    return "alice"


@pytest.mark.usefixtures("_little_buffered")
async def test_slow_reader_of_a_list_does_not_delay_other_requests(
    shared: dict[str, Any], database_url: str, long_list: str
) -> None:
    """Neither the user's own requests nor those of others wait for the slow reader."""
    values = {**shared, "lock_timeout": 3, "pool_timeout": 0.5, "pool_size": 4}
    async with listening(database_url, **values) as service:
        with closing(await unread_list(service, long_list)):
            answers = await asyncio.gather(
                *(service.request("GET", "/api/tasks/1", long_list) for _ in range(6)),
                *(service.request("GET", "/api/tasks", "bob") for _ in range(6)),
            )
    assert Counter(answer.status_code for answer in answers) == {200: 12}


async def unread_list(service: Listening, user: str) -> socket.socket:
    """Request a list, and read only the first line of the answer."""
    loop = asyncio.get_running_loop()
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.setblocking(False)
    await loop.sock_connect(client, ("127.0.0.1", service.client.base_url.port))
    signed = "".join(f"{name}: {value}\r\n" for name, value in bearer(user).items())
    request = f"GET /api/tasks HTTP/1.1\r\nHost: x\r\n{signed}\r\n"
    await loop.sock_sendall(client, request.encode())
    assert await loop.sock_recv(client, 15) == b"HTTP/1.1 200 OK"
    return client


async def test_shared_quota_recovers_after_the_clock_was_ahead(
    shared: dict[str, Any], database_url: str, sql: psycopg.Connection
) -> None:
    """`full_at` is more than a minute ahead only if the clock was set back."""
    async with listening(database_url, **{**shared, "rate_limit": 60}) as service:
        await service.create("alice")
        sql.execute("UPDATE rate_limits SET full_at = full_at + interval '1 day'")
        assert (await service.request("GET", "/api/tasks", "alice")).status_code == 200
        stored = sql.execute("SELECT full_at < now() + interval '3 s' FROM rate_limits").fetchone()
        assert stored == (True,)
