"""`receive()` after the whole body: it waits for the disconnect, and blocks nobody meanwhile."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from fastapi import FastAPI, Request
from starlette.responses import Response, StreamingResponse

from support.listening import Listening, listening
from support.waiting import LIMIT

LARGE = 100_000
"""The size of a body for which uvicorn stops reading, until the application has read it."""


class Added:
    """Routes that somebody has added to the service, and what they have seen."""

    def __init__(self, app: FastAPI) -> None:
        self.messages: list[Any] = []
        self.waits = asyncio.Event()
        self.left = asyncio.Event()
        self.stream_ended = asyncio.Event()
        app.add_api_route("/listen", self.listen, methods=["GET", "POST"])
        app.add_api_route("/stream", self.stream, methods=["GET"])
        app.add_api_route("/three", self.three, methods=["GET"])

    async def listen(self, request: Request) -> Response:
        """Wait until the client leaves."""
        while not self.messages or self.messages[-1]["type"] != "http.disconnect":
            if self.messages and not self.messages[-1]["more_body"]:
                self.waits.set()
            self.messages.append(await request.receive())
        self.left.set()
        return Response()

    async def stream(self) -> StreamingResponse:
        """Send parts until the client leaves."""

        async def parts() -> AsyncIterator[bytes]:
            try:
                while True:
                    yield b"part"
                    await asyncio.sleep(0.01)
            finally:
                self.stream_ended.set()

        return StreamingResponse(parts())

    async def three(self) -> StreamingResponse:
        """Send three parts."""

        async def parts() -> AsyncIterator[bytes]:
            for part in (b"one", b"two", b"three"):
                yield part
                await asyncio.sleep(0)

        return StreamingResponse(parts())


@pytest.fixture
async def service(database_url: str) -> AsyncIterator[Listening]:
    async with listening(database_url) as running:
        yield running


@pytest.fixture
def added(service: Listening) -> Added:
    app = service._running.config.loaded_app
    assert isinstance(app, FastAPI)
    return Added(app)


async def connect(service: Listening) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection("127.0.0.1", service.client.base_url.port)


def get(path: str, *fields: str) -> bytes:
    return "\r\n".join([f"GET {path} HTTP/1.1", "Host: x", *fields, "", ""]).encode()


async def assert_others_are_served(service: Listening) -> None:
    async with asyncio.timeout(LIMIT):
        for _ in range(10):
            assert (await service.request("GET", "/livez")).status_code == 200


@pytest.mark.parametrize("size", [0, 10, LARGE])
async def test_listener_waits_for_the_disconnect_without_blocking(
    service: Listening, added: Added, size: int
) -> None:
    _, writer = await connect(service)
    writer.write(
        b"POST /listen HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % size + b"x" * size
    )
    async with asyncio.timeout(LIMIT):
        await added.waits.wait()
        await assert_others_are_served(service)
        parts = added.messages[:]
        assert sum(len(part["body"]) for part in parts) == size
        writer.transport.abort()
        await added.left.wait()
    assert added.messages == [*parts, {"type": "http.disconnect"}]


async def test_stream_goes_on_until_the_client_leaves(service: Listening, added: Added) -> None:
    reader, writer = await connect(service)
    writer.write(get("/stream"))
    async with asyncio.timeout(LIMIT):
        await reader.readuntil(b"\r\n\r\n")
        for _ in range(3):
            assert await reader.readuntil(b"\r\npart\r\n")
        await assert_others_are_served(service)
        assert not added.stream_ended.is_set()
        writer.transport.abort()
        await added.stream_ended.wait()


async def test_streams_are_sent_whole_on_one_connection(service: Listening, added: Added) -> None:
    del added
    reader, writer = await connect(service)
    writer.write(get("/three") * 3 + get("/livez", "Connection: close"))
    async with asyncio.timeout(LIMIT):
        answers = await reader.read()
    writer.close()
    body = b"\r\n\r\n3\r\none\r\n3\r\ntwo\r\n5\r\nthree\r\n0\r\n\r\n"
    assert answers.count(body) == 3
    assert answers.count(b"HTTP/1.1 200 OK") == 4
    assert json.loads(answers.rpartition(b"\r\n")[2]) == {"status": "ok"}
