"""Validation of bodies. Ambiguous JSON is refused."""

import json
from typing import Any

import psycopg
import pytest

from support.problems import invalid_fields, problem
from support.service import Service

JSON = {"Content-Type": "application/json"}
MEDIA_TYPE = "Content-Type must be application/json, without a charset or with charset=utf-8"
MAXIMUM = 131_072


async def put_and_post(service: Service, body: bytes, headers: dict[str, str] | None = None) -> Any:
    """Send a wrong body with POST and PUT. Check that both have one status and change nothing."""
    task = await service.create("alice")
    before = (await service.request("GET", "/api/tasks", "alice")).json()
    post = await service.request(
        "POST", "/api/tasks", "alice", headers=headers or JSON, content=body
    )
    path = f"/api/tasks/{task['id']}"
    put = await service.request("PUT", path, "alice", headers=headers or JSON, content=body)
    assert post.status_code == put.status_code
    assert (await service.request("GET", "/api/tasks", "alice")).json() == before
    return post


NOT_STRICT_JSON = {
    "truncated": b'{"title": "a"',
    "trailing garbage": b'{"title": "a"} x',
    "two documents": b'{"title": "a"}{"title": "b"}',
    "single quotes": b"{'title': 'a'}",
    "trailing comma": b'{"title": "a",}',
    "comment": b'{"title": "a" /* b */}',
    "control character": b'{"title": "a\x01"}',
    "raw newline": b'{"title": "a\n"}',
    "byte-order mark": b'\xef\xbb\xbf{"title": "a"}',
    "invalid UTF-8": b'{"title": "\xff"}',
    "Latin-1": '{"title": "é"}'.encode("latin-1"),
    "encoded surrogate": b'{"title": "\xed\xa0\x80"}',
    "beyond Unicode": b'{"title": "\xf4\x90\x80\x80"}',
    "lone surrogate": b'{"title": "\\ud800"}',
    "lone surrogate in an unknown member": b'{"title": "a", "x": "\\udc00"}',
    "surrogates swapped": b'{"title": "\\udc00\\ud800"}',
    "UTF-16": '{"title": "a"}'.encode("utf-16"),
    "UTF-32": '{"title": "a"}'.encode("utf-32"),
    "NaN": b'{"title": "a", "x": NaN}',
    "Infinity": b'{"title": "a", "id": Infinity}',
    "minus Infinity": b'{"title": "a", "id": -Infinity}',
    "5,000 digits": b'{"title": "a", "id": ' + b"1" * 5000 + b"}",
    "leading zero": b'{"title": "a", "id": 01}',
    "duplicate member": b'{"title": "a", "title": "b"}',
    "duplicate by escape": b'{"title": "a", "\\u0074itle": "b"}',
    "nested duplicate": b'{"title": "a", "id": {"a": 1, "a": 1}}',
    "deep nesting": b'{"title": "a", "id": ' + b"[" * 900 + b"]" * 900 + b"}",
    "very deep nesting": b"[" * 100_000,
}


async def test_service_refuses_a_body_that_is_not_strict_json(
    service: Service, subtests: pytest.Subtests
) -> None:
    for name, body in NOT_STRICT_JSON.items():
        with subtests.test(name):
            response = await put_and_post(service, body)
            assert response.status_code == 400
            message = response.json()["error"]
            assert message.startswith("Body is not valid JSON: ")
            assert "line 1 column" in message or "line 2 column" in message


@pytest.mark.parametrize("body", [b"", b"null", b"[]", b'"a"', b"1", b"true", b"[{}]"])
async def test_service_refuses_a_body_that_is_not_an_object(service: Service, body: bytes) -> None:
    response = await put_and_post(service, body)
    assert (response.status_code, response.json()) == (
        400,
        problem("invalid_json", "Body must be a JSON object"),
    )


def some(*values: Any) -> tuple[Any, ...]:
    """Return values of any type as a tuple."""
    return values


FIELD_ERRORS: list[tuple[dict[str, Any], dict[str, str]]] = [
    *(
        ({"title": value}, {"title": "Title must be a string"})
        for value in some(1, True, 1.0, [], {}, ["a"])
    ),
    ({"title": "x" * 256}, {"title": "Title must be 255 characters or less"}),
    ({"title": "a\0b"}, {"title": "Title must not contain the NUL character"}),
    *(
        (
            {"title": "x", "description": value},
            {"description": "Description must be a string or null"},
        )
        for value in some(1, False, [], {})
    ),
    (
        {"title": "x", "description": "x" * 5001},
        {"description": "Description must be 5000 characters or less"},
    ),
    (
        {"title": "x", "description": "\0"},
        {"description": "Description must not contain the NUL character"},
    ),
    *(
        (
            {"title": "x", "status": value},
            {"status": "Invalid status value. Must be incomplete or complete"},
        )
        for value in some("pending", "completed", "", "Complete", None, 1, True, [], {})
    ),
    *(
        ({"title": "x", "completed": value}, {"completed": "completed must be true or false"})
        for value in some("yes", "true", 1, 0, 1.0, None, [], {})
    ),
    *(
        (
            {"title": "x", "priority": value},
            {"priority": "Invalid priority value. Must be low, medium, high or null"},
        )
        for value in some("urgent", "", "LOW", 1, True, [], {})
    ),
    *(
        (
            {"title": "x", "status": status, "completed": completed},
            {"status": "status and completed disagree: send one of them"},
        )
        for status, completed in (("complete", False), ("incomplete", True))
    ),
    *(
        ({"title": "x", name: 1}, {name: f"Unknown field: {name}"})
        for name in ("foo", "__proto__", "constructor", "model_config", "Title", "is_completed", "")
    ),
    (
        {
            "priority": 1,
            "title": "x" * 300,
            "foo": 1,
            "status": 3,
            "due_date": "x",
            "description": 5,
        },
        {
            "title": "Title must be 255 characters or less",
            "description": "Description must be a string or null",
            "status": "Invalid status value. Must be incomplete or complete",
            "priority": "Invalid priority value. Must be low, medium, high or null",
            "due_date": "Invalid due_date. Must be an RFC 3339 timestamp with an offset,"
            " or a date as YYYY-MM-DD",
            "foo": "Unknown field: foo",
        },
    ),
]


def field_code(value: Any, message: str) -> str:
    """Return the reason that belongs to a message about a value."""
    words = {
        "must be a string": "wrong_type",
        "characters or less": "too_long",
        "NUL": "invalid_text",
        "disagree": "conflict",
        "Unknown": "unknown_field",
        "true or false": "wrong_type",
    }
    of_type = "invalid_value" if isinstance(value, str) else "wrong_type"
    return next((code for word, code in words.items() if word in message), of_type)


async def test_wrong_fields_are_all_named(service: Service, subtests: pytest.Subtests) -> None:
    for body, fields in FIELD_ERRORS:
        with subtests.test(str(body)[:80]):
            response = await put_and_post(service, json.dumps(body).encode())
            assert response.status_code == 400
            codes = {name: field_code(body.get(name), fields[name]) for name in fields}
            assert response.json() == invalid_fields(fields, codes)
            assert list(response.json()["fields"]) == list(fields)


@pytest.mark.parametrize(
    "ignored",
    [
        *(b"1e400", b"[-1e400]", b'{"a": [1e400]}', b"1" + b"0" * 4000),
        *(b'"a\\u0000"', b'["\\u0000"]', b'{"\\u0000": 1}'),
    ],
)
async def test_service_refuses_ambiguous_values_even_in_ignored_members(
    service: Service, ignored: bytes
) -> None:
    response = await put_and_post(service, b'{"title": "a", "id": ' + ignored + b"}")
    assert (response.status_code, response.json()) == (
        400,
        problem("invalid_json", "Body is not valid JSON: text with NUL, or a number out of range"),
    )
    unknown = await put_and_post(service, b'{"title": "a", "x": 1e400}')
    assert unknown.json()["fields"] == {"x": "Unknown field: x"}


@pytest.mark.parametrize("title", [None, "", "   ", "\u00a0\u3000\t\n", "\x1c\x85\u2028"])
async def test_service_refuses_a_blank_title(service: Service, title: object) -> None:
    task = await service.create("alice")
    body = {"title": title, "description": "x"}
    post = await service.request("POST", "/api/tasks", "alice", json=body)
    assert (post.status_code, post.json()["error"]) == (400, "Title is required")
    assert post.json()["codes"] == {"title": "required" if title is None else "blank"}
    put = await service.request("PUT", f"/api/tasks/{task['id']}", "alice", json=body)
    assert (put.status_code, put.json()["error"]) == (400, "Title cannot be empty")
    assert put.json()["codes"] == {"title": "blank"}


async def test_service_refuses_a_missing_title(service: Service) -> None:
    message = "Title is required"
    for body in ({}, {"description": "x"}, {"id": 1}):
        response = await service.request("POST", "/api/tasks", "alice", json=body)
        assert response.json() == invalid_fields({"title": message}, {"title": "required"})


async def test_service_refuses_a_put_without_a_writable_field(service: Service) -> None:
    task = await service.create("alice")
    for body in ({}, {"id": 1, "user_id": "x", "created_at": None, "updated_at": []}):
        response = await service.request("PUT", f"/api/tasks/{task['id']}", "alice", json=body)
        assert (response.status_code, response.json()) == (
            *(400, problem("nothing_to_change", "At least one field must be provided")),
        )


TEXTS = [
    "😀" * 255,
    "\ufffe\uffff",
    "a\ufeffb",
    "\u202eabc\u200b\u200d",
    "e" + "\u0301" * 200,
    "'; DROP TABLE tasks;--",
    "%s %(x)s {0} ${jndi:ldap://x}",
    "<script>alert(1)</script>",
    "a\r\nlevel=error forged=1",
    "\\ \" ' ` \\u0000 \\n",
    "\x7f\x01\x1f",
    "NULL",
    "a\u2028\u2029b",
]


@pytest.mark.parametrize("text", TEXTS)
async def test_service_returns_text_unchanged(
    service: Service, sql: psycopg.Connection, text: str
) -> None:
    title = text.strip()
    for ascii_only in (True, False):
        body = json.dumps({"title": text, "description": text}, ensure_ascii=ascii_only)
        response = await service.request(
            "POST", "/api/tasks", "alice", headers=JSON, content=body.encode()
        )
        assert response.status_code == 201, response.text
        task = (await service.request("GET", response.headers["location"], "alice")).json()
        assert (task["title"], task["description"]) == (title, text)
        row = sql.execute("SELECT title, description FROM tasks WHERE id = %s", [task["id"]])
        assert row.fetchone() == (title, text)


async def test_service_accepts_the_longest_values(service: Service) -> None:
    task = await service.create("alice", title=" " + "😀" * 255 + " ", description="😀" * 5000)
    assert (len(task["title"]), len(task["description"])) == (255, 5000)


DUE_DATES = {
    "2026-11-21T12:34:56Z": "2026-11-21T12:34:56.000000Z",
    "2026-11-21t12:34:56.1z": "2026-11-21T12:34:56.100000Z",
    "2026-11-21T12:34:56.123456+05:30": "2026-11-21T07:04:56.123456Z",
    "2026-11-21T00:00:00-00:00": "2026-11-21T00:00:00.000000Z",
    "2024-02-29": "2024-02-29",
    "0001-01-01": "0001-01-01",
    "9999-12-31": "9999-12-31",
    "0001-01-01T05:00:00+05:00": "0001-01-01T00:00:00.000000Z",
    "9999-12-31T23:59:59.999999Z": "9999-12-31T23:59:59.999999Z",
}


@pytest.mark.parametrize(("sent", "shown"), DUE_DATES.items())
async def test_day_stays_a_day_and_an_instant_is_shown_in_utc(
    service: Service, sent: str, shown: str
) -> None:
    task = await service.create("alice", due_date=sent)
    assert task["due_date"] == shown
    again = await service.request("PUT", f"/api/tasks/{task['id']}", "alice", json=task)
    assert again.json() == task, "what a client received, it may send back"


async def test_due_date_changes_between_a_day_and_an_instant(service: Service) -> None:
    task = await service.create("alice", due_date="2026-12-01")
    path = f"/api/tasks/{task['id']}"
    for sent, shown in (
        ("2026-12-01T00:00:00Z", "2026-12-01T00:00:00.000000Z"),
        ("2026-12-01", "2026-12-01"),
        (None, None),
    ):
        changed = await service.request("PUT", path, "alice", json={"due_date": sent})
        assert changed.json()["due_date"] == shown
        assert changed.json()["version"] > task["version"]
        task = changed.json()


NO_DUE_DATES: list[object] = [
    *("", "tomorrow", "2026-11-21T12:34:56", "2026-11-21 12:34:56Z", "2026-11-21T12:34Z"),
    *("2026-11-21T24:00:00Z", "2026-11-21T23:59:60Z", "2026-13-01", "2026-02-30", "2026-1-1"),
    *("2026-11-21T12:34:56.1234567Z", "2026-11-21T12:34:56.Z", "2026-11-21T12:34:56+0530"),
    *("2026-11-21T12:34:56+24:00", "2026-11-21T12:34:56+05:60", "20261121", "2026-W47-6"),
    *("0001-01-01T00:00:00+00:01", "9999-12-31T23:59:59-00:01", "0000-01-01", "-2026-01-01"),
    *("2026-11-21T12:34:56Z ", "２０２６-11-21", "2026-11-21\n", "1e9", "10000-01-01"),
    *(5, 1.5, True, [], {}),
]


async def test_service_refuses_a_due_date_in_another_format(
    service: Service, subtests: pytest.Subtests
) -> None:
    for due_date in NO_DUE_DATES:
        with subtests.test(str(due_date)):
            body = {"title": "x", "due_date": due_date}
            response = await put_and_post(service, json.dumps(body).encode())
            assert list(response.json()["fields"]) == ["due_date"]


async def test_service_accepts_a_body_up_to_the_limit_only(service: Service) -> None:
    start, end = b'{"title": "x", "id": "', b'"}'
    for extra, status in ((0, 201), (1, 413)):
        body = start + b"x" * (MAXIMUM - len(start) - len(end) + extra) + end
        response = await service.request("POST", "/api/tasks", "alice", headers=JSON, content=body)
        assert response.status_code == status
    assert response.json() == problem("body_too_large", "Body must be 131072 bytes or less")


async def test_service_refuses_a_chunked_body_over_the_limit(service: Service) -> None:
    sent = 0

    async def endless() -> Any:
        nonlocal sent
        while sent < 100 * MAXIMUM:
            sent += 4096
            yield b" " * 4096

    response = await service.request("POST", "/api/tasks", "alice", headers=JSON, content=endless())
    assert response.status_code == 413


@pytest.mark.parametrize(
    "content_type",
    [
        *(None, "", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"),
        *("application/vnd.x+json", "application/jsonp", "text/json", "application/json5"),
        *("application/json; charset=utf-7", 'application/json; charset="latin-1"'),
        *("application/json; charset=", "application/json; charset=utf-8; charset=utf-16"),
        *("application/json; charset*=utf-8''x", "application/json; charset*=x"),
        *("application/json; charset*0=utf-8", "application/json; charset*0*=utf-8''utf-8"),
        "application/json; charset=utf-8; charset*=utf-8''utf-8",
        "application/json; CHARSET=UTF-16",
    ],
)
async def test_service_refuses_other_media_types(
    service: Service, content_type: str | None
) -> None:
    headers = {} if content_type is None else {"Content-Type": content_type}
    response = await put_and_post(service, b'{"title": "x"}', headers=headers or {"X-None": "1"})
    assert (response.status_code, response.json()) == (
        *(415, problem("unsupported_media_type", MEDIA_TYPE)),
    )


@pytest.mark.parametrize(
    "content_type",
    [
        *("application/json", "APPLICATION/JSON", "application/json; charset=utf-8"),
        *('application/json;charset="UTF-8"', "application/json; charset=utf8; profile=x"),
    ],
)
async def test_service_accepts_the_json_media_type(service: Service, content_type: str) -> None:
    response = await service.request(
        "POST",
        "/api/tasks",
        "alice",
        headers={"Content-Type": content_type},
        content=b'{"title": "x"}',
    )
    assert response.status_code == 201


async def test_service_refuses_two_content_type_headers(service: Service) -> None:
    response = await service.request(
        "POST",
        "/api/tasks",
        "alice",
        headers=[("Content-Type", "application/json"), ("Content-Type", "application/json")],
        content=b'{"title": "x"}',
    )
    assert (response.status_code, response.json()) == (
        *(415, problem("unsupported_media_type", "Send one Content-Type header")),
    )


async def test_service_refuses_a_compressed_body(service: Service) -> None:
    response = await service.request(
        "POST",
        "/api/tasks",
        "alice",
        headers={**JSON, "Content-Encoding": "gzip"},
        content=b"\x1f\x8b",
    )
    assert response.status_code == 415


async def test_service_refuses_ten_thousand_members(service: Service) -> None:
    body = json.dumps({f"x{n}": 0 for n in range(10_000)}).encode()
    response = await put_and_post(service, body[:MAXIMUM] if len(body) > MAXIMUM else body)
    assert response.status_code in {400, 413}
