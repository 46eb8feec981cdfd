"""Headless Chromium, and what it really sends."""

import fcntl
import shutil
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from support.waiting import until

if TYPE_CHECKING:
    from playwright.async_api import Browser, Page

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
OPTIONS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


def missing() -> str | None:
    """Say in one sentence what is missing to run the browser, or None."""
    if find_spec("playwright") is None:
        return "The Python package `playwright` is not installed."
    if _program() is None:
        return f"None of the programs {', '.join(PROGRAMS)} is on the PATH."
    return None


PORT = 3000
"""The port that `make demo` takes if it is free, and that the page of Better Auth has to have."""


@contextmanager
def port_to_oneself() -> Iterator[None]:
    """Let the other tests of this checkout that use `PORT` wait until this one is done."""
    with Path(__file__).open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def taken(port: int) -> str | None:
    """Say in one sentence that somebody listens on a port of `localhost`, or None."""
    try:
        with socket.create_connection(("localhost", port), timeout=1):
            return f"Port {port}, from which the page has to come, is taken."
    except OSError:
        return None


@asynccontextmanager
async def running() -> AsyncIterator["Browser"]:
    """Run the browser."""
    from playwright.async_api import async_playwright  # noqa: PLC0415  may be missing

    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=_program(), args=OPTIONS)
        try:
            yield browser
        finally:
            await browser.close()


def _program() -> str | None:
    return next(filter(None, map(shutil.which, PROGRAMS)), None)


class Traffic:
    """What a page and an API exchange, as the browser's network layer sees it.

    Playwright's own events leave out preflights, and with its `route` it answers them itself.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        self._requests: dict[str, tuple[str, str]] = {}
        self._statuses: dict[str, int] = {}

    async def watch(self, page: "Page") -> None:
        """Begin."""
        session = await page.context.new_cdp_session(page)
        session.on("Network.requestWillBeSent", self._sent)
        session.on("Network.responseReceivedExtraInfo", self._answered)
        session.on("Network.loadingFailed", self._failed)
        await session.send("Network.enable")

    async def expect(self, *exchanges: tuple[str, str, int]) -> None:
        """Check method, path and status of all that was exchanged, and begin again.

        In any order: a preflight may be reported before or after what it is for. The status is
        that of the answer, readable or not, or 0 where a preflight was refused and the request
        therefore not sent.
        """
        expected = sorted(exchanges)
        with suppress(TimeoutError):
            await until(lambda: self._seen() == expected)
        assert self._seen() == expected
        self._requests.clear()

    def _seen(self) -> list[tuple[str, str, int]]:
        return sorted(
            (*request, self._statuses.get(name, -1)) for name, request in self._requests.items()
        )

    def _sent(self, event: dict[str, Any]) -> None:
        request = event["request"]
        if request["url"].startswith(self._address):
            self._requests[event["requestId"]] = request["method"], urlsplit(request["url"]).path

    def _answered(self, event: dict[str, Any]) -> None:
        self._statuses[event["requestId"]] = event["statusCode"]

    def _failed(self, event: dict[str, Any]) -> None:
        if event.get("corsErrorStatus", {}).get("corsError", "").startswith("Preflight"):
            self._statuses[event["requestId"]] = 0
