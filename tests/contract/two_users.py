"""A custom check for Schemathesis: another user gets 404 for a user's task."""

import os
from typing import Any

import httpx2
import schemathesis


@schemathesis.check
def another_user_finds_no_task(
    _: schemathesis.CheckContext, response: schemathesis.Response, case: schemathesis.Case[Any]
) -> None:
    """Repeat alice's successful request on her task as bob, and expect 404."""
    if "{id}" not in case.path or case.method == "OPTIONS" or response.status_code != 200:
        return
    url = str(response.request.url).replace("/api/alice/", "/api/bob/")
    headers = {
        "Authorization": f"Bearer {os.environ['BOBS_TOKEN']}",
        "Content-Type": "application/json",
    }
    body = response.request.body
    content = body if isinstance(body, bytes) else None
    answer = httpx2.request(case.method, url, headers=headers, content=content)
    assert (answer.status_code, answer.json()) == (404, {"error": "Task not found"})
