"""Our extensions of Schemathesis: the rules that JSON Schema cannot express, and a second user.

It could express that two members agree, but only in a way that no generator of clients understands.
"""

import os
from typing import Any

import httpx2
import schemathesis

WRITABLE = {"title", "description", "status", "completed", "priority", "due_date"}


@schemathesis.hook
def map_case(_: schemathesis.HookContext, case: schemathesis.Case[Any]) -> schemathesis.Case[Any]:
    """Let valid bodies also keep the rules that the descriptions state in words."""
    is_valid = case.meta is None or case.meta.generation.mode.is_positive
    if is_valid and isinstance(case.body, dict) and "/tasks" in case.path:
        case.body = keep_rules(case.body, changes=case.method == "PUT")
    return case


def keep_rules(body: dict[str, Any], *, changes: bool) -> dict[str, Any]:
    """Return the body with a visible title, agreeing members, and something to change."""
    body = dict(body)
    if isinstance(body.get("title"), str) and not body["title"].strip():
        body["title"] = "x"
    if "status" in body and "completed" in body:
        body["completed"] = body["status"] == "complete"
    if changes and not body.keys() & WRITABLE:
        body["priority"] = "low"
    return body


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
    assert (answer.status_code, answer.json()["code"]) == (404, "task_not_found")
