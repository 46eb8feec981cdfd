"""The application in process, over ASGI, on a real database, with its round trips counted."""

import re
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import jwt
from pydantic import SecretStr

from support.wire import Wire
from todo_api.app import create_app
from todo_api.http.openapi import HEADERS
from todo_api.settings import Settings

SECRET = "a shared secret of more than thirty-two bytes"
ORIGIN = "http://localhost:3000"
DOCUMENTED_HEADERS = {
    *(name.lower() for name in HEADERS),
    *("content-length", "content-type", "transfer-encoding", "date", "server"),
    *(f"access-control-{each}" for each in ("allow-origin", "expose-headers")),
    *(f"access-control-allow-{each}" for each in ("methods", "headers", "credentials")),
    "access-control-max-age",
    "x-seen",  # of the middleware in tests/api/test_extensions.py
}
"""What an answer under /api may have: the API description's header fields, HTTP's and CORS's."""


def settings(**values: Any) -> Settings:
    """Return settings that read no environment."""
    given = {"better_auth_secret": SecretStr(SECRET), "pool_size": 4, **values}
    return Settings.model_construct(**given)


def token(user: str, **claims: Any) -> str:
    """Return a good token for a user; a claim given as None is left out.

    It is valid for a day, because some are made long before their test runs.
    """
    now = int(time.time())
    payload = {"sub": user, "iat": now, "exp": now + 86_400, **claims}
    return jwt.encode({k: v for k, v in payload.items() if v is not None}, SECRET, "HS256")


def bearer(user: str, **claims: Any) -> dict[str, str]:
    """Return the header that signs a request in."""
    return {"Authorization": f"Bearer {token(user, **claims)}"}


ASKING = {"task_not_found", "task_changed", "token_invalid"}
"""Codes of errors for which a write asks the database for the reason."""


class Service:
    """A client of the application. Every request is held to its round trips."""

    def __init__(self, client: httpx2.AsyncClient, wire: Wire) -> None:
        self.client = client
        self.wire = wire

    async def request(
        self,
        verb: str,
        path: str,
        user: str | None = None,
        headers: Mapping[str, str] | list[tuple[str, str]] | None = None,
        **options: Any,
    ) -> httpx2.Response:
        """Send a request, as `user` if one is named, and check what every answer promises."""
        sent = [*(headers.items() if isinstance(headers, Mapping) else headers or [])]
        if user is not None:
            sent += bearer(user).items()
        self.wire.reset()
        response = await self.client.request(verb, path, headers=sent, **options)
        self._check(response, verb)
        return response

    def _check(self, response: httpx2.Response, verb: str) -> None:
        # A write that finds nothing, or whose token is void, asks for the reason.
        code = response.json().get("code") if response.is_error and verb != "HEAD" else None
        asks = verb != "GET" and code in ASKING
        if response.request.url.path.endswith("/batch"):
            asks = asks or code == "idempotency_key_reused"
        if response.request.url.path.endswith("/account"):
            asks = True  # a void token
        most = 2 if asks else 1
        assert self.wire.round_trips <= most, f"{self.wire.round_trips} round trips"
        assert self.wire.connections == 0, "a request opened a connection"
        if response.status_code in {400, 403, 405, 413, 415}:
            assert self.wire.round_trips == 0, f"{response.status_code} went to the database"
        assert "x-request-id" in response.headers
        undocumented = {*response.headers} - DOCUMENTED_HEADERS
        assert not undocumented or not response.request.url.path.startswith("/api/"), undocumented
        assert "Origin" in response.headers["vary"].split(", ")
        if response.status_code >= 400 and verb != "HEAD":
            assert response.headers["content-type"] == "application/json"
            body = response.json()
            assert body["error"] == body["detail"] != ""
            assert re.fullmatch("[a-z0-9_]+", body["code"])
            has_fields = {"fields", "codes"} if body["code"] == "invalid_fields" else set()
            batch = (
                {"operation"} & set(body) if response.request.url.path.endswith("/batch") else set()
            )
            assert set(body) == {"error", "detail", "code"} | has_fields | batch

    async def create(self, user: str, **task: Any) -> dict[str, Any]:
        """Create a task, and return it."""
        response = await self.request(
            "POST", "/api/tasks", user, json={"title": "Buy groceries", **task}
        )
        assert response.status_code == 201, response.text
        created: dict[str, Any] = response.json()
        return created


@asynccontextmanager
async def running_service(url: str, folder: Path, **values: Any) -> AsyncIterator[Service]:
    """Start the application on the database at `url`; stop it afterwards."""
    async with Wire(url, folder) as wire:
        app = create_app(settings(**values), wire.url)
        transport = httpx2.ASGITransport(app, raise_app_exceptions=False)
        async with (
            app.router.lifespan_context(app),
            httpx2.AsyncClient(transport=transport, base_url="http://test") as client,
        ):
            yield Service(client, wire)
