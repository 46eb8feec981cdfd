"""Waiting for what will happen, with a limit."""

import asyncio
from collections.abc import Callable


async def until(condition: Callable[[], object]) -> None:
    """Wait until the condition holds; after ten seconds the test fails."""
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)
