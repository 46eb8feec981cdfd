"""People use the example front end in a real browser, with a real Better Auth and a real API."""

import json
import re
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, suppress
from itertools import count
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import psycopg
import pytest

from support import browser, example
from support.program import Program, find_unused_port, serving
from support.requirements import need
from support.waiting import LIMIT, until

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
TITLES = re.compile("^Edit ")

expect.set_options(timeout=LIMIT * 1000)
numbers = count(1)


class Api:
    """The API, always at the same address. It can be stopped and started."""

    def __init__(self, folder: Path, database_url: str, port: int, front_end: str) -> None:
        self._folder = folder
        self._port = str(port)
        self._settings = {
            "DATABASE_URL": database_url,
            "BETTER_AUTH_URL": front_end,
            "CORS_ORIGINS": front_end,
        }
        self._running = ExitStack()
        self._program: Program | None = None

    def start(self) -> None:
        """Start it, if it does not run."""
        if self._program is not None:
            return
        program = serving(self._folder, "--port", self._port, **self._settings)
        self._program = self._running.enter_context(program)

    def stop(self) -> None:
        """Stop it in order."""
        assert self._program is not None
        assert self._program.stop() == 0
        self._program = None
        self._running.close()


class Devices:
    """Makes browser profiles, each like a device of its own."""

    def __init__(self, chromium: Browser, url: str) -> None:
        self._chromium = chromium
        self._url = url
        self.contexts: list[BrowserContext] = []
        self.failures: list[str] = []
        self.hosts: set[str | None] = set()

    async def window(self) -> Page:
        """Open the example on a new device."""
        context = await self._chromium.new_context()
        context.set_default_timeout(10_000)
        self.contexts.append(context)
        return await self.window_beside(context)

    async def window_beside(self, context: BrowserContext) -> Page:
        """Open the example in another window of a device."""
        page = await context.new_page()
        page.on("pageerror", lambda error: self.failures.append(str(error)))
        page.on("request", lambda request: self.hosts.add(urlsplit(request.url).hostname))
        # Better Auth lets each address sign up three times in ten seconds.
        address = {"X-Forwarded-For": f"192.0.2.{next(numbers)}"}
        await page.route("**/api/auth/sign-*/*", lambda route: send_with(route, address))
        await page.goto(self._url)
        return page


async def send_with(route: Route, headers: dict[str, str]) -> None:
    await route.continue_(headers={**route.request.headers, **headers})


@pytest.fixture(scope="module")
async def chromium() -> AsyncIterator[Browser]:
    async with browser.running() as running:
        yield running


@pytest.fixture(scope="module")
def site(
    tmp_path_factory: pytest.TempPathFactory, database_url_of_module: str
) -> Iterator[tuple[str, Api]]:
    """The address of the front end, and the API."""
    folder = tmp_path_factory.mktemp("example")
    port, api_port = find_unused_port(), find_unused_port()
    log, address = folder / "front-end.log", f"http://localhost:{api_port}"
    with example.served(database_url_of_module, port, address, log) as url:
        api = Api(folder, database_url_of_module, api_port, url)
        api.start()
        yield url, api
        api.stop()


@pytest.fixture
def api(site: tuple[str, Api]) -> Iterator[Api]:
    """The API, running, for a test that stops it."""
    yield site[1]
    site[1].start()


@pytest.fixture
async def devices(chromium: Browser, site: tuple[str, Api]) -> AsyncIterator[Devices]:
    """The test fails if a script on a page fails, or a page asks another host for anything."""
    found = Devices(chromium, site[0])
    yield found
    for context in found.contexts:
        await context.close()
    assert found.failures == []
    assert found.hosts == {"localhost"}


@pytest.fixture
def sql(database_url_of_module: str) -> Iterator[psycopg.Connection]:
    with psycopg.connect(database_url_of_module, autocommit=True) as connection:
        yield connection


def stored(sql: psycopg.Connection, email: str) -> list[tuple[str, str]]:
    """Return what the database has of a user: titles and statuses, in the order of creation."""
    query = """
        SELECT title, status FROM tasks JOIN auth.user ON "user".id = user_id
        WHERE "user".email = %s ORDER BY tasks.id
    """
    return sql.execute(query, [email]).fetchall()


async def sign_up(page: Page) -> str:
    """Create an account, and return its e-mail address."""
    email = f"ada{next(numbers)}@example.com"
    await page.get_by_role("button", name="Create an account").click()
    await page.get_by_label("Name").fill("Ada")
    await page.get_by_label("E-mail").fill(email)
    await page.get_by_label("Password").fill(PASSWORD)
    await page.get_by_role("button", name="Create account").click()
    await expect(connection(page)).to_have_text("Live")
    return email


async def sign_in(page: Page, email: str) -> None:
    await page.get_by_label("E-mail").fill(email)
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


async def complete(page: Page, title: str) -> None:
    await page.get_by_role("checkbox", name=f"Complete {title}").check()


async def delete_for_good(page: Page, title: str) -> None:
    await page.get_by_role("button", name=f"Delete {title}").click()
    await page.get_by_role("button", name="Dismiss").click()


async def expect_titles(page: Page, *titles: str) -> None:
    edit = page.get_by_role("button", name=TITLES)
    await expect(edit).to_have_text([f"Edit {title}" for title in titles])


def connection(page: Page) -> Locator:
    return page.get_by_role("banner").get_by_role("status")


async def test_user_adds_edits_completes_and_deletes_tasks(
    devices: Devices, sql: psycopg.Connection
) -> None:
    page = await devices.window()
    ada = await sign_up(page)
    await expect(page.get_by_text("Nothing to do")).to_be_visible()

    await add(page, "Buy bread", "high", "2020-02-01")
    await expect(page.get_by_role("listitem")).to_contain_text("High")
    await expect(page.get_by_role("listitem")).to_contain_text("Overdue, Sat, Feb 1, 2020")
    await rename(page, "Buy bread", "Buy cake")
    await expect(page.get_by_role("button", name="Edit Buy cake")).to_be_focused()
    await complete(page, "Buy cake")
    await until(lambda: stored(sql, ada) == [("Buy cake", "complete")])

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
    await expect(page.get_by_role("button", name="Edit Buy cake")).to_be_focused()
    await page.get_by_role("button", name="Delete Buy cake").click()
    await page.get_by_text("Deleted “Buy cake”").hover()  # else it goes after eight seconds
    await expect(page.get_by_role("button", name="Edit Buy milk")).to_be_focused()
    assert stored(sql, ada)[0] == ("Buy cake", "complete")
    await page.get_by_role("button", name="Dismiss").click()
    await until(lambda: stored(sql, ada) == [("Buy milk", "incomplete")])


async def test_user_searches_filters_sorts_and_shows_more(devices: Devices) -> None:
    page = await devices.window()
    await sign_up(page)
    for number in range(1, 28):
        await add(page, f"Task {number}")
    tasks = page.get_by_role("listitem")
    await expect(tasks).to_have_count(25)
    await page.get_by_role("button", name="Show 2 more").click()
    await expect(tasks).to_have_count(27)
    await expect(page.get_by_role("button", name="Edit Task 2", exact=True)).to_be_focused()

    search = page.get_by_role("searchbox", name="Search")
    await add(page, "Ärger vermeiden", "low", "2030-01-02")
    await add(page, "Zebra, arg", "high", "2030-01-01")
    await search.press_sequentially("ARG")
    await expect_titles(page, "Zebra, arg", "Ärger vermeiden")
    order = page.get_by_label("Order")
    await order.select_option("Title")
    await expect_titles(page, "Ärger vermeiden", "Zebra, arg")
    await order.select_option("Due date")
    await expect_titles(page, "Zebra, arg", "Ärger vermeiden")
    await complete(page, "Zebra")
    await page.get_by_role("radio", name="To do").check()
    await expect_titles(page, "Ärger vermeiden")
    await page.get_by_role("radio", name="Done").check()
    await expect_titles(page, "Zebra, arg")
    await page.get_by_role("radio", name="All").check()
    await add(page, "Call Łukasz")
    await search.fill("lukasz")
    await expect_titles(page, "Call Łukasz")
    await search.fill("nobody has this")
    await page.get_by_role("button", name="Show all tasks").click()
    await expect(tasks).to_have_count(25)


async def test_users_see_only_their_own_tasks(devices: Devices, sql: psycopg.Connection) -> None:
    adas, bobs = await devices.window(), await devices.window()
    ada, bob = await sign_up(adas), await sign_up(bobs)
    await add(adas, "Ada's task")
    await add(bobs, "Bob's task")
    await until(lambda: stored(sql, ada) and stored(sql, bob))
    for page, title in ((adas, "Ada's task"), (bobs, "Bob's task")):
        await page.reload()
        await expect(connection(page)).to_have_text("Live")
        await expect_titles(page, title)

    # Bob borrows Ada's device. Nothing of hers is left there.
    await sign_out(adas)
    assert await local_storage(adas) == {}
    await sign_in(adas, bob)
    await expect_titles(adas, "Bob's task")
    assert stored(sql, ada) == [("Ada's task", "incomplete")]
    assert stored(sql, bob) == [("Bob's task", "incomplete")]


async def local_storage(page: Page) -> object:
    """Return what the page keeps on the device."""
    return json.loads(await page.evaluate("JSON.stringify(localStorage)"))


async def test_other_window_notices_another_user(devices: Devices, sql: psycopg.Connection) -> None:
    """The session is a cookie, so a window must not write as the user of another window."""
    first = await devices.window()
    ada = await sign_up(first)
    await add(first, "Ada's task")
    await until(lambda: stored(sql, ada))
    second = await devices.window_beside(first.context)
    await expect_titles(second, "Ada's task")
    await first.bring_to_front()
    await sign_out(first)
    await expect(second.get_by_role("heading", name="Sign in")).to_be_visible()
    await sign_up(first)
    await second.reload()
    await expect(second.get_by_text("Nothing to do")).to_be_visible()


async def test_windows_and_devices_follow_each_other(
    devices: Devices, sql: psycopg.Connection
) -> None:
    first = await devices.window()
    ada = await sign_up(first)
    second = await devices.window_beside(first.context)
    phone = await devices.window()
    await sign_in(phone, ada)
    for page in (second, phone):
        await expect(connection(page)).to_have_text("Live")

    await first.bring_to_front()
    await add(first, "Buy bread")
    for page in (second, phone):
        await expect_titles(page, "Buy bread")
    await rename(phone, "Buy bread", "Buy cake")
    for page in (first, second):
        await expect_titles(page, "Buy cake")
    await second.bring_to_front()
    await complete(second, "Buy cake")
    for page in (first, phone):
        await expect(page.get_by_role("checkbox", name="Complete Buy cake")).to_be_checked()
    assert stored(sql, ada) == [("Buy cake", "complete")]


async def test_edits_made_while_the_api_is_stopped_arrive_once(
    api: Api, devices: Devices, sql: psycopg.Connection
) -> None:
    first = await devices.window()
    ada = await sign_up(first)
    for title in ("Edit me", "Complete me", "Delete me"):
        await add(first, title)
    await until(lambda: len(stored(sql, ada)) == 3)
    second = await devices.window_beside(first.context)
    await expect_titles(second, "Delete me", "Complete me", "Edit me")

    api.stop()
    await first.bring_to_front()  # the browser draws a window behind another one seldom
    await add(first, "Added")
    await rename(first, "Edit me", "Edited")
    await rename(first, "Added", "Added and edited")
    await complete(first, "Complete me")
    await delete_for_good(first, "Delete me")
    await second.bring_to_front()
    await add(second, "Added elsewhere")
    for page in (first, second):
        await expect(page.get_by_text("6 changes are kept here and sent later")).to_be_visible()
    await first.reload()
    await expect(first.get_by_text("6 changes are kept here and sent later")).to_be_visible()
    titles = ["Added elsewhere", "Added and edited", "Complete me", "Edited"]
    for page in (first, second):
        await expect_titles(page, *titles)

    api.start()
    for page in (first, second):
        await expect(connection(page)).to_have_text("Live")
        await expect_titles(page, *titles)
    assert stored(sql, ada) == [
        ("Edited", "incomplete"),
        ("Complete me", "complete"),
        ("Added and edited", "incomplete"),
        ("Added elsewhere", "incomplete"),
    ]


async def test_task_that_is_deleted_before_it_was_sent_stays_away(
    devices: Devices, sql: psycopg.Connection
) -> None:
    page = await devices.window()
    ada = await sign_up(page)
    await go_offline(page)
    await add(page, "Buy bread")
    await page.get_by_role("button", name="Delete Buy bread").click()
    await page.get_by_text("Deleted “Buy bread”").hover()
    await page.context.set_offline(False)
    await expect(connection(page)).to_have_text("Live")
    await until(lambda: stored(sql, ada))
    await expect_titles(page)
    await page.get_by_role("button", name="Dismiss").click()
    await until(lambda: stored(sql, ada) == [])
    await expect_titles(page)


async def test_write_whose_answer_is_lost_is_repeated_with_its_key(
    devices: Devices, sql: psycopg.Connection
) -> None:
    keys: list[str] = []

    async def lose_first_answer(route: Route) -> None:
        if route.request.method != "POST":
            return await route.continue_()
        keys.append(route.request.headers["idempotency-key"])
        if len(keys) > 1:
            return await route.continue_()
        await route.fetch()
        return await route.abort()

    page = await devices.window()
    ada = await sign_up(page)
    await page.route(TASKS, lose_first_answer)
    await add(page, "Buy bread")
    await until(lambda: len(keys) == 2)
    await expect(connection(page)).to_have_text("Live")
    await expect_titles(page, "Buy bread")
    assert keys[0] == keys[1]
    assert stored(sql, ada) == [("Buy bread", "incomplete")]


async def test_edits_of_different_fields_are_merged(
    devices: Devices, sql: psycopg.Connection
) -> None:
    here, there, ada = await two_devices(devices)
    await go_offline(there)
    await complete(there, "Buy bread")
    await rename(here, "Buy bread", "Buy cake")
    await until(lambda: stored(sql, ada) == [("Buy cake", "incomplete")])
    await there.context.set_offline(False)
    await until(lambda: stored(sql, ada) == [("Buy cake", "complete")])
    await expect_titles(there, "Buy cake")


@pytest.mark.parametrize(
    ("choice", "title"), [("Keep yours", "Buy rolls"), ("Keep the other one", "Buy cake")]
)
async def test_conflict_shows_both_versions(
    devices: Devices, sql: psycopg.Connection, choice: str, title: str
) -> None:
    here, there, ada = await two_devices(devices)
    await go_offline(there)
    await rename(there, "Buy bread", "Buy buns")
    await rename(there, "Buy buns", "Buy rolls")
    await rename(here, "Buy bread", "Buy cake")
    await until(lambda: stored(sql, ada) == [("Buy cake", "incomplete")])
    await there.context.set_offline(False)

    conflict = there.get_by_role("alert", name="Two versions")
    await expect(conflict).to_contain_text("YoursBuy rolls")
    await expect(conflict).to_contain_text("The other oneBuy cake")
    assert stored(sql, ada) == [("Buy cake", "incomplete")]
    await conflict.get_by_role("button", name=choice).click()
    for page in (here, there):
        await expect_titles(page, title)
    assert stored(sql, ada) == [(title, "incomplete")]


async def test_open_form_does_not_overwrite_what_arrives_meanwhile(
    devices: Devices, sql: psycopg.Connection
) -> None:
    here, there, ada = await two_devices(devices)
    await there.get_by_role("button", name="Edit Buy bread").click()
    await rename(here, "Buy bread", "Buy cake")
    await add(here, "Buy milk")
    await expect(there.get_by_role("button", name="Edit Buy milk")).to_be_visible()
    form = there.get_by_label("Edit Buy bread")
    await form.get_by_label("Priority").select_option("High")
    await form.get_by_role("button", name="Save").click()
    await expect_titles(there, "Buy milk", "Buy cake")

    await there.get_by_role("button", name="Edit Buy cake").click()
    await rename(here, "Buy cake", "Buy pie")
    await complete(here, "Buy milk")
    await expect(there.get_by_role("checkbox", name="Complete Buy milk")).to_be_checked()
    form = there.get_by_label("Edit Buy cake")
    await form.get_by_role("textbox", name="Title").fill("Buy rolls")
    await form.get_by_role("button", name="Save").click()
    await expect(there.get_by_role("alert", name="Two versions")).to_contain_text("Buy pie")
    assert stored(sql, ada)[0] == ("Buy pie", "incomplete")


async def test_task_that_was_deleted_elsewhere_can_be_kept(
    devices: Devices, sql: psycopg.Connection
) -> None:
    here, there, ada = await two_devices(devices)
    await go_offline(there)
    await rename(there, "Buy bread", "Buy rolls")
    await delete_for_good(here, "Buy bread")
    await until(lambda: stored(sql, ada) == [])
    await there.context.set_offline(False)
    conflict = there.get_by_role("alert", name="Two versions of Buy rolls")
    await expect(conflict).to_contain_text("It is deleted")
    await conflict.get_by_role("button", name="Keep yours").click()
    await expect_titles(here, "Buy rolls")
    assert stored(sql, ada) == [("Buy rolls", "incomplete")]


async def two_devices(devices: Devices) -> tuple[Page, Page, str]:
    """Return two devices of a user with one task, and the user's e-mail address."""
    here, there = await devices.window(), await devices.window()
    email = await sign_up(here)
    await add(here, "Buy bread")
    await sign_in(there, email)
    await expect_titles(there, "Buy bread")
    await expect(connection(there)).to_have_text("Live")
    return here, there, email


async def go_offline(page: Page) -> None:
    await page.context.set_offline(True)
    await expect(connection(page)).to_have_text("Offline")


async def test_refused_task_is_named_with_the_reason(devices: Devices) -> None:
    page = await devices.window()
    await sign_up(page)
    await page.get_by_label("New task").evaluate("field => field.maxLength = 1000")
    await add(page, "x" * 256)
    await expect(page.get_by_text("was not saved: Title must be")).to_be_visible()
    await expect(page.get_by_role("listitem")).to_have_count(0)
    await page.get_by_role("button", name="Dismiss").click()
    await expect(page.get_by_text("was not saved")).to_have_count(0)


async def test_page_is_accessible_on_a_small_phone(devices: Devices) -> None:
    page = await devices.window()
    await page.set_viewport_size({"width": 320, "height": 640})
    await expect_accessible(page)
    await page.get_by_role("button", name="Create an account").click()
    await expect_accessible(page)
    await page.get_by_role("button", name="Sign in").click()
    ada = await sign_up(page)
    await expect_accessible(page)

    await add(page, "Buy bread", "high", "2020-02-01")
    await add(page, "Read " + "a very long title " * 10, "medium", "2030-01-01")
    await add(page, "x" * 200, "low")
    await complete(page, "x")
    await page.get_by_role("button", name="Edit Read").click()
    await page.get_by_role("button", name="Delete x").click()
    await expect_accessible(page)
    await page.get_by_role("button", name="Account of").click()
    await expect_accessible(page)
    await page.get_by_role("button", name="Delete account").click()
    await expect_accessible(page)
    await page.get_by_role("dialog").get_by_role("button", name="Cancel").click()
    await page.get_by_label("Edit Read").get_by_role("button", name="Cancel").click()

    other = await devices.window()
    await sign_in(other, ada)
    await expect(other.get_by_role("listitem").filter(has_text="Buy bread")).to_be_visible()
    await go_offline(page)
    await rename(page, "Buy bread", "Buy rolls")
    await rename(other, "Buy bread", "Buy cake")
    await expect_accessible(page)
    await page.context.set_offline(False)
    await expect(page.get_by_role("alert", name="Two versions")).to_be_visible()
    await expect_accessible(page)


async def test_document_keeps_its_title_while_a_user_signs_up(devices: Devices) -> None:
    page = await devices.window()
    title = await page.query_selector("head > title")
    assert title is not None
    await sign_up(page)
    assert await title.evaluate("title => title.isConnected && document.title") == "To do"


async def expect_accessible(page: Page) -> None:
    """Check the page in both colour schemes with axe, and that nothing is wider than the window."""
    await page.add_script_tag(path=example.AXE)
    for scheme in ("light", "dark"):
        await page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
        found = await page.evaluate("async () => (await axe.run()).violations")
        assert [(each["id"], [node["html"] for node in each["nodes"]]) for each in found] == []
    assert await page.evaluate("document.documentElement.scrollWidth <= innerWidth")


async def test_deleted_account_leaves_nothing(
    api: Api, devices: Devices, sql: psycopg.Connection
) -> None:
    page = await devices.window()
    ada = await sign_up(page)
    await add(page, "Buy bread")
    await until(lambda: stored(sql, ada))
    api.stop()
    await delete_account(page)
    await expect(page.get_by_role("dialog")).to_contain_text(
        "Your tasks could not be erased, so your account is still there."
    )
    assert stored(sql, ada) == [("Buy bread", "incomplete")]

    api.start()
    await page.reload()
    await expect(connection(page)).to_have_text("Live")
    await delete_account(page)
    await expect(page.get_by_role("heading", name="Sign in")).to_be_visible()
    assert await local_storage(page) == {}
    users = "SELECT email FROM users UNION ALL SELECT email FROM auth.user"
    assert (ada,) not in sql.execute(users).fetchall()
    await sign_in(page, ada)
    await expect(page.get_by_text("Invalid email or password")).to_be_visible()


async def delete_account(page: Page) -> None:
    await page.get_by_role("button", name="Account of").click()
    await page.get_by_role("button", name="Delete account").click()
    await page.get_by_role("dialog").get_by_label("Password").fill(PASSWORD)
    await page.get_by_role("button", name="Delete everything").click()


async def test_demo_prints_one_address_and_leaves_no_process(
    chromium: Browser, short_folder: Path
) -> None:
    with browser.port_to_oneself(), example.demo(short_folder) as (process, output):
        (address,) = re.findall(r"http\S+", output.readline())
        children = psutil.Process(process.pid).children(recursive=True)
        context = await chromium.new_context()
        page = await context.new_page()
        await page.goto(address)
        await sign_up(page)
        await add(page, "Buy bread")
        await expect_titles(page, "Buy bread")
        await context.close()
        process.send_signal(signal.SIGINT)
        assert output.read() == ""
        assert process.wait(LIMIT) == 0
    assert len(children) >= 2
    assert not any(child.is_running() for child in children)
    assert not list(processes_with(short_folder))


def processes_with(folder: Path) -> Iterator[psutil.Process]:
    """Return the processes that name the folder, such as the supervisor of its PostgreSQL."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if str(folder) in " ".join(process.cmdline()):
                yield process
