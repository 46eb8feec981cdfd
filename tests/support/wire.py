"""A proxy in front of PostgreSQL that counts what really goes over the wire."""

import asyncio
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import parse_qs, quote, urlsplit


class Wire:
    """Forwards a Unix socket and counts connections and round trips.

    A round trip begins when a client that has heard from the server speaks again. What libpq
    sends in one go is one, however many system calls it takes.
    """

    def __init__(self, url: str, folder: Path) -> None:
        self._server_folder = parse_qs(urlsplit(url).query)["host"][0]
        self._folder = folder
        self.url = url.replace(quote(self._server_folder, safe=""), quote(str(folder), safe=""))
        self.connections = 0
        self.round_trips = 0
        self.frozen = False
        """Pass nothing on to the client, and keep the connection."""
        self.swallow_answers = False
        """Cut a connection instead of passing on the server's next answer."""
        self.swallowed = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._listener = await asyncio.start_unix_server(
            self._serve, self._folder / ".s.PGSQL.5432"
        )
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

    def reset(self) -> None:
        """Begin to count again."""
        self.connections = self.round_trips = 0

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        server = await asyncio.open_unix_connection(f"{self._server_folder}/.s.PGSQL.5432")
        turn = {"server": True}

        async def forward(
            source: asyncio.StreamReader, target: asyncio.StreamWriter, *, from_client: bool
        ) -> None:
            while data := await source.read(65_536):
                if from_client and turn["server"]:
                    self.round_trips += 1
                turn["server"] = not from_client
                if self.swallow_answers and not from_client:
                    self.swallowed += 1
                    break
                if self.frozen and not from_client:
                    continue
                target.write(data)
                await target.drain()
            target.close()
            source_of[source].close()

        source_of = {reader: writer, server[0]: server[1]}
        try:
            await asyncio.gather(
                forward(reader, server[1], from_client=True),
                forward(server[0], writer, from_client=False),
            )
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()
            server[1].close()
            self._tasks.discard(task)
