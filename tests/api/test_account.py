"""Erasure: all data of a user is deleted, and older tokens cannot bring it back."""

import asyncio
import time
from hashlib import sha256
from typing import Any

import psycopg
import pytest

from support.problems import problem
from support.service import Service, bearer
from support.waiting import until, waiting_for_locks
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
    erasures = sql.execute("SELECT encode(user_hash, 'hex'), erased_at <= now() FROM erasures")
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
    sql.execute("UPDATE erasures SET erased_at = now() - interval '12 seconds'")
    await service.create("alice")
    old = bearer("alice", iat=int(time.time()) - 60)
    kept = await service.request("DELETE", "/api/account", headers=old)
    assert kept.status_code == 204
    assert len(everything(sql)["tasks"]) == 1, "an old token erased tasks that are newer than it"


async def test_erasure_voids_tokens_issued_up_to_ten_seconds_later(
    service: Service, sql: psycopg.Connection
) -> None:
    await service.request("DELETE", "/api/account", "alice")
    for seconds, status in ((9, 401), (-9, 401), (11, 201)):
        moment = f"now() - interval '{seconds} seconds'"
        sql.execute(f"UPDATE erasures SET erased_at = {moment}")  # noqa: S608
        created = await service.client.post(
            "/api/tasks", headers=bearer("alice", iat=int(time.time())), json={"title": "x"}
        )
        assert created.status_code == status


async def test_erasure_keeps_void_tokens_void_after_the_clock_was_set_back(
    service: Service, sql: psycopg.Connection
) -> None:
    """The erasing statement finds an older mark with a time in the future."""
    await service.request("DELETE", "/api/account", "alice")
    await service.request("DELETE", "/api/account", "bob")
    sql.execute("UPDATE erasures SET erased_at = now() + interval '1 hour'")
    before = sql.execute("SELECT user_hash, erased_at FROM erasures ORDER BY 1").fetchall()
    sql.execute("INSERT INTO users (id, version) VALUES ('alice', 1)")
    remember = next(
        each for each in statements.erase_owner().first if each.name == b"remember_erasure"
    )
    values = {"owner": "alice", "owner_hash": sha256(b"alice").digest(), "issued_at": 0.0}
    given = [values[name] for name in remember.parameters]
    psycopg.RawCursor(sql).execute(remember.sql, given)
    assert sql.execute("SELECT user_hash, erased_at FROM erasures ORDER BY 1").fetchall() == before


async def test_erasure_voids_its_own_token_even_if_the_issuers_clock_is_ahead(
    service: Service, sql: psycopg.Connection
) -> None:
    ahead = bearer("alice", iat=int(time.time()) + 9)
    assert (await service.request("DELETE", "/api/account", headers=ahead)).status_code == 204
    assert sql.execute(
        "SELECT erased_at >= to_timestamp(%s) FROM erasures", [int(time.time()) + 8]
    ).fetchall() == [(True,)]
    created = await service.client.post("/api/tasks", headers=ahead, json={"title": "x"})
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
