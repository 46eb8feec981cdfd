"""The calls of both front ends, exactly as they send them, and the answers as they read them.

The front end of feature 001 uses the user-scoped paths, that of feature 002 the token-scoped ones.
Both send `Content-Type: application/json` with every call, also without a body. Both show an
error's `detail`, or "An error occurred" where there is none.
"""

from typing import Any

import httpx2
import pytest

from support.service import ORIGIN, Service, token

USER = "exajExYu2kLr8vQpW3mTz6NcB1dHs5Ga"
USER_SCOPED = f"/api/{USER}/tasks"
TOKEN_SCOPED = "/api/tasks"
UNKNOWN_ID = 10**12


class FrontEnd:
    """A page in a browser, with its one function that sends and reads."""

    def __init__(self, service: Service, user: str = USER) -> None:
        self._service = service
        self._headers = {"Content-Type": "application/json", "Origin": ORIGIN}
        self._token = token(user)

    async def send(self, verb: str, path: str, body: str | None = None) -> httpx2.Response:
        """Send what `fetch` sends, after the browser's preflight."""
        preflight = await self._service.request(
            "OPTIONS",
            path,
            headers={
                "Origin": ORIGIN,
                "Access-Control-Request-Method": verb,
                "Access-Control-Request-Headers": "authorization,content-type",
            },
        )
        assert preflight.status_code == 204
        headers = {**self._headers, "Authorization": f"Bearer {self._token}"}
        answer = await self._service.request(verb, path, headers=headers, content=body)
        assert answer.headers["access-control-allow-origin"] == ORIGIN
        return answer

    async def call(self, verb: str, path: str, body: str | None = None) -> Any:
        """Return the JSON of an answer, nothing of a 204, or raise the error that is shown."""
        answer = await self.send(verb, path, body)
        if answer.is_error:
            raise ShownError(answer.json().get("detail") or "An error occurred")
        return None if answer.status_code == 204 else answer.json()


class ShownError(Exception):
    """What the user reads."""


@pytest.fixture
def page(service: Service) -> FrontEnd:
    return FrontEnd(service)


async def test_front_end_of_feature_001(page: FrontEnd) -> None:
    assert await page.call("GET", USER_SCOPED) == []
    task = await page.call(
        "POST", USER_SCOPED, '{"title":"Buy groceries","description":"Oat milk"}'
    )
    assert task["id"] > 0
    assert task["user_id"] == USER
    assert (task["title"], task["description"]) == ("Buy groceries", "Oat milk")
    assert task["status"] == "incomplete"
    one = f"{USER_SCOPED}/{task['id']}"
    assert await page.call("GET", one) == task
    assert await page.call("GET", USER_SCOPED) == [task]

    renamed = await page.call("PUT", one, '{"title":"Buy bread","description":null}')
    assert (renamed["title"], renamed["description"]) == ("Buy bread", None)

    done = await page.call("PATCH", f"{one}/status", '{"status":"complete"}')
    assert done["status"] == "complete"
    assert await page.call("PATCH", f"{one}/status", '{"status":"complete"}') == done
    assert await page.call("PATCH", f"{one}/complete") == done
    again = await page.call("PATCH", f"{one}/status", '{"status":"incomplete"}')
    assert again["status"] == "incomplete"

    assert await page.call("DELETE", one) is None
    assert await page.call("GET", USER_SCOPED) == []


async def test_front_end_of_feature_002(page: FrontEnd) -> None:
    first = await page.call("POST", TOKEN_SCOPED, '{"title":"Zebra","priority":"low"}')
    second = await page.call(
        "POST",
        TOKEN_SCOPED,
        '{"title":"apple","priority":"high","due_date":"2026-12-01","completed":false}',
    )
    assert (second["priority"], second["due_date"]) == ("high", "2026-12-01")
    one = f"{TOKEN_SCOPED}/{first['id']}"
    assert await page.call("GET", one) == first

    done = await page.call("PATCH", f"{one}/complete")
    assert done["completed"] is True
    lists = {
        "": [second, done],
        "?status=all&sort=created": [second, done],
        "?status=pending": [second],
        "?status=completed&sort=created": [done],
        "?sort=title": [second, done],
        "?status=all&sort=title&order=desc": [done, second],
        "?sort=due_date": [second, done],
        "?sort=priority&order=asc": [done, second],
    }
    for query, tasks in lists.items():
        assert await page.call("GET", f"{TOKEN_SCOPED}{query}") == tasks, query
    assert (await page.call("PATCH", f"{one}/complete"))["completed"] is False

    changed = await page.call("PUT", one, '{"title":"Quagga","completed":true}')
    assert (changed["title"], changed["completed"]) == ("Quagga", True)
    assert await page.call("DELETE", one) is None
    assert await page.call("GET", TOKEN_SCOPED) == [second]


SHOWN = [
    ("POST", "", '{"title":""}', "Title is required"),
    ("POST", "", '{"description":"no title"}', "Title is required"),
    ("POST", "", f'{{"title":"{"x" * 256}"}}', "Title must be 255 characters or less"),
    ("PUT", "/{id}", '{"title":""}', "Title cannot be empty"),
    ("PUT", "/{id}", "{}", "At least one field must be provided"),
    ("PATCH", "/{id}/status", '{"status":"pending"}', "Invalid status value. Must be incomplete"),
    ("GET", "/abc", None, "Invalid task ID"),
    ("GET", f"/{UNKNOWN_ID}", None, "Task not found"),
    ("PUT", f"/{UNKNOWN_ID}", '{"title":"x"}', "Task not found"),
    ("DELETE", f"/{UNKNOWN_ID}", None, "Task not found"),
    ("PATCH", f"/{UNKNOWN_ID}/complete", None, "Task not found"),
    ("PATCH", f"/{UNKNOWN_ID}/status", '{"status":"complete"}', "Task not found"),
    ("GET", "?status=open", None, "Invalid status value. Must be all"),
]


@pytest.mark.parametrize("tasks", [USER_SCOPED, TOKEN_SCOPED])
@pytest.mark.parametrize(("verb", "path", "body", "message"), SHOWN)
async def test_front_end_shows_the_message(
    service: Service, page: FrontEnd, tasks: str, verb: str, path: str, body: str, message: str
) -> None:
    task = await service.create(USER)
    with pytest.raises(ShownError) as shown:
        await page.call(verb, tasks + path.format(id=task["id"]), body)
    assert str(shown.value).startswith(message)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (USER_SCOPED, "You can only access your own tasks"),
        (f"{TOKEN_SCOPED}/{{id}}", "Task not found"),
    ],
)
async def test_another_user_is_told_so(service: Service, path: str, message: str) -> None:
    task = await service.create(USER)
    with pytest.raises(ShownError, match=message):
        await FrontEnd(service, "mallory").call("GET", path.format(id=task["id"]))


@pytest.mark.parametrize("tasks", [USER_SCOPED, TOKEN_SCOPED])
async def test_front_end_sends_the_user_to_the_sign_in(service: Service, tasks: str) -> None:
    """Both look at the status alone: 401 means to sign in again."""
    answer = await service.request(
        "GET", tasks, headers={"Content-Type": "application/json", "Origin": ORIGIN}
    )
    assert answer.status_code == 401
    assert answer.json()["detail"] == "A valid bearer token is required"
