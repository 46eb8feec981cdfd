"""Waiting for what will happen, with a limit."""

import asyncio
import time
from collections.abc import Callable

import psycopg

LIMIT = 60.0
"""Seconds after which a wait fails. It only ends what hangs, even on a very busy machine."""


async def until(condition: Callable[[], object]) -> None:
    """Wait until the condition holds."""
    async with asyncio.timeout(LIMIT):
        while not condition():
            await asyncio.sleep(0.005)


def wait_for(condition: Callable[[], object]) -> None:
    """Wait, without a loop, until the condition holds."""
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline, "did not happen"
        time.sleep(0.01)  # what happens in another process has no event to wait for


def waiting_for_locks(sql: psycopg.Connection) -> int:
    """Return how many sessions wait for a lock, on Citus on any node."""
    count = "SELECT count(DISTINCT pid) FROM pg_locks WHERE NOT granted"
    if sql.execute("SELECT 1 FROM pg_extension WHERE extname = 'citus'").fetchone():
        count = f"SELECT sum(result::int) FROM run_command_on_all_nodes('{count}')"  # noqa: S608
    ((waiting,),) = sql.execute(count).fetchall()
    return int(waiting)
