"""Headless Chromium, and what it really sends."""

import shutil
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

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

    Playwright's own events leave out preflights, and its `route` answers them itself.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        self.preflights: dict[tuple[str, str], int] = {}
        """The status of the answer, by the method asked for and the path."""
        self.requests: list[tuple[str, str]] = []
        """Method and path of all others, in order."""
        self.statuses: list[int] = []
        """Of the answers to these, read or not."""
        self._asking: dict[str, tuple[str, str]] = {}

    async def watch(self, page: "Page") -> None:
        """Begin."""
        session = await page.context.new_cdp_session(page)
        session.on("Network.requestWillBeSent", self._sent)
        session.on("Network.responseReceivedExtraInfo", self._answered)
        await session.send("Network.enable")

    def _sent(self, event: dict[str, Any]) -> None:
        request = event["request"]
        if not request["url"].startswith(self._address):
            return
        path = urlsplit(request["url"]).path
        if event["type"] == "Preflight":
            headers = {name.lower(): value for name, value in request["headers"].items()}
            asked = headers["access-control-request-method"], path
            self._asking[event["requestId"]] = asked
        else:
            self.requests.append((request["method"], path))
            self._asking[event["requestId"]] = ("", "")

    def _answered(self, event: dict[str, Any]) -> None:
        print("EXTRA", event["requestId"], event["statusCode"], self._asking.get(event["requestId"]))
