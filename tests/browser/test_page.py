"""A page in a real browser uses Better Auth's own client, and calls the API on another origin.

`page/` is a small application. Better Auth serves it and signs its users in, on one origin. The
page calls the API on another origin with fetch.
"""

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TypeAlias
from urllib.parse import urlsplit

import psycopg
import pytest

from support import browser, issuer
from support.issuer import Issuer
from support.program import Program, serving
from support.requirements import need

need(browser.missing() or issuer.missing())

from playwright.async_api import Browser, Page, expect  # noqa: E402  playwright may be missing

FOLDER = Path(__file__).parent / "page"
ORIGIN = f"http://localhost:{browser.PORT}"
PASSWORD = "a long password"
UNREADABLE = "The API does not answer, or it does not allow this page."

Start: TypeAlias = Callable[..., AbstractContextManager[Program]]

FETCH = """async ([address, options]) => {
    try {
        const response = await fetch(address, options);
        const { type, status, headers } = response;
        return { type, status, headers: Object.fromEntries(headers), text: await response.text() };
    } catch (error) {
        return error.name;
    }
}"""


@pytest.fixture(scope="module")
async def chromium() -> AsyncIterator[Browser]:
    async with browser.running() as running:
        yield running


@pytest.fixture
async def better_auth(empty_database_url: str) -> AsyncIterator[Issuer]:
    with browser.port_to_oneself():
        need(browser.taken(browser.PORT))
        async with Issuer.start(
            empty_database_url, host="localhost", port=browser.PORT, folder=FOLDER
        ) as running:
            yield running


@pytest.fixture
def api(tmp_path: Path, database_url: str, better_auth: Issuer) -> Start:
    """Return a function that runs the API. Its arguments are more settings."""

    def start(**variables: str) -> AbstractContextManager[Program]:
        settings = {
            "DATABASE_URL": database_url,
            "BETTER_AUTH_URL": better_auth.url,
            "CORS_ORIGINS": ORIGIN,
        }
        return serving(tmp_path, **{**settings, **variables})

    return start


@pytest.fixture
async def page(chromium: Browser) -> AsyncIterator[Page]:
    """An empty tab of a new profile. The test fails if a script on a page fails."""
    context = await chromium.new_context()
    context.set_default_timeout(10_000)
    tab = await context.new_page()
    failures: list[str] = []
    tab.on("pageerror", lambda error: failures.append(str(error)))
    yield tab
    await context.close()
    assert failures == []


async def sign_up(page: Page, program: Program) -> None:
    await page.goto(f"{ORIGIN}/?api={program.address}")
    await page.get_by_role("button", name="I am new here").click()
    await page.get_by_label("Name").fill("Ada")
    await page.get_by_label("E-mail").fill("ada@example.com")
    await page.get_by_label("Password").fill(PASSWORD)
    await page.get_by_role("button", name="Create account").click()
    await expect(page.get_by_text("ada@example.com")).to_be_visible()


async def sign_in(page: Page, password: str) -> None:
    await page.get_by_label("E-mail").fill("ada@example.com")
    await page.get_by_label("Password").fill(password)
    await page.get_by_role("button", name="Sign in").click()


async def add(page: Page, title: str) -> None:
    await page.get_by_label("New task").fill(title)
    await page.get_by_role("button", name="Add").click()


async def test_user_creates_changes_and_deletes_a_task(
    api: Start, page: Page, better_auth: Issuer, sql: psycopg.Connection
) -> None:
    stored = "SELECT title, status, user_id FROM tasks"
    title, alert = page.get_by_label("Title"), page.get_by_role("alert")
    status = page.get_by_role("status")
    with api() as program:
        traffic = browser.Traffic(program.address)
        await traffic.watch(page)
        await sign_up(page, program)
        await expect(status).to_have_text("Nothing to do yet.")

        await add(page, "Buy <b>bread</b>")
        await expect(title).to_have_value("Buy <b>bread</b>")
        await title.fill("Buy cake")
        await title.press("Enter")
        await page.get_by_role("checkbox", name="Buy cake").check()
        await expect(status).to_have_text("0 of 1 to do")
        owner = (await better_auth.sign_in("ada@example.com", PASSWORD)).user_id
        assert sql.execute(stored).fetchall() == [("Buy cake", "complete", owner)]

        await page.get_by_role("button", name="Sign out").click()
        await sign_in(page, "another password")
        await expect(alert).to_contain_text("Invalid email or password")
        await sign_in(page, PASSWORD)
        await expect(title).to_have_value("Buy cake")
        await expect(page.get_by_role("checkbox")).to_be_checked()
        await expect(alert).to_be_empty()

        await page.get_by_role("button", name="Delete Buy cake").click()
        await expect(status).to_have_text("Nothing to do yet.")
        assert sql.execute(stored).fetchall() == []
        # The browser sends one preflight for each address, because it caches the answer.
        await traffic.expect(
            ("OPTIONS", "/api/tasks", 204),
            ("GET", "/api/tasks", 200),
            ("POST", "/api/tasks", 201),
            ("OPTIONS", "/api/tasks/1", 204),
            ("PUT", "/api/tasks/1", 200),
            ("OPTIONS", "/api/tasks/1/complete", 204),
            ("PATCH", "/api/tasks/1/complete", 200),
            ("GET", "/api/tasks", 200),
            ("DELETE", "/api/tasks/1", 204),
        )


async def test_page_shows_the_message_of_a_400(
    api: Start, page: Page, sql: psycopg.Connection
) -> None:
    alert = page.get_by_role("alert")
    with api() as program:
        await sign_up(page, program)
        await add(page, "  ")
        await expect(alert).to_contain_text("Title is required")
        await expect(alert).to_contain_text("Status 400, request ")

        await add(page, "Buy bread")
        await expect(alert).to_be_empty()
        await page.get_by_label("Title").fill("")
        await page.get_by_label("Title").press("Enter")
        await expect(alert).to_contain_text("Title cannot be empty")
        await expect(page.get_by_label("Title")).to_have_value("Buy bread")
        assert sql.execute("SELECT title FROM tasks").fetchall() == [("Buy bread",)]


async def test_page_shows_the_message_of_a_401(api: Start, page: Page) -> None:
    with api(BETTER_AUTH_AUDIENCE="https://another.example") as program:
        await sign_up(page, program)
        alert = page.get_by_role("alert")
        await expect(alert).to_contain_text("A valid bearer token is required")
        await expect(alert).to_contain_text("Status 401, request ")


async def test_page_shows_the_message_of_a_500(
    api: Start, page: Page, postgres: str, database_url: str
) -> None:
    alert = page.get_by_role("alert")
    with api() as program:
        await sign_up(page, program)
        await expect(page.get_by_role("status")).to_have_text("Nothing to do yet.")
        with unreachable(postgres, database_url):
            await add(page, "Buy bread")
            await expect(alert).to_contain_text("Internal server error")
            await expect(alert).to_contain_text("Try again in 1 s. Status 500, request ")
        await page.get_by_role("button", name="Add").click()
        await expect(page.get_by_label("Title")).to_have_value("Buy bread")
        await expect(alert).to_be_empty()


@contextmanager
def unreachable(postgres: str, database_url: str) -> Iterator[None]:
    """Close all connections to a database, and refuse new ones."""
    name = urlsplit(database_url).path[1:]
    with psycopg.connect(postgres, autocommit=True) as administrator:
        administrator.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false".encode())
        administrator.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [name]
        )
        yield
        administrator.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true".encode())


async def test_page_can_read_the_response_headers(
    api: Start, page: Page, better_auth: Issuer
) -> None:
    session = await better_auth.sign_up("ada@example.com", PASSWORD, "Ada")
    good = {"Authorization": f"Bearer {await better_auth.token(session)}"}
    with api() as program:
        tasks = f"{program.address}/api/tasks"
        await page.goto(ORIGIN)

        created = await page.evaluate(
            FETCH,
            [
                tasks,
                {
                    "method": "POST",
                    "headers": {
                        **good,
                        "Content-Type": "application/json",
                        "X-Request-ID": "from-the-page",
                    },
                    "body": '{"title": "Buy bread"}',
                },
            ],
        )
        assert (created["type"], created["status"]) == ("cors", 201)
        assert created["headers"]["location"] == "/api/tasks/1"
        assert created["headers"]["x-request-id"] == "from-the-page"

        bad = {"Authorization": "Bearer none"}
        for headers, challenge in ((bad, 'Bearer error="invalid_token"'), ({}, "Bearer")):
            refused = await page.evaluate(FETCH, [tasks, {"headers": headers}])
            assert refused["status"] == 401
            assert refused["headers"]["www-authenticate"] == challenge


async def test_page_on_an_unlisted_origin_cannot_read_answers(
    api: Start, page: Page, sql: psycopg.Connection
) -> None:
    with api(CORS_ORIGINS="http://localhost:3999") as program:
        traffic = browser.Traffic(program.address)
        await traffic.watch(page)
        await sign_up(page, program)
        await expect(page.get_by_role("alert")).to_have_text(UNREADABLE)
        await add(page, "Buy bread")
        await expect(page.get_by_role("listitem")).to_have_count(0)
        await traffic.expect(
            ("OPTIONS", "/api/tasks", 400),
            ("GET", "/api/tasks", 0),
            ("OPTIONS", "/api/tasks", 400),
            ("POST", "/api/tasks", 0),
        )
        assert sql.execute("SELECT FROM tasks").fetchall() == []


async def test_same_page_on_another_origin_cannot_read_answers(
    api: Start, page: Page, better_auth: Issuer
) -> None:
    """Another host name is another origin, even for the same page on the same machine."""
    session = await better_auth.sign_up("ada@example.com", PASSWORD, "Ada")
    good = {"Authorization": f"Bearer {await better_auth.token(session)}"}
    with api() as program:
        traffic = browser.Traffic(program.address)
        await traffic.watch(page)
        tasks, health = f"{program.address}/api/tasks", f"{program.address}/health"

        await page.goto(ORIGIN)
        for address, options in ((tasks, {"headers": good}), (health, {})):
            assert (await page.evaluate(FETCH, [address, options]))["status"] == 200
        await traffic.expect(
            ("OPTIONS", "/api/tasks", 204), ("GET", "/api/tasks", 200), ("GET", "/health", 200)
        )

        await page.goto(f"http://127.0.0.1:{browser.PORT}")
        for address, options in ((tasks, {"headers": good}), (tasks, {}), (health, {})):
            assert await page.evaluate(FETCH, [address, options]) == "TypeError"
        opaque = await page.evaluate(FETCH, [health, {"mode": "no-cors"}])
        assert opaque == {"type": "opaque", "status": 0, "headers": {}, "text": ""}
        # The browser sends these requests and hides the answers. The failed preflight stops one.
        await traffic.expect(
            ("OPTIONS", "/api/tasks", 400),
            ("GET", "/api/tasks", 0),
            ("GET", "/api/tasks", 401),
            ("GET", "/health", 200),
            ("GET", "/health", 200),
        )
