"""A TCP way to PostgreSQL that is slow, cut, or not there yet."""

import asyncio
import socket
import struct
from types import TracebackType
from typing import Self
from urllib.parse import parse_qs, urlsplit


class Network:
    """Listens on loopback and forwards to the Unix socket of the server at `url`."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._path = f"{parse_qs(parts.query)['host'][0]}/.s.PGSQL.5432"
        self._database = parts.path
        self.awake = asyncio.Event()
        """Connections are accepted before, and served from then on."""
        self.awake.set()
        self.pace: float | None = None
        """Seconds for each byte to the client; None: at once."""
        self.accepted = 0
        self._clients: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._listener = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port: int = self._listener.sockets[0].getsockname()[1]
        self.url = f"postgresql://postgres@127.0.0.1:{self.port}{self._database}"
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
        assert task is not None
        self._tasks.add(task)
        self._clients.add(writer)
        self.accepted += 1
        server: asyncio.StreamWriter | None = None
        try:
            await self.awake.wait()
            answers, server = await asyncio.open_unix_connection(self._path)
            await asyncio.gather(
                self._forward(reader, server, slow=False),
                self._forward(answers, writer, slow=True),
            )
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            for each in filter(None, (writer, server)):
                each.close()
            self._clients.discard(writer)
            self._tasks.discard(task)

    async def _forward(
        self, source: asyncio.StreamReader, target: asyncio.StreamWriter, *, slow: bool
    ) -> None:
        while data := await source.read(65_536):
            if slow and self.pace is not None:
                for byte in data:
                    target.write(bytes([byte]))
                    await asyncio.sleep(self.pace)
            else:
                target.write(data)
                await target.drain()
        raise ConnectionResetError
