"""A network between the program and PostgreSQL: far, silent, cut, or cut at the worst moment."""

import asyncio
import multiprocessing
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Self
from urllib.parse import parse_qs, urlsplit


class Proxy:
    """Listens on loopback and forwards to the Unix socket of the server at `url`."""

    def __init__(self, url: str, *, seconds: float = 0.0) -> None:
        parts = urlsplit(url)
        self._path = f"{parse_qs(parts.query)['host'][0]}/.s.PGSQL.5432"
        self._database = parts.path
        self._seconds = seconds
        self.passing = asyncio.Event()
        """Cleared: nothing gets through in either direction; set again, it arrives late."""
        self.passing.set()
        self.cut_answers = False
        """Cut a connection in place of passing on its next answer: what it asked was done."""
        self._clients: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._listener = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        port = self._listener.sockets[0].getsockname()[1]
        self.url = f"postgresql://postgres@127.0.0.1:{port}{self._database}"
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._listener.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def reset(self) -> int:
        """Cut every connection with a TCP reset, as a router does that has forgotten them."""
        cut = list(self._clients)
        for client in cut:
            peer: socket.socket = client.get_extra_info("socket")
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.transport.abort()
        return len(cut)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None  # noqa: S101  what asyncio calls is a task
        self._tasks.add(task)
        self._clients.add(writer)
        server: asyncio.StreamWriter | None = None
        try:
            answers, server = await asyncio.open_unix_connection(self._path)
            await asyncio.gather(self._questions(reader, server), self._answers(answers, writer))
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            for each in filter(None, (writer, server)):
                each.close()
            self._clients.discard(writer)
            self._tasks.discard(task)

    async def _questions(self, client: asyncio.StreamReader, server: asyncio.StreamWriter) -> None:
        while data := await client.read(65_536):
            await self.passing.wait()
            server.write(data)
            await server.drain()
        raise ConnectionResetError

    async def _answers(self, server: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        while data := await server.read(65_536):
            if self.cut_answers:
                break
            if self._seconds:
                await asyncio.sleep(self._seconds)
            await self.passing.wait()
            client.write(data)
            await client.drain()
        raise ConnectionResetError


@contextmanager
def at_a_distance(url: str, seconds: float) -> Iterator[str]:
    """Put PostgreSQL so far away, in a process of its own; 0: leave it where it is."""
    if not seconds:
        yield url
        return
    ours, its = multiprocessing.Pipe()
    process = multiprocessing.Process(target=_serve_for_ever, args=(url, seconds, its))
    process.start()
    try:
        yield ours.recv()
    finally:
        process.terminate()
        process.join()


def _serve_for_ever(url: str, seconds: float, told: Connection) -> None:
    async def serve() -> None:
        async with Proxy(url, seconds=seconds) as proxy:
            told.send(proxy.url)
            await asyncio.Event().wait()

    asyncio.run(serve())
