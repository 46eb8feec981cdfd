"""A request that waits for an event: it gives up its slot meanwhile, and may end early."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

from starlette.requests import Request

from todo_api.request_context import RequestContext


async def step_aside(request: Request, event: Awaitable[bool]) -> bool:
    """Await an event without a slot and without the deadline of a request."""
    return await RequestContext.of(request.scope).step_aside(event)


@contextmanager
def ended_early(request: Request, seconds: float, end: Callable[[], None]) -> Iterator[None]:
    """Call `end` after so many seconds, when the client leaves, and at shutdown."""
    timer = asyncio.get_running_loop().call_later(seconds, end)
    leaving = asyncio.create_task(_until_client_leaves(request))
    leaving.add_done_callback(lambda _: end())
    RequestContext.of(request.scope).on_shutdown = end
    try:
        yield
    finally:
        timer.cancel()
        leaving.cancel()


async def _until_client_leaves(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
