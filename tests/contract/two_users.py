"""Our extensions of Schemathesis: the rules that the document states in words, and a second user.

JSON Schema could express most of them, but only in ways that break generated clients.
"""

import os
from typing import Any

import httpx2
import schemathesis
from pydantic import TypeAdapter

from todo_api.tasks.fields import BODY_FIELDS, TaskField, read_due_date
from todo_api.tasks.search import fold

DUE_DATES = ("2026-12-01", "0001-01-01", "2026-12-01T12:00:00.123456-11:30", "9999-12-31T23:59:59Z")
WRITABLE = {field.name for field in BODY_FIELDS}
CONDITIONAL = ("If-Match", "If-None-Match", "Idempotency-Key")

_client = httpx2.Client()


@schemathesis.hook
def map_case(_: schemathesis.HookContext, case: schemathesis.Case[Any]) -> schemathesis.Case[Any]:
    """Let valid requests also keep the rules that the descriptions state in words."""
    if "/tasks" not in case.path or (case.meta and not case.meta.generation.mode.is_positive):
        return case
    if case.path.endswith("/batch") and isinstance(case.body, dict):
        operations: Any = case.body["operations"]
        case.body = {**case.body, "operations": [keep_batch_rules(each) for each in operations]}
    elif isinstance(case.body, dict):
        changes = case.method in {"PUT", "PATCH"} and case.path.endswith("{id}")
        case.body = keep_rules(case.body, changes=changes)
    case.query = keep_query_rules(dict(case.query or {}))
    return case


@schemathesis.hook
def before_call(
    _: schemathesis.HookContext, case: schemathesis.Case[Any], kwargs: dict[str, Any]
) -> None:
    """Send no made-up tag, key or cursor, because a valid one comes from an earlier answer."""
    del kwargs
    if case.meta is None or case.meta.generation.mode.is_positive:
        for name in CONDITIONAL:
            case.headers.pop(name, None)
        for name in ("cursor", "since"):
            (case.query or {}).pop(name, None)


def keep_query_rules(query: dict[str, Any]) -> dict[str, Any]:
    """Return the parameters with a word to search for, and with days."""
    if "q" in query and not any(map(fold, str(query["q"])[:200].split())):
        query["q"] = "a"
    for name in ("due_from", "due_before"):
        if name in query and not is_due_date(str(query[name])):
            query[name] = DUE_DATES[0]
    if "q" in query:
        query["q"] = str(query["q"])[:200]
    if "wait" in query:
        query["wait"] = 1
    return query


def keep_batch_rules(operation: dict[str, Any]) -> dict[str, Any]:
    """Return the operation without a made-up version, and with a valid task."""
    kept = {name: value for name, value in operation.items() if name != "if_match"}
    if "task" in kept:
        kept["task"] = keep_rules(kept["task"], changes=kept["op"] == "update")
    return kept


def keep_rules(body: dict[str, Any], *, changes: bool) -> dict[str, Any]:
    """Return the body with valid values, agreeing members, and something to change."""
    body = dict(body)
    for field in BODY_FIELDS:
        if field.name in body and not is_valid(field, body[field.name]):
            body[field.name] = field.example
    if "status" in body and "completed" in body:
        body["completed"] = body["status"] == "complete"
    if changes and not body.keys() & WRITABLE:
        body["priority"] = "low"
    return body


def is_valid(field: TaskField, value: object) -> bool:
    """Tell whether the service accepts a value."""
    try:
        TypeAdapter(field.body).validate_python(value)
    except ValueError:
        return False
    return True


def is_due_date(text: str) -> bool:
    """Tell whether a text is a day or a timestamp with its offset."""
    try:
        read_due_date(text)
    except ValueError:
        return False
    return True


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
    answer = _client.request(case.method, url, headers=headers, content=content)
    assert (answer.status_code, answer.json()["code"]) == (404, "task_not_found")
