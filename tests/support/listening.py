"""The application behind a real socket, in this process and its event loop."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import httpx2

from support.http import LOCAL
from support.service import bearer, settings
from support.waiting import until
from todo_api import server
from todo_api.app import create_app


class Listening:
    """A running server, and a client of it that uses as many connections as there are requests."""

    def __init__(self, running: server.Server, serving: asyncio.Task[None], port: int) -> None:
        self._running = running
        self._serving = serving
        self.client = httpx2.AsyncClient(
            base_url=f"http://127.0.0.1:{port}",
            **LOCAL,
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=None),
        )

    async def request(
        self, verb: str, path: str, user: str | None = None, **options: Any
    ) -> httpx2.Response:
        """Send a request, as `user` if one is named."""
        headers = bearer(user) if user else {}
        return await self.client.request(verb, path, headers=headers, **options)

    async def create(self, user: str, **task: Any) -> dict[str, Any]:
        """Create a task, and return it."""
        answer = await self.request("POST", "/api/tasks", user, json={"title": "x", **task})
        assert answer.status_code == 201, answer.text
        created: dict[str, Any] = answer.json()
        return created

    def set_deadline(self, seconds: float) -> None:
        """Change the deadline of the requests that begin from now on."""
        app: Any = self._running.config.loaded_app
        app.limits._seconds = seconds

    async def stop(self) -> None:
        """End in order, as at a SIGTERM."""
        self._running.should_exit = True
        await self._serving


@asynccontextmanager
async def listening(url: str, **values: Any) -> AsyncIterator[Listening]:
    """Serve the database at `url` as `todo-api serve` does; stop afterwards."""
    given = settings(**values, port=0)
    config = server.configuration(given, url)
    config.app = partial(create_app, given, url)
    listener = server.listener(given)
    running = server.Server(config)
    # Not `serve`: the signals are pytest's.
    serving = asyncio.create_task(running._serve([listener]))
    service = Listening(running, serving, listener.getsockname()[1])
    try:
        await until(lambda: running.started or serving.done())
        yield service
    finally:
        await service.client.aclose()
        await service.stop()
