"""People use the example front end in a real browser, with a real Better Auth and a real API."""

import json
import re
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TypeAlias

import psycopg
import pytest

from support import browser, example
from support.program import Program, find_unused_port, serving
from support.requirements import need
from support.waiting import until

need(browser.missing() or example.missing())

from playwright.async_api import (  # noqa: E402  playwright may be missing
    Browser,
    BrowserContext,
    Locator,
    Page,
    Route,
    expect,
)

PASSWORD = "a long password"
TASKS = re.compile(r"/api/tasks")

Api: TypeAlias = Callable[[], AbstractContextManager[Program]]


@pytest.fixture(scope="module")
async def chromium() -> AsyncIterator[Browser]:
    async with browser.running() as running:
        yield running


@pytest.fixture
def api_port(unused_port: int) -> int:
    return unused_port


@pytest.fixture
def url(tmp_path: Path, database_url: str, api_port: int) -> Iterator[str]:
    """The address of the example."""
    api = f"http://localhost:{api_port}"
    log = tmp_path / "front-end.log"
    with example.served(database_url, find_unused_port(), api, log) as address:
        yield address


@pytest.fixture
def api(tmp_path: Path, database_url: str, url: str, api_port: int) -> Api:
    """Return a function that runs the API, every time on the same port."""

    def start() -> AbstractContextManager[Program]:
        settings = {"DATABASE_URL": database_url, "BETTER_AUTH_URL": url, "CORS_ORIGINS": url}
        return serving(tmp_path, "--port", str(api_port), **settings)

    return start


class Devices:
    """Makes browser profiles, each like a device of its own."""

    def __init__(self, chromium: Browser, url: str) -> None:
        self._chromium = chromium
        self._url = url
        self.contexts: list[BrowserContext] = []
        self.failures: list[str] = []

    async def window(self, beside: Page | None = None) -> Page:
        """Open the example on a new device, or in another window of one."""
        context = beside.context if beside else await self._chromium.new_context(locale="en-GB")
        context.set_default_timeout(10_000)
        self.contexts.append(context)
        page = await context.new_page()
        page.on("pageerror", lambda error: self.failures.append(str(error)))
        await page.goto(self._url)
        return page


@pytest.fixture
async def devices(chromium: Browser, url: str) -> AsyncIterator[Devices]:
    """The test fails if a script on a page fails."""
    found = Devices(chromium, url)
    yield found
    for context in found.contexts:
        await context.close()
    assert found.failures == []


async def sign_up(page: Page, name: str) -> None:
    await page.get_by_role("button", name="Create an account").click()
    await page.get_by_label("Name").fill(name)
    await page.get_by_label("E-mail").fill(f"{name.lower()}@example.com")
    await page.get_by_label("Password").fill(PASSWORD)
    await page.get_by_role("button", name="Create account").click()
    await expect(connection(page)).to_have_text("Live")


async def sign_in(page: Page, name: str) -> None:
    await page.get_by_label("E-mail").fill(f"{name.lower()}@example.com")
    await page.get_by_label("Password").fill(PASSWORD)
    await page.get_by_role("button", name="Sign in").click()


async def sign_out(page: Page) -> None:
    await page.get_by_role("button", name="Account of").click()
    await page.get_by_role("button", name="Sign out").click()
    await expect(page.get_by_role("heading", name="Sign in")).to_be_visible()


async def add(page: Page, title: str, priority: str = "", due: str = "") -> None:
    form = page.locator("form", has=page.get_by_label("New task"))
    await form.get_by_label("New task").fill(title)
    await form.get_by_label("Priority").select_option(priority)
    await form.get_by_label("Due").fill(due)
    await form.get_by_label("New task").press("Enter")


async def rename(page: Page, title: str, new: str) -> None:
    await page.get_by_role("button", name=f"Edit {title}").click()
    field = page.get_by_role("textbox", name="Title")
    await field.fill(new)
    await field.press("Enter")


async def expect_titles(page: Page, *titles: str) -> None:
    edit = page.get_by_role("button", name=re.compile("^Edit "))
    await expect(edit).to_have_text([f"Edit {title}" for title in titles])


def connection(page: Page) -> Locator:
    return page.get_by_role("banner").get_by_role("status")


def stored(sql: psycopg.Connection) -> list[tuple[str, str]]:
    """Return what the database has: titles and statuses, in the order of their creation."""
    return sql.execute("SELECT title, status FROM tasks ORDER BY id").fetchall()


async def test_user_adds_edits_completes_and_deletes_tasks(
    api: Api, devices: Devices, sql: psycopg.Connection
) -> None:
    with api():
        page = await devices.window()
        await sign_up(page, "Ada")
        await expect(page.get_by_text("Nothing to do")).to_be_visible()

        await add(page, "Buy bread", "high", "2020-02-01")
        await expect(page.get_by_role("listitem")).to_contain_text("High")
        await expect(page.get_by_role("listitem")).to_contain_text("Overdue, Sat, 1 Feb 2020")
        await rename(page, "Buy bread", "Buy cake")
        await expect(page.get_by_role("button", name="Edit Buy cake")).to_be_focused()
        await page.get_by_role("checkbox", name="Complete Buy cake").check()
        await until(lambda: stored(sql) == [("Buy cake", "complete")])

        await page.get_by_role("button", name="Edit Buy cake").press("Enter")
        await page.get_by_label("Notes").fill("Not kept")
        await page.get_by_label("Notes").press("Escape")
        await expect(page.get_by_role("button", name="Edit Buy cake")).to_be_focused()
        await expect(page.get_by_text("Not kept")).to_have_count(0)

        await add(page, "Buy milk")
        await page.get_by_role("button", name="Delete Buy cake").click()
        await expect_titles(page, "Buy milk")
        await page.get_by_role("button", name="Undo").click()
        await expect_titles(page, "Buy milk", "Buy cake")
        await page.get_by_role("button", name="Delete Buy cake").click()
        await expect(page.get_by_role("button", name="Edit Buy milk")).to_be_focused()
        assert stored(sql)[0] == ("Buy cake", "complete")
        await page.get_by_role("button", name="Dismiss").click()
        await until(lambda: stored(sql) == [("Buy milk", "incomplete")])


async def test_user_searches_filters_sorts_and_shows_more(api: Api, devices: Devices) -> None:
    with api():
        page = await devices.window()
        await sign_up(page, "Ada")
        for number in range(1, 28):
            await add(page, f"Task {number}")
        await expect(page.get_by_role("listitem")).to_have_count(25)
        await page.get_by_role("button", name="Show 2 more").click()
        await expect(page.get_by_role("listitem")).to_have_count(27)
        await expect(page.get_by_role("button", name="Edit Task 2", exact=True)).to_be_focused()

        search = page.get_by_role("searchbox", name="Search")
        await add(page, "Ärger vermeiden", "low", "2030-01-02")
        await add(page, "Zebra, arg", "high", "2030-01-01")
        await search.press_sequentially("ARG")
        await expect_titles(page, "Zebra, arg", "Ärger vermeiden")
        order = page.get_by_label("Order")
        await order.select_option("Title")
        await expect_titles(page, "Ärger vermeiden", "Zebra, arg")
        await order.select_option("Priority")
        await expect_titles(page, "Zebra, arg", "Ärger vermeiden")
        await page.get_by_role("checkbox", name="Complete Zebra").check()
        await page.get_by_role("radio", name="To do").check()
        await expect_titles(page, "Ärger vermeiden")
        await page.get_by_role("radio", name="Done").check()
        await expect_titles(page, "Zebra, arg")
        await search.fill("nobody has this")
        await page.get_by_role("button", name="Show all tasks").click()
        await expect(page.get_by_role("listitem")).to_have_count(25)


async def test_users_see_only_their_own_tasks(
    api: Api, devices: Devices, sql: psycopg.Connection
) -> None:
    with api():
        adas, bobs = await devices.window(), await devices.window()
        await sign_up(adas, "Ada")
        await sign_up(bobs, "Bob")
        await add(adas, "Ada's task")
        await add(bobs, "Bob's task")
        await until(lambda: len(stored(sql)) == 2)
        for page, title in ((adas, "Ada's task"), (bobs, "Bob's task")):
            await page.reload()
            await expect(connection(page)).to_have_text("Live")
            await expect_titles(page, title)

        # Bob borrows Ada's device. Nothing of hers is left there.
        await sign_out(adas)
        assert await adas.evaluate("JSON.stringify(localStorage)") == "{}"
        await sign_in(adas, "Bob")
        await expect_titles(adas, "Bob's task")
        owners = sql.execute("SELECT count(DISTINCT user_id), count(*) FROM tasks").fetchone()
        assert owners == (2, 2)


async def test_other_window_notices_another_user(
    api: Api, devices: Devices, sql: psycopg.Connection
) -> None:
    """The session is a cookie, so a window must not write as somebody who signs in beside it."""
    with api():
        first = await devices.window()
        await sign_up(first, "Ada")
        await add(first, "Ada's task")
        await until(lambda: len(stored(sql)) == 1)
        second = await devices.window(beside=first)
        await expect_titles(second, "Ada's task")
        await sign_out(first)
        await expect(second.get_by_role("heading", name="Sign in")).to_be_visible()
        await sign_up(first, "Bob")
        await second.reload()
        await expect(second.get_by_text("Nothing to do")).to_be_visible()


async def test_windows_and_devices_follow_each_other(
    api: Api, devices: Devices, sql: psycopg.Connection
) -> None:
    with api():
        first = await devices.window()
        await sign_up(first, "Ada")
        second = await devices.window(beside=first)
        phone = await devices.window()
        await sign_in(phone, "Ada")
        for page in (second, phone):
            await expect(connection(page)).to_have_text("Live")

        await add(first, "Buy bread")
        for page in (second, phone):
            await expect_titles(page, "Buy bread")
        await rename(phone, "Buy bread", "Buy cake")
        for page in (first, second):
            await expect_titles(page, "Buy cake")
        await second.get_by_role("checkbox", name="Complete Buy cake").check()
        for page in (first, phone):
            await expect(page.get_by_role("checkbox", name="Complete Buy cake")).to_be_checked()
        assert stored(sql) == [("Buy cake", "complete")]


async def test_edits_made_while_the_api_is_stopped_arrive_once(
    api: Api, devices: Devices, sql: psycopg.Connection
) -> None:
    with api() as program:
        first = await devices.window()
        await sign_up(first, "Ada")
        for title in ("Edit me", "Complete me", "Delete me"):
            await add(first, title)
        await until(lambda: len(stored(sql)) == 3)
        second = await devices.window(beside=first)
        await expect(connection(second)).to_have_text("Live")
        assert program.stop(signal.SIGTERM) == 0

    await add(first, "Added")
    await rename(first, "Edit me", "Edited")
    await rename(first, "Added", "Added and edited")
    await first.get_by_role("checkbox", name="Complete Complete me").check()
    await first.get_by_role("button", name="Delete Delete me").click()
    await first.get_by_role("button", name="Dismiss").click()
    await add(second, "Added elsewhere")
    changes = "6 changes are kept here and sent later"
    for page in (first, second):
        await expect(connection(page)).to_contain_text(changes)
    await first.reload()
    await expect(connection(first)).to_contain_text(changes)
    for page in (first, second):
        await expect_titles(page, "Added elsewhere", "Added and edited", "Complete me", "Edited")

    with api():
        for page in (first, second):
            await expect(connection(page)).to_have_text("Live")
            await expect_titles(page, "Added elsewhere", "Added and edited", "Complete me", "Edited")
        assert stored(sql) == [
            ("Edited", "incomplete"),
            ("Complete me", "complete"),
            ("Added and edited", "incomplete"),
            ("Added elsewhere", "incomplete"),
        ]


async def test_write_whose_answer_is_lost_is_repeated_with_its_key(
    api: Api, devices: Devices, sql: psycopg.Connection
) -> None:
    keys: list[str] = []

    async def lose_first_answer(route: Route) -> None:
        if route.request.method != "POST":
            return await route.continue_()
        keys.append(route.request.headers["idempotency-key"])
        if len(keys) > 1:
            return await route.continue_()
        await route.fetch()
        await route.abort()

    with api():
        page = await devices.window()
        await sign_up(page, "Ada")
        await page.route(TASKS, lose_first_answer)
        await add(page, "Buy bread")
        await until(lambda: len(keys) == 2)
        await expect(connection(page)).to_have_text("Live")
        await expect_titles(page, "Buy bread")
        assert keys[0] == keys[1]
        assert stored(sql) == [("Buy bread", "incomplete")]


async def test_edits_of_different_fields_are_merged(
    api: Api, devices: Devices, sql: psycopg.Connection
) -> None:
    with api():
        here, there = await two_devices(devices)
        await there.context.set_offline(True)
        await expect(connection(there)).to_contain_text("cannot be reached")
        await there.get_by_role("checkbox", name="Complete Buy bread").check()
        await rename(here, "Buy bread", "Buy cake")
        await until(lambda: stored(sql) == [("Buy cake", "incomplete")])
        await there.context.set_offline(False)
        await until(lambda: stored(sql) == [("Buy cake", "complete")])
        await expect_titles(there, "Buy cake")


@pytest.mark.parametrize(
    ("choice", "title"), [("Keep yours", "Buy rolls"), ("Keep the other one", "Buy cake")]
)
async def test_conflict_shows_both_versions(
    api: Api, devices: Devices, sql: psycopg.Connection, choice: str, title: str
) -> None:
    with api():
        here, there = await two_devices(devices)
        await there.context.set_offline(True)
        await rename(there, "Buy bread", "Buy rolls")
        await rename(here, "Buy bread", "Buy cake")
        await until(lambda: stored(sql) == [("Buy cake", "incomplete")])
        await there.context.set_offline(False)

        conflict = there.get_by_role("alert", name="Two versions")
        await expect(conflict).to_contain_text("YoursBuy rolls")
        await expect(conflict).to_contain_text("The other oneBuy cake")
        assert stored(sql) == [("Buy cake", "incomplete")]
        await conflict.get_by_role("button", name=choice).click()
        for page in (here, there):
            await expect_titles(page, title)
        assert stored(sql) == [(title, "incomplete")]


async def test_task_that_was_deleted_elsewhere_can_be_kept(
    api: Api, devices: Devices, sql: psycopg.Connection
) -> None:
    with api():
        here, there = await two_devices(devices)
        await there.context.set_offline(True)
        await rename(there, "Buy bread", "Buy rolls")
        await here.get_by_role("button", name="Delete Buy bread").click()
        await here.get_by_role("button", name="Dismiss").click()
        await until(lambda: stored(sql) == [])
        await there.context.set_offline(False)
        conflict = there.get_by_role("alert", name="Two versions of Buy rolls")
        await expect(conflict).to_contain_text("It is deleted")
        await conflict.get_by_role("button", name="Keep yours").click()
        await expect_titles(here, "Buy rolls")
        assert stored(sql) == [("Buy rolls", "incomplete")]


async def two_devices(devices: Devices) -> tuple[Page, Page]:
    """Return two devices of a user with one task."""
    here, there = await devices.window(), await devices.window()
    await sign_up(here, "Ada")
    await add(here, "Buy bread")
    await sign_in(there, "Ada")
    await expect_titles(there, "Buy bread")
    await expect(connection(there)).to_have_text("Live")
    return here, there


async def test_refused_task_is_named_with_the_reason(api: Api, devices: Devices) -> None:
    with api():
        page = await devices.window()
        await sign_up(page, "Ada")
        await page.get_by_label("New task").evaluate("field => field.maxLength = 1000")
        await add(page, "x" * 256)
        await expect(page.get_by_text("was not saved: Title must be")).to_be_visible()
        await expect(page.get_by_role("listitem")).to_have_count(0)
        await page.get_by_role("button", name="Dismiss").click()
        await expect(page.get_by_text("was not saved")).to_have_count(0)


async def test_deleted_account_leaves_nothing(
    api: Api, devices: Devices, sql: psycopg.Connection
) -> None:
    users = "SELECT (SELECT count(*) FROM auth.user), (SELECT count(*) FROM users)"
    with api():
        page = await devices.window()
        await sign_up(page, "Ada")
        await add(page, "Buy bread")
        await until(lambda: len(stored(sql)) == 1)
    await delete_account(page)
    await expect(page.get_by_role("alert")).to_contain_text(
        ["Your tasks could not be erased, so your account is still there."]
    )
    assert sql.execute(users).fetchone() == (1, 1)

    with api():
        await page.reload()
        await expect(connection(page)).to_have_text("Live")
        await delete_account(page)
        await expect(page.get_by_role("heading", name="Sign in")).to_be_visible()
        assert sql.execute(users).fetchone() == (0, 0)
        assert stored(sql) == []
        assert json.loads(await page.evaluate("JSON.stringify(localStorage)")) == {}
        await sign_in(page, "Ada")
        await expect(page.get_by_role("alert")).to_contain_text(["Invalid email or password"])


async def delete_account(page: Page) -> None:
    await page.get_by_role("button", name="Account of").click()
    await page.get_by_role("button", name="Delete account").click()
    await page.get_by_role("dialog").get_by_label("Password").fill(PASSWORD)
    await page.get_by_role("button", name="Delete everything").click()
