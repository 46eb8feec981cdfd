"""A network in front of PostgreSQL that counts what really goes over the wire."""

import asyncio
from pathlib import Path
from urllib.parse import quote

from support.network import Link, Network


class Wire(Network):
    """Listens on a Unix socket, forwards to the server, and counts round trips.

    A round trip begins when a client that has heard from the server speaks again. What libpq
    sends in one go is one, however many system calls it takes.
    """

    def __init__(self, url: str, folder: Path) -> None:
        super().__init__(url)
        self._folder = folder
        where = f"/{self._server['dbname']}?host={quote(str(folder), safe='')}"
        self.url = f"postgresql://{self._login}@{where}"
        self.round_trips = 0
        self.frozen = False
        """Pass no answer on, and keep the connection."""

    def reset(self) -> None:
        """Begin to count again."""
        self.connections = self.round_trips = 0

    async def _listen(self) -> asyncio.Server:
        return await asyncio.start_unix_server(self._serve, self._folder / ".s.PGSQL.5432")

    async def _ask(self, link: Link, data: bytes) -> None:
        self.round_trips += not link.client_has_the_word
        link.client_has_the_word = True
        await super()._ask(link, data)

    async def _answer(self, link: Link, data: bytes) -> None:
        link.client_has_the_word = False
        if not self.frozen:
            await super()._answer(link, data)
