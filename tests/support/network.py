"""A TCP way to PostgreSQL that is far, slow, silent, cut, or not there yet."""

import asyncio
import socket
import struct
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from psycopg.conninfo import conninfo_to_dict


@dataclass(eq=False)
class Link:
    """A client's connection, and the one to the server that belongs to it."""

    client: asyncio.StreamWriter
    server: asyncio.StreamWriter
    client_has_the_word: bool = False


class Network:
    """Listens on loopback and forwards to the server at `url`."""

    def __init__(self, url: str, *, seconds: float = 0.0) -> None:
        self._server = conninfo_to_dict(url)
        self._seconds = seconds
        """How far away the server is, there and back."""
        self.awake = asyncio.Event()
        """Connections are accepted before, and served from then on."""
        self.awake.set()
        self.passing = asyncio.Event()
        """Cleared: nothing gets through in either direction; set again, it arrives late."""
        self.passing.set()
        self.pace: float | None = None
        """Seconds for each byte to the client; None: at once."""
        self.cut_answers = False
        """Cut a connection in place of passing on its next answer: what it asked was done."""
        self.answers_cut = 0
        self.connections = 0
        self._clients: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._listener = await self._listen()
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

    def cut(self) -> int:
        """Cut every connection with a TCP reset, as a router does that has forgotten them."""
        cut = list(self._clients)
        for client in cut:
            peer: socket.socket = client.get_extra_info("socket")
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.transport.abort()
        return len(cut)

    async def _listen(self) -> asyncio.Server:
        listener = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port: int = listener.sockets[0].getsockname()[1]
        self.url = f"postgresql://{self._login}@127.0.0.1:{self.port}/{self._server['dbname']}"
        return listener

    @property
    def _login(self) -> str:
        return str(self._server["user"])

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        host, port = str(self._server["host"]), self._server.get("port")
        if host.startswith("/"):
            return await asyncio.open_unix_connection(f"{host}/.s.PGSQL.5432")
        return await asyncio.open_connection(host, int(port or 5432))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._clients.add(writer)
        self.connections += 1
        server: asyncio.StreamWriter | None = None
        try:
            await self.awake.wait()
            answers, server = await self._connect()
            link = Link(writer, server)
            await asyncio.gather(self._questions(reader, link), self._answers(answers, link))
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            for each in filter(None, (writer, server)):
                each.close()
            self._clients.discard(writer)
            self._tasks.discard(task)

    async def _questions(self, client: asyncio.StreamReader, link: Link) -> None:
        while data := await client.read(65_536):
            await self.passing.wait()
            await self._ask(link, data)
        raise ConnectionResetError

    async def _answers(self, server: asyncio.StreamReader, link: Link) -> None:
        while data := await server.read(65_536):
            if self.cut_answers:
                self.answers_cut += 1
                break
            if self._seconds:
                await asyncio.sleep(self._seconds)
            await self.passing.wait()
            await self._answer(link, data)
        raise ConnectionResetError

    async def _ask(self, link: Link, data: bytes) -> None:
        link.server.write(data)
        await link.server.drain()

    async def _answer(self, link: Link, data: bytes) -> None:
        for part in [data] if self.pace is None else map(int.to_bytes, data):
            link.client.write(part)
            await link.client.drain()
            if self.pace is not None:
                await asyncio.sleep(self.pace)
