"""Tests with a real Better Auth. It signs users up and issues the tokens."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
from pydantic import SecretStr

from support import issuer as support
from support.issuer import Issuer, Session
from support.program import serving
from support.requirements import need
from support.service import Service, bearer, running_service
from support.waiting import LIMIT

PASSWORD = "a long enough password"


@pytest.fixture(autouse=True)
def _node() -> None:
    need(support.missing())


@asynccontextmanager
async def signed_up(
    issuer_url: str, database_url: str, folder: Path, **options: Any
) -> AsyncIterator[tuple[Issuer, Service, Session]]:
    """Start Better Auth and the service that trusts it, and sign a user up."""
    async with (
        Issuer.start(issuer_url, **options) as issuer,
        running_service(
            database_url,
            folder,
            better_auth_url=issuer.url,
            better_auth_issuer=options.get("issuer"),
            better_auth_audience=options.get("audience"),
        ) as service,
    ):
        yield issuer, service, await issuer.sign_up("ada@example.com", PASSWORD, "Ada")


async def status(service: Service, token: str) -> int:
    response = await service.request(
        "GET", "/api/tasks", headers={"Authorization": f"Bearer {token}"}
    )
    if response.status_code == 401:
        assert service.wire.round_trips == 0
    return response.status_code


async def test_user_signs_up_and_works_with_tasks(
    empty_database_url: str, database_url: str, short_folder: Path, sql: psycopg.Connection
) -> None:
    async with signed_up(empty_database_url, database_url, short_folder) as (issuer, service, ada):
        headers = {"Authorization": f"Bearer {await issuer.token(ada)}"}

        async def call(verb: str, path: str, **options: Any) -> Any:
            return await service.request(verb, path, headers=headers, **options)

        tasks = f"/api/{ada.user_id}/tasks"
        created = await call("POST", tasks, json={"title": "Buy groceries"})
        assert created.status_code == 201
        task = created.json()
        assert task["user_id"] == ada.user_id
        assert (await call("GET", tasks)).json() == [task]
        done = await call("PATCH", f"{tasks}/{task['id']}/complete")
        assert done.json()["completed"] is True
        stored = sql.execute("SELECT id, email FROM users").fetchall()
        assert stored == [(ada.user_id, "ada@example.com")]

        eve = await issuer.sign_up("eve@example.com", PASSWORD, "Eve")
        eves = {"Authorization": f"Bearer {await issuer.token(eve)}"}
        assert (await service.request("GET", "/api/tasks", headers=eves)).json() == []
        assert (await service.request("GET", tasks, headers=eves)).status_code == 403
        for verb in ("GET", "DELETE"):
            path = f"/api/tasks/{task['id']}"
            assert (await service.request(verb, path, headers=eves)).status_code == 404

        assert (await call("DELETE", f"{tasks}/{task['id']}")).status_code == 204
        assert (await call("GET", tasks)).json() == []


@pytest.mark.parametrize("path", ["/api/auth", "/auth"])
async def test_base_url_may_have_a_path(
    empty_database_url: str, database_url: str, short_folder: Path, path: str
) -> None:
    """`BETTER_AUTH_URL` is the same value as `baseURL`; issuer and audience are its origin."""
    async with signed_up(empty_database_url, database_url, short_folder, path=path) as (
        issuer,
        service,
        ada,
    ):
        assert issuer.url.endswith(path)
        assert await status(service, await issuer.token(ada)) == 200


async def test_service_refuses_other_tokens_of_better_auth(
    empty_database_url: str, database_url: str, short_folder: Path
) -> None:
    """The service shares Better Auth's secret and also trusts its key set."""
    options: dict[str, Any] = {"resources": ["https://api.example"], "cookie_cache": "secret"}
    async with (
        Issuer.start(empty_database_url, **options) as issuer,
        running_service(
            database_url,
            short_folder,
            better_auth_url=issuer.url,
            better_auth_secret=SecretStr(support.SECRET),
        ) as service,
    ):
        ada = await issuer.sign_up("ada@example.com", PASSWORD, "Ada")
        assert await status(service, await issuer.token(ada)) == 200
        provider = await issuer.provider_tokens(ada, "https://api.example")
        refused = {
            "e-mail verification": await issuer.verification_token("ada@example.com"),
            "session cookie": issuer.session_cookie(ada),
            "session token": ada.token,
            "signed session token": ada.signed_token,
            "provider's access token": provider.access_token,
            "provider's id token": provider.id_token,
            "no subject": await issuer.sign(email="ada@example.com", id=ada.user_id),
        }
        assert {name: await status(service, token) for name, token in refused.items()} == (
            dict.fromkeys(refused, 401)
        )
        bodies = {
            (
                await service.request(
                    "GET", "/api/tasks", headers={"Authorization": f"Bearer {token}"}
                )
            ).content
            for token in refused.values()
        }
        assert len(bodies) == 1


async def test_service_refuses_a_session_cookie_signed_with_the_key_set(
    empty_database_url: str, database_url: str, short_folder: Path
) -> None:
    """The cookie has our user's `sub` and our issuer. Only its `typ` and `aud` differ."""
    async with signed_up(
        empty_database_url, database_url, short_folder, cookie_cache="key set"
    ) as (issuer, service, ada):
        assert await status(service, issuer.session_cookie(ada)) == 401
        assert await status(service, await issuer.token(ada)) == 200


async def test_service_refuses_a_provider_token_for_our_audience(
    empty_database_url: str, database_url: str, short_folder: Path
) -> None:
    audience = "https://api.example"
    async with signed_up(
        empty_database_url, database_url, short_folder, audience=audience, resources=[audience]
    ) as (issuer, service, ada):
        provider = await issuer.provider_tokens(ada, audience)
        assert await status(service, provider.access_token) == 401
        assert await status(service, await issuer.token(ada)) == 200


async def test_service_follows_rotation_and_withdrawal(
    empty_database_url: str,
    database_url: str,
    short_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("todo_api.auth.key_set.WINDOW_SECONDS", 0.0)
    async with signed_up(empty_database_url, database_url, short_folder) as (issuer, service, ada):
        old = await issuer.token(ada)
        assert await status(service, old) == 200
        asked = await issuer.jwks_requests()
        await issuer.rotate_key()
        new = await issuer.token(ada)
        assert await status(service, new) == 200
        assert await status(service, old) == 200
        assert await issuer.jwks_requests() == asked + 1
        await issuer.fail_jwks("error")
        assert await status(service, new) == 200
        await issuer.fail_jwks("ok")
        assert await issuer.withdraw_old_keys() == 1
        await issuer.rotate_key()
        assert await status(service, await issuer.token(ada)) == 200
        assert await status(service, old) == 401


async def test_token_expires(
    empty_database_url: str,
    database_url: str,
    short_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("todo_api.auth.tokens.LEEWAY", 3600.0)
    async with signed_up(empty_database_url, database_url, short_folder, expiration_time="1s") as (
        issuer,
        service,
        ada,
    ):
        token = await issuer.token(ada)
        assert await status(service, token) == 200
        monkeypatch.setattr("todo_api.auth.tokens.LEEWAY", 0.0)
        async with asyncio.timeout(LIMIT):
            while await status(service, token) == 200:
                await asyncio.sleep(0.05)
        assert await status(service, token) == 401


@pytest.mark.parametrize("algorithm", ["EdDSA", "ES256", "ES512", "RS256", "PS256"])
async def test_service_accepts_every_algorithm(
    empty_database_url: str, database_url: str, short_folder: Path, algorithm: str
) -> None:
    async with signed_up(empty_database_url, database_url, short_folder, algorithm=algorithm) as (
        issuer,
        service,
        ada,
    ):
        token = await issuer.token(ada)
        assert await status(service, token) == 200
        head, _, signature = token.rpartition(".")
        flipped = "A" if signature[10] != "A" else "B"
        assert await status(service, f"{head}.{signature[:10]}{flipped}{signature[11:]}") == 401


async def test_service_checks_a_custom_issuer_and_audience(
    empty_database_url: str, database_url: str, short_folder: Path
) -> None:
    custom = {"issuer": "https://issuer.example", "audience": "https://audience.example"}
    async with signed_up(empty_database_url, database_url, short_folder, **custom) as (
        issuer,
        service,
        ada,
    ):
        assert await status(service, await issuer.token(ada)) == 200
        wrong = {"iss": issuer.url}, {"aud": issuer.url}
        for claims in wrong:
            forged = await issuer.sign(sub=ada.user_id, **claims)
            assert await status(service, forged) == 401


@pytest.mark.parametrize("kind", ["uuid", "serial"])
async def test_service_accepts_other_kinds_of_user_id(
    empty_database_url: str, database_url: str, short_folder: Path, kind: str
) -> None:
    async with signed_up(empty_database_url, database_url, short_folder, user_ids=kind) as (
        issuer,
        service,
        ada,
    ):
        headers = {"Authorization": f"Bearer {await issuer.token(ada)}"}
        path = f"/api/{ada.user_id}/tasks"
        created = await service.request("POST", path, headers=headers, json={"title": "x"})
        assert created.status_code == 201
        assert created.json()["user_id"] == ada.user_id


async def test_front_end_can_sign_hs256_tokens_with_the_shared_secret(
    empty_database_url: str, database_url: str, short_folder: Path
) -> None:
    async with signed_up(empty_database_url, database_url, short_folder) as (_, service, ada):
        created = await service.request(
            "POST", "/api/tasks", headers=bearer(ada.user_id), json={"title": "x"}
        )
        assert created.status_code == 201


async def test_large_avatar_makes_the_token_too_long(
    empty_database_url: str, database_url: str, short_folder: Path
) -> None:
    async with signed_up(empty_database_url, database_url, short_folder) as (issuer, service, _):
        avatar = "data:image/png;base64," + "A" * 7000
        eve = await issuer.sign_up("eve@example.com", PASSWORD, "Eve", image=avatar)
        assert await status(service, await issuer.token(eve)) == 401


@pytest.mark.parametrize("hook", ["beforeDelete", "afterDelete"])
async def test_deleting_a_user_erases_their_tasks(
    tmp_path: Path,
    empty_database_url: str,
    database_url: str,
    sql: psycopg.Connection,
    hook: Any,
    unused_port: int,
) -> None:
    """Better Auth's hook calls the service, and the service runs as a separate program."""
    api_url = f"http://127.0.0.1:{unused_port}"
    async with Issuer.start(empty_database_url, api_url=api_url, delete_hook=hook) as issuer:
        environment = {"DATABASE_URL": database_url, "BETTER_AUTH_URL": issuer.url}
        with serving(tmp_path, "--port", str(unused_port), **environment) as program:
            client = program.client(await issuer.token(ada := await sign_up(issuer)))
            with client:
                assert client.post("/api/tasks", json={"title": "x"}).status_code == 201
                assert sql.execute("SELECT count(*) FROM tasks").fetchone() == (1,)
                assert (await issuer.delete_user(ada, PASSWORD)).status_code == 200
                assert sql.execute("SELECT count(*) FROM users").fetchone() == (0,)
                assert sql.execute("SELECT count(*) FROM tasks").fetchone() == (0,)
                assert client.post("/api/tasks", json={"title": "x"}).status_code == 401
            assert program.stop() == 0


async def sign_up(issuer: Issuer) -> Session:
    return await issuer.sign_up("ada@example.com", PASSWORD, "Ada")


async def test_account_stays_if_the_service_is_down(
    empty_database_url: str, unused_port: int
) -> None:
    """If a `beforeDelete` hook throws, user and tasks stay, so the user can try again."""
    async with Issuer.start(
        empty_database_url, api_url=f"http://127.0.0.1:{unused_port}", delete_hook="beforeDelete"
    ) as issuer:
        ada = await sign_up(issuer)
        assert (await issuer.delete_user(ada, PASSWORD)).status_code >= 500
        assert await issuer.token(await issuer.sign_in("ada@example.com", PASSWORD))
