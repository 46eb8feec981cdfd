"""The pages `/` and `/docs` in a real browser, with the program in development mode."""

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, TypeAlias

import pytest

from support import browser
from support.program import Program, serving
from support.requirements import need
from todo_api.development import USERS

need(browser.missing())

from playwright.async_api import Browser, Locator, Page, expect  # noqa: E402  may be missing

DESKTOP = {"width": 1280, "height": 900}
PHONE = {"width": 390, "height": 844}
FIRST, SECOND = USERS
"""The first has no tasks. Tests that create some sign in as the second."""

Open: TypeAlias = Callable[..., AbstractAsyncContextManager[Page]]


@pytest.fixture(scope="module")
async def chromium() -> AsyncIterator[Browser]:
    async with browser.running() as running:
        yield running


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    """The program as `make run` starts it, with an embedded database."""
    with serving(tmp_path_factory.mktemp("developer"), LOG_LEVEL="warning") as running:
        yield running


@pytest.fixture
def opened(chromium: Browser, program: Program) -> Open:
    """Return what opens a tab of a new profile.

    The test fails if a page asks another host, breaks its policy, or writes an error to the
    console.
    """

    @asynccontextmanager
    async def open_tab(**options: Any) -> AsyncIterator[Page]:
        context = await chromium.new_context(**{"viewport": DESKTOP, **options})
        context.set_default_timeout(10_000)
        tab = await context.new_page()
        wrong: list[str] = []
        tab.on("pageerror", lambda error: wrong.append(str(error)))
        tab.on(
            "console",
            lambda message: wrong.append(message.text) if message.type == "error" else None,
        )
        tab.on(
            "request",
            lambda request: (
                None if request.url.startswith(f"{program.address}/") else wrong.append(request.url)
            ),
        )
        await tab.add_init_script(
            "addEventListener('securitypolicyviolation', (event) =>"
            " console.error(`policy: ${event.violatedDirective} ${event.blockedURI}`))"
        )
        yield tab
        await context.close()
        assert wrong == []

    return open_tab


async def open_docs(page: Page, program: Program) -> None:
    await page.goto(f"{program.address}/docs")
    await expect(page.locator(".opblock").first).to_be_visible()


def operation(page: Page, name: str) -> Locator:
    return page.locator(f"#operations-{name}")


async def unfold(page: Page, name: str) -> Locator:
    """Open an operation with everything in it, and return it."""
    opened = operation(page, name)
    await opened.locator(".opblock-summary-control").click()
    await opened.get_by_role("button", name="Try it out").click()
    while await opened.locator(".folded").count():
        await opened.locator(".folded").first.click()
    for each in await opened.locator(".folded-headers summary").all():
        await each.click()
    return opened


async def execute(page: Page, name: str) -> Locator:
    """Send an operation as it stands, and return the answer."""
    opened = operation(page, name)
    await opened.locator(".opblock-summary-control").click()
    await opened.get_by_role("button", name="Try it out").click()
    await opened.get_by_role("button", name="Execute").click()
    return opened.locator(".live-responses-table tbody")


async def assert_fits(page: Page) -> None:
    wide = "[...document.querySelectorAll('main *')].filter(e =>"
    wide += " e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 90))"
    width = await page.evaluate("document.scrollingElement.scrollWidth")
    assert width <= await page.evaluate("innerWidth"), await page.evaluate(wide)


async def test_home_leads_to_the_docs(opened: Open, program: Program) -> None:
    async with opened() as page:
        await page.goto(program.address)
        await expect(page.get_by_role("heading", name="todo-api")).to_be_visible()
        await page.get_by_role("link", name="Docs").click()
        await expect(page.get_by_role("heading", name="Get a token")).to_be_visible()
        await expect(page.locator(".opblock")).to_have_count(25)


async def test_try_it_out_works_with_the_ready_token_of_each_user(
    opened: Open, program: Program
) -> None:
    async with opened() as page:
        await open_docs(page, program)
        status = page.get_by_role("status")
        await expect(status).to_have_text("No token yet: the API answers 401.")
        await page.get_by_role("button", name=f"Sign in as {SECOND}").click()
        await expect(status).to_contain_text(f"Requests are sent as {SECOND}, until ")
        answer = await execute(page, "tasks-create_task")
        await expect(answer.locator(".response-col_status")).to_have_text("201")
        await expect(answer).to_contain_text(f'"user_id": "{SECOND}"')
        answer = await execute(page, "tasks-list_tasks")
        await expect(answer.locator(".response-col_status")).to_have_text("200")
        await expect(answer).to_contain_text('"title": "Buy groceries"')

        await page.get_by_role("button", name=f"Sign in as {FIRST}").click()
        await expect(status).to_contain_text(f"Requests are sent as {FIRST}, until ")
        execute_again = operation(page, "tasks-list_tasks").get_by_role("button", name="Execute")
        await execute_again.click()
        await expect(answer.locator(".microlight").first).to_have_text("[]")


async def test_token_survives_a_reload_and_ends_with_the_tab(
    opened: Open, program: Program
) -> None:
    async with opened() as page:
        await open_docs(page, program)
        field = page.get_by_label("Put it here")
        await field.fill(f"  Bearer {program.example_token} ")
        await field.press("Enter")
        await expect(field).to_have_value(program.example_token)
        address = page.url
        await page.reload()
        await expect(field).to_have_value(program.example_token)
        assert page.url == address
        answer = await execute(page, "tasks-list_tasks")
        await expect(answer.locator(".response-col_status")).to_have_text("200")
        assert await page.evaluate("localStorage.length") == 0
        assert await page.evaluate("document.cookie") == ""
        tab = await page.context.new_page()
        await open_docs(tab, program)
        await expect(tab.get_by_label("Put it here")).to_have_value("")
        await tab.close()

        await page.get_by_role("button", name="Forget").click()
        await page.reload()
        await expect(field).to_have_value("")
        assert await page.evaluate("sessionStorage.length") == 0


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("abc", "This is not a token of a user."),
        ("e30.e30.e30", "This is not a token of a user."),
        ("e30.eyJzdWIiOiJhZGEiLCJleHAiOjF9.e30", "The token of ada has expired."),
    ],
)
async def test_page_says_what_is_wrong_with_a_token(
    opened: Open, program: Program, text: str, shown: str
) -> None:
    async with opened() as page:
        await open_docs(page, program)
        field = page.get_by_label("Put it here")
        await field.fill(text)
        await field.press("Enter")
        await expect(page.get_by_role("status")).to_have_text(shown)


@pytest.mark.parametrize("viewport", [PHONE, DESKTOP], ids=["phone", "desktop"])
async def test_nothing_is_wider_than_the_window(
    opened: Open, program: Program, viewport: dict[str, int]
) -> None:
    async with opened(viewport=viewport) as page:
        await page.goto(program.address)
        await assert_fits(page)
        await open_docs(page, program)
        await assert_fits(page)
        await page.get_by_role("button", name=f"Sign in as {SECOND}").click()
        for name in ("tasks-create_task", "user_tasks-complete_user_task", "health-readyz"):
            await unfold(page, name)
            await assert_fits(page)
        answer = operation(page, "tasks-create_task")
        await answer.get_by_role("button", name="Execute").click()
        await expect(answer.locator(".live-responses-table")).to_contain_text('"user_id"')
        await assert_fits(page)
        await page.get_by_role("button", name="Schemas").click()
        await assert_fits(page)


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_pages_follow_the_colours_of_the_system(
    opened: Open, program: Program, scheme: str
) -> None:
    async with opened(color_scheme=scheme) as page:
        for path in ("/", "/docs"):
            await page.goto(f"{program.address}{path}")
            await assert_colours(page, "body", scheme)
        await expect(page.locator(".opblock").first).to_be_visible()
        for part in (".guide", ".opblock-tag", ".opblock-summary-path", ".opblock-summary-control"):
            await assert_colours(page, part, scheme)
        other = "dark" if scheme == "light" else "light"
        await page.emulate_media(color_scheme=other)  # type: ignore[arg-type]  # a str
        await expect(page.locator("html.dark-mode")).to_have_count(int(other == "dark"))
        await assert_colours(page, ".opblock-summary-path", other)


COLOURS = """(element) => {
    const parts = (colour) => colour.match(/[\\d.]+/g).map(Number);
    const light = ([red, green, blue]) => (0.2126 * red + 0.7152 * green + 0.0722 * blue) / 255;
    const back = (each) => {
        const colour = parts(getComputedStyle(each).backgroundColor);
        return (colour[3] ?? 1) < 0.5 && each.parentElement ? back(each.parentElement) : colour;
    };
    return [light(parts(getComputedStyle(element).color)), light(back(element))];
}"""


async def assert_colours(page: Page, selector: str, scheme: str) -> None:
    text, back = await page.locator(selector).first.evaluate(COLOURS)
    dark, light = (back, text) if scheme == "dark" else (text, back)
    assert dark < 0.35, (selector, text, back)
    assert light > 0.65, (selector, text, back)


async def test_second_visit_loads_no_file_again(opened: Open, program: Program) -> None:
    async with opened() as page:
        await open_docs(page, program)
        sizes = "performance.getEntriesByType('resource').map(e => [e.name, e.transferSize])"
        first = dict(await page.evaluate(sizes))
        await page.goto(f"{program.address}/")
        await open_docs(page, program)
        again = dict(await page.evaluate(sizes))
        files = {name for name in again if "/docs/files/" in name}
        assert len(files) >= 4
        assert {name: again[name] for name in files} == dict.fromkeys(files, 0)
        assert sum(first.values()) < 500_000


async def test_erasing_the_user_stands_in_a_section_of_its_own_at_the_end(
    opened: Open, program: Program
) -> None:
    async with opened() as page:
        await open_docs(page, program)
        sections = page.locator(".opblock-tag-section")
        assert await sections.locator("h3").evaluate_all("all => all.map(e => e.dataset.tag)") == [
            *("tasks", "user tasks", "health", "account")
        ]
        erasing = page.locator(".opblock", has_text="/account")
        await expect(erasing).to_have_count(2)
        await expect(sections.last.locator(".opblock")).to_have_count(2)
        await expect(sections.last).to_contain_text("Erase the user with everything they own")
