"""Erasure: all data of a user is deleted, and older tokens cannot bring it back."""

import asyncio
import time
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx2
import psycopg
import pytest
from pydantic import SecretStr
from structlog.testing import capture_logs

from support.problems import problem
from support.publisher import Publisher
from support.service import SECRET, Service, bearer, running_service, settings, token
from support.waiting import until, waiting_for_locks
from todo_api.app import create_app
from todo_api.auth.tokens import LEEWAY
from todo_api.tasks import statements

ACCOUNTS = pytest.mark.parametrize("account", ["/api/account", "/api/alice/account"])
WRITES: list[tuple[str, str, dict[str, Any] | None]] = [
    ("POST", "/api/tasks", {"title": "x"}),
    ("PUT", "/api/tasks/1", {"title": "x"}),
    ("PATCH", "/api/tasks/1/complete", None),
    ("PATCH", "/api/alice/tasks/1/complete", {"completed": True}),
    ("DELETE", "/api/tasks/1", None),
]

NOTHING: dict[str, list[Any]] = {"users": [], "tasks": [], "tombstones": []}


def everything(sql: psycopg.Connection) -> dict[str, list[Any]]:
    return {
        table: sql.execute(f"SELECT * FROM {table}").fetchall()  # noqa: S608
        for table in ("users", "tasks", "tombstones")
    }


@ACCOUNTS
async def test_erasure_deletes_only_that_user(
    service: Service, sql: psycopg.Connection, account: str
) -> None:
    bobs = await service.create("bob")
    await service.request("DELETE", f"/api/tasks/{bobs['id']}", "bob")
    await service.create("bob")
    before = everything(sql)
    for _ in range(3):
        await service.create("alice")
    deleted = await service.create("alice")
    await service.request("DELETE", f"/api/tasks/{deleted['id']}", "alice")
    for _ in range(2):
        gone = await service.request("DELETE", account, "alice")
        assert (gone.status_code, gone.content) == (204, b"")
        assert everything(sql) == before
    erasures = sql.execute(
        "SELECT encode(user_hash, 'hex'), tokens_from <= now() + interval '10 s' FROM erasures"
    )
    assert erasures.fetchall() == [
        ("2bd806c97f0e00af1a1fc3328fa763a9269723c8db8fac4f93af71db186d6e90", True)
    ]


async def test_user_without_data_can_erase_their_account(
    service: Service, sql: psycopg.Connection
) -> None:
    assert (await service.request("DELETE", "/api/account", "alice")).status_code == 204
    created = await service.client.post("/api/tasks", headers=bearer("alice"), json={"title": "x"})
    assert created.status_code == 401
    assert everything(sql) == NOTHING


@pytest.mark.parametrize(("verb", "path", "body"), WRITES)
@pytest.mark.parametrize("claims", [{}, {"iat": None}, {"iat": int(time.time()) - 300}])
async def test_token_from_before_the_erasure_cannot_write(
    service: Service,
    sql: psycopg.Connection,
    verb: str,
    path: str,
    body: dict[str, Any] | None,
    claims: dict[str, Any],
) -> None:
    old = bearer("alice", **claims)
    await service.create("alice")
    await service.request("DELETE", "/api/account", headers=old)
    after = everything(sql)
    refused = await service.client.request(verb, path, headers=old, json=body)
    assert refused.status_code == 401
    assert refused.json() == problem("token_invalid", "A valid bearer token is required")
    assert refused.headers["www-authenticate"] == 'Bearer error="invalid_token"'
    assert everything(sql) == after == NOTHING
    reading = await service.request("GET", "/api/tasks", headers=old)
    assert (reading.status_code, reading.json()) == (200, [])


async def test_token_from_after_the_erasure_starts_a_new_account(
    service: Service, sql: psycopg.Connection
) -> None:
    await service.request("DELETE", "/api/account", "alice")
    sql.execute("UPDATE erasures SET tokens_from = now() - interval '2 seconds'")
    await service.create("alice")
    old = bearer("alice", iat=int(time.time()) - 60)
    kept = await service.request("DELETE", "/api/account", headers=old)
    assert kept.status_code == 204
    assert len(everything(sql)["tasks"]) == 1, "an old token erased tasks that are newer than it"


async def test_first_token_that_can_write_is_of_the_stored_second(
    service: Service, sql: psycopg.Connection
) -> None:
    await service.request("DELETE", "/api/account", "alice")
    now = int(time.time())
    sql.execute("UPDATE erasures SET tokens_from = to_timestamp(%s)", [now])
    for issued_at, status in ((now - 1, 401), (now, 201)):
        headers = bearer("alice", iat=issued_at)
        created = await service.client.post("/api/tasks", headers=headers, json={"title": "x"})
        assert created.status_code == status


def tokens_from(sql: psycopg.Connection) -> float:
    """Return the time of issue from which a token of the one erased user can write."""
    ((stored,),) = sql.execute("SELECT extract(epoch FROM tokens_from) FROM erasures").fetchall()
    return float(stored)


async def erase(service: Service, by: str) -> None:
    headers = {"Authorization": f"Bearer {by}"}
    assert (await service.request("DELETE", "/api/account", headers=headers)).status_code == 204


async def test_issuer_whose_clock_is_unknown_may_be_ahead_by_the_leeway(
    service: Service, sql: psycopg.Connection
) -> None:
    """Nothing tells the time of the machine that signs with the shared secret."""
    before = time.time()
    await erase(service, token("alice"))
    assert before + LEEWAY <= tokens_from(sql) <= time.time() + LEEWAY


@pytest.mark.parametrize(
    ("offset", "least", "most"),
    [
        *((0, 0, 1), (3, 3, 4), (-3, -3, -2)),
        *((100, LEEWAY, LEEWAY), (-100, -LEEWAY, -LEEWAY), (None, LEEWAY, LEEWAY)),
    ],
)
async def test_wait_is_as_short_as_the_issuers_clock_allows(
    database_url: str,
    short_folder: Path,
    sql: psycopg.Connection,
    offset: float | None,
    least: float,
    most: float,
) -> None:
    """The key set's `Date` has whole seconds, so the issuer's clock is known to one second."""
    async with Publisher() as publisher:
        publisher.clock_offset = offset
        started = time.time()
        async with running_service(
            database_url, short_folder, better_auth_url=publisher.url
        ) as service:
            old = publisher.token("alice", iat=int(started) - 600)
            before = time.time()
            await erase(service, old)
            after = time.time()
    fetching = after - started
    assert before + least <= tokens_from(sql) <= after + most + fetching


async def test_clock_of_another_host_than_the_issuer_says_nothing(
    database_url: str, short_folder: Path, sql: psycopg.Connection
) -> None:
    issuer = "https://app.example"
    async with Publisher() as publisher:
        keys = {
            "better_auth_url": issuer,
            "better_auth_jwks_url": f"{publisher.url}/api/auth/jwks",
        }
        async with running_service(database_url, short_folder, **keys) as service:
            before = time.time()
            await erase(service, publisher.token("alice", iss=issuer, aud=issuer))
            assert tokens_from(sql) >= before + LEEWAY


async def test_development_mode_signs_with_its_own_clock(
    database_url: str, sql: psycopg.Connection
) -> None:
    development = settings(better_auth_secret=None).with_own_secret(SecretStr(SECRET))
    app = create_app(development, database_url)
    transport = httpx2.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx2.AsyncClient(transport=transport, base_url="http://test") as client,
    ):
        old = bearer("alice", iat=int(time.time()) - 600)
        before = time.time()
        assert (await client.delete("/api/account", headers=old)).status_code == 204
        assert before - 1e-6 <= tokens_from(sql) <= time.time()


@pytest.mark.parametrize(("verb", "path", "body"), WRITES)
@pytest.mark.parametrize(
    ("issued_at", "received"), [(1_700_000_000, "2023-11-14T22:13:20.000Z"), (None, "none")]
)
async def test_log_says_that_the_token_is_from_before_the_erasure(
    service: Service,
    sql: psycopg.Connection,
    verb: str,
    path: str,
    body: dict[str, Any] | None,
    issued_at: int | None,
    received: str,
) -> None:
    await service.request("DELETE", "/api/account", "alice")
    sql.execute("UPDATE erasures SET tokens_from = '2026-01-02T03:04:05.678901Z'")
    with capture_logs() as lines:
        headers = bearer("alice", iat=issued_at)
        await service.client.request(verb, path, headers=headers, json=body)
    (line,) = lines
    assert (line["status"], line["error"]) == (401, "AccountErased")
    assert line["reason"] == (
        "iat: expected at least 2026-01-02T03:04:05.678901Z, because the account was erased, "
        f"received {received}"
    )


async def test_erasure_keeps_void_tokens_void_after_the_clock_was_set_back(
    service: Service, sql: psycopg.Connection
) -> None:
    """The erasing statement finds an older mark with a time in the future."""
    await service.request("DELETE", "/api/account", "alice")
    await service.request("DELETE", "/api/account", "bob")
    sql.execute("UPDATE erasures SET tokens_from = now() + interval '1 hour'")
    before = sql.execute("SELECT user_hash, tokens_from FROM erasures ORDER BY 1").fetchall()
    sql.execute("INSERT INTO users (id, version) VALUES ('alice', 1)")
    remember = next(
        each for each in statements.erase_owner().first if each.name == b"remember_erasure"
    )
    values = {
        "owner": "alice",
        "owner_hash": sha256(b"alice").digest(),
        "tokens_from": 0.0,
        "issuer_ahead": 0.0,
    }
    given = [values[name] for name in remember.parameters]
    psycopg.RawCursor(sql).execute(remember.sql, given)
    assert (
        sql.execute("SELECT user_hash, tokens_from FROM erasures ORDER BY 1").fetchall() == before
    )


async def test_erasure_voids_its_own_token_even_if_the_issuers_clock_is_ahead(
    database_url: str, short_folder: Path, sql: psycopg.Connection
) -> None:
    """Also if the key set comes from a machine with another clock than the one that signs."""
    async with (
        Publisher() as publisher,
        running_service(database_url, short_folder, better_auth_url=publisher.url) as service,
    ):
        issued_at = int(time.time()) + 9
        ahead = publisher.token("alice", iat=issued_at)
        await erase(service, ahead)
        assert tokens_from(sql) == issued_at + 1
        headers = {"Authorization": f"Bearer {ahead}"}
        created = await service.client.post("/api/tasks", headers=headers, json={"title": "x"})
        assert created.status_code == 401


async def test_user_cannot_erase_another_account(service: Service, sql: psycopg.Connection) -> None:
    await service.create("alice")
    before = everything(sql)
    assert (await service.request("DELETE", "/api/alice/account", "bob")).status_code == 403
    assert (await service.request("DELETE", "/api/account")).status_code == 401
    assert everything(sql) == before


async def test_erasure_waits_for_a_running_write_and_deletes_its_task(
    service: Service, sql: psycopg.Connection, database_url: str
) -> None:
    """A lock delays the first write of a user, and then they erase their account."""
    with psycopg.connect(database_url) as holder:
        holder.execute("LOCK TABLE tasks IN SHARE MODE")
        write = asyncio.create_task(
            service.client.post("/api/tasks", headers=bearer("alice"), json={"title": "x"})
        )
        await until(lambda: waiting_for_locks(sql) == 1)
        erasure = asyncio.create_task(
            service.client.delete("/api/account", headers=bearer("alice"))
        )
        await until(lambda: waiting_for_locks(sql) == 2)
        holder.rollback()
    assert (await write).status_code == 201
    assert (await erasure).status_code == 204
    assert everything(sql) == NOTHING


async def test_write_gets_401_after_waiting_for_an_erasure(
    service: Service, sql: psycopg.Connection, database_url: str
) -> None:
    await service.create("alice")
    with psycopg.connect(database_url) as holder:
        holder.execute("SELECT FROM users WHERE id = 'alice' FOR UPDATE")
        erasure = asyncio.create_task(
            service.client.delete("/api/account", headers=bearer("alice"))
        )
        await until(lambda: waiting_for_locks(sql) == 1)
        write = asyncio.create_task(
            service.client.post("/api/tasks", headers=bearer("alice"), json={"title": "x"})
        )
        await until(lambda: waiting_for_locks(sql) == 2)
        holder.rollback()
    assert (await erasure).status_code == 204
    assert (await write).status_code == 401
    assert everything(sql) == NOTHING


async def test_racing_writes_and_erasures_leave_no_rows(
    service: Service, sql: psycopg.Connection
) -> None:
    for number in range(30):
        user = bearer(f"user {number}")
        writes = [
            service.client.post("/api/tasks", headers=user, json={"title": "x"}) for _ in range(3)
        ]
        erasure = service.client.delete("/api/account", headers=user)
        answers = await asyncio.gather(writes[0], erasure, *writes[1:])
        assert {answer.status_code for answer in answers} <= {201, 204, 401}
    assert everything(sql) == NOTHING
