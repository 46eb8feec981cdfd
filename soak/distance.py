"""A proxy that delays PostgreSQL, like the network in production."""

import asyncio
import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection

from support.network import Network


@contextmanager
def at_a_distance(url: str, seconds: float) -> Iterator[str]:
    """Give a URL that reaches PostgreSQL with this delay, through a proxy process (none for 0)."""
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
        async with Network(url, seconds=seconds) as network:
            told.send(network.url)
            await asyncio.Event().wait()

    asyncio.run(serve())
