"""Every user sees only their own tasks."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import psycopg
import pytest
from pydantic import SecretStr

from support import service as support
from support.problems import problem
from support.service import Service, running_service
from todo_api.app import create_app
from todo_api.database.statement import Statement
from todo_api.tasks import owned_tasks, statements
from todo_api.tasks.fields import WRITABLE

PUBLIC = {"/health", "/livez", "/readyz"}

OPERATIONS: dict[tuple[str, str], dict[str, Any] | None] = {
    ("GET", "/tasks"): None,
    ("POST", "/tasks"): {"title": "mine"},
    ("POST", "/tasks/batch"): {"operations": [{"op": "create", "task": {"title": "mine"}}]},
    ("GET", "/tasks/changes"): None,
    ("GET", "/tasks/{id}"): None,
    ("PUT", "/tasks/{id}"): {"title": "stolen"},
    ("DELETE", "/tasks/{id}"): None,
    ("PATCH", "/tasks/{id}/complete"): {"completed": True},
    ("PATCH", "/tasks/{id}"): {"title": "stolen"},
    ("PATCH", "/tasks/{id}/status"): {"status": "complete"},
    ("DELETE", "/account"): None,
}
"""Each operation, with a body that it accepts."""

TWO_USER_CASES = [
    (verb, prefix + path, body)
    for (verb, path), body in OPERATIONS.items()
    for prefix in ("/api", "/api/{user_id}")
]


def checksum(sql: psycopg.Connection, user: str) -> Any:
    """Return a hash of the user's row and of all their tasks."""
    query = """
        SELECT md5(u::text || coalesce(string_agg(t::text, '' ORDER BY t.id), ''))
        FROM users AS u LEFT JOIN tasks AS t ON t.user_id = u.id WHERE u.id = %s GROUP BY u.*
    """
    return sql.execute(query, [user]).fetchone()


def test_every_route_is_public_or_has_a_two_user_case() -> None:
    app = create_app(support.settings(), "postgresql://")
    routes = {
        (verb.upper(), path)
        for path, operations in app.openapi()["paths"].items()
        for verb in operations
        if path not in PUBLIC
    }
    assert routes == {(verb, path) for verb, path, _ in TWO_USER_CASES}


@pytest.mark.parametrize(("verb", "path", "body"), TWO_USER_CASES)
async def test_user_gets_404_for_another_users_task(
    service: Service, sql: psycopg.Connection, verb: str, path: str, body: dict[str, Any] | None
) -> None:
    """For alice's task id, mallory gets the same bytes as for an unused id."""
    alices = await service.create("alice", title="secret")
    before = checksum(sql, "alice")
    answers = []
    for task_id in (alices["id"], 10**12):
        own_path = path.format(user_id="mallory", id=task_id)
        answers.append(await service.request(verb, own_path, "mallory", json=body))
    assert checksum(sql, "alice") == before
    if "{id}" in path:
        assert {answer.status_code for answer in answers} == {404}
        assert answers[0].content == answers[1].content
        assert answers[0].json() == problem("task_not_found", "Task not found")
    else:
        assert "alice" not in answers[0].text
        assert "secret" not in answers[0].text


@pytest.mark.parametrize(
    ("verb", "path", "body"), [case for case in TWO_USER_CASES if "{user_id}" in case[1]]
)
async def test_user_gets_403_for_another_users_path(
    service: Service, sql: psycopg.Connection, verb: str, path: str, body: dict[str, Any] | None
) -> None:
    """The 403 comes before the database and before the body, so mallory does not learn anything."""
    alices = await service.create("alice")
    before = checksum(sql, "alice")
    alices_path = path.format(user_id="alice", id=alices["id"])
    sent: list[dict[str, Any]] = [{"json": body}, {"content": b"not json"}]
    for options in sent:
        answer = await service.request(verb, alices_path, "mallory", **options)
        assert answer.status_code == 403
        assert answer.json() == problem("forbidden", "You can only access your own tasks")
        assert service.wire.round_trips == 0
    nobodys = await service.request(verb, path.format(user_id="nobody", id=5), "mallory")
    assert nobodys.content == answer.content
    assert checksum(sql, "alice") == before


async def test_applications_of_one_process_accept_only_their_own_tokens(
    service: Service, database_url: str, short_folder: Path
) -> None:
    """They share their routes."""
    await service.create("alice")
    other_secret = SecretStr("another secret of more than thirty-two bytes")
    folder = short_folder / "other"
    folder.mkdir()
    async with running_service(database_url, folder, better_auth_secret=other_secret) as other:
        assert (await other.request("GET", "/api/tasks", "alice")).status_code == 401
        assert (await service.request("GET", "/api/tasks", "alice")).status_code == 200


@pytest.mark.parametrize(
    "user_id",
    ["%2F", "a%2Fb", "..", "%2e%2e", ";", "%00", "%0d%0aX-A:%20b", "alice%00", "ALICE", "alice%20"],
)
async def test_odd_user_id_gets_403_or_404(service: Service, user_id: str) -> None:
    response = await service.request("GET", f"/api/{user_id}/tasks", "alice")
    assert response.status_code in {403, 404}


@pytest.mark.parametrize(
    "header",
    [
        *("X-Forwarded-User", "X-User-ID", "X-Original-URL", "X-Rewrite-URL", "X-Forwarded-Host"),
        *("X-HTTP-Method-Override", "X-Forwarded-For", "Forwarded"),
    ],
)
async def test_header_changes_neither_the_user_nor_the_path(service: Service, header: str) -> None:
    task = await service.create("alice")
    headers = {header: "/api/alice/tasks" if "URL" in header else "alice", "Host": "x/api/alice"}
    response = await service.request("GET", "/api/tasks", "mallory", headers=headers)
    assert (response.status_code, response.json()) == (200, [])
    assert (await service.request("GET", f"/api/tasks/{task['id']}", "alice")).json() == task


async def test_service_ignores_an_owner_in_the_body(
    service: Service, sql: psycopg.Connection
) -> None:
    body = {"title": "x", "user_id": "alice", "id": 5, "created_at": "1999-01-01T00:00:00Z"}
    created = (await service.request("POST", "/api/tasks", "mallory", json=body)).json()
    path = f"/api/tasks/{created['id']}"
    changed = (await service.request("PUT", path, "mallory", json={**body, "title": "y"})).json()
    assert changed["user_id"] == created["user_id"] == "mallory"
    assert changed["created_at"] == created["created_at"] > "2026"
    assert sql.execute("SELECT user_id, id FROM tasks").fetchall() == [("mallory", created["id"])]


IF_MATCH = statements.Terms(if_match=True)
OWNER = rb"\$\d+::VARCHAR"
OWNER_PREDICATE = re.compile(
    rb"(?:\w+\.user_id|users\.id) = (" + OWNER + rb")"
    rb"|erasures\.user_hash = (\$\d+)"
)


def without_owner_predicate(statement: Statement) -> Statement:
    """Return a statement without the owner in its WHERE, as after a careless change."""
    sql = OWNER_PREDICATE.sub(
        lambda found: (found[1] or found[2] + b"::bytea") + b" IS NOT NULL", statement.sql
    )
    return replace(statement, name=b"careless_" + statement.name, sql=sql)


class CarelessStatements:
    """The module `statements`, but its statements do not name the owner."""

    def __init__(self) -> None:
        self.stripped: list[bool] = []
        """For each statement, True if the owner was removed from it."""

    def __getattr__(self, name: str) -> Any:
        make = getattr(statements, name)

        def make_careless(*arguments: Any, **options: Any) -> Any:
            made = make(*arguments, **options)
            if not isinstance(made, Statement):
                return made
            careless = without_owner_predicate(made)
            if name != "begin_owner":  # a function, which gets the owner as an argument
                self.stripped.append(careless.sql != made.sql)
            return careless

        return make_careless


@pytest.mark.parametrize(("verb", "path", "body"), TWO_USER_CASES)
@pytest.mark.parametrize("row_security", [True, False])
async def test_row_security_protects_tasks_if_a_statement_forgets_the_owner(
    database_url: str,
    short_folder: Path,
    sql: psycopg.Connection,
    monkeypatch: pytest.MonkeyPatch,
    verb: str,
    path: str,
    body: dict[str, Any] | None,
    row_security: bool,
) -> None:
    """The same statement leaks rows only if row security is off."""
    careless = CarelessStatements()
    async with running_service(database_url, short_folder, row_security=row_security) as service:
        alices = await service.create("alice", title="secret")
        before = checksum(sql, "alice")
        monkeypatch.setattr(owned_tasks, "statements", careless)
        own_path = path.format(user_id="mallory", id=alices["id"])
        answer = await service.request(verb, own_path, "mallory", json=body)
    leaked = "secret" in answer.text or checksum(sql, "alice") != before
    assert careless.stripped
    assert all(careless.stripped)
    assert leaked is not row_security
    if verb == "POST":
        assert '"user_id":"mallory"' in answer.text
    elif row_security:
        assert answer.status_code == (404 if "{id}" in path else 204 if verb == "DELETE" else 200)


async def test_row_security_protects_tombstones_if_an_erasure_forgets_the_owner(
    service: Service, sql: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = await service.create("alice")
    await service.request("DELETE", f"/api/tasks/{task['id']}", "alice")
    erasure = statements.erase_owner()
    careless = erasure.after(*map(without_owner_predicate, erasure.first))
    assert [each.name for each in careless.first if b"DELETE" in each.sql]
    monkeypatch.setattr(statements, "erase_owner", lambda: careless)
    await service.create("mallory")
    assert (await service.request("DELETE", "/api/account", "mallory")).status_code == 204
    assert sql.execute("SELECT user_id, task_id FROM tombstones").fetchall() == [
        ("alice", task["id"])
    ]
    assert sql.execute("SELECT id FROM users").fetchall() == [("alice",)]


async def test_every_statement_names_the_owner() -> None:
    """Once for each table that it reads or changes by owner. An INSERT has the owner as a value."""
    keyed = statements.Terms(keyed=True)
    writes = {
        statements.add_task(): 1,
        statements.lock_owner(): 1,
        statements.add_task(keyed): 4,
        statements.toggle_task(keyed): 5,
        statements.remove_task(keyed): 5,
        statements.forget_answer(): 1,
        statements.forget_answers(): 2,
        statements.toggle_task(): 2,
        statements.toggle_task(IF_MATCH): 2,
        statements.remove_task(): 2,
        statements.remove_task(IF_MATCH): 2,
        statements.forget_tombstones(): 4,
        statements.check_key(): 1,
        statements.take_versions(statements.Terms(keyed=True)): 2,
        statements.change_any(statements.Terms(keyed=True, batched=True)): 4,
        statements.add_task(statements.Terms(batched=True)): 1,
        statements.remove_task(statements.Terms(batched=True)): 2,
        **{statements.change_task(frozenset({name})): 2 for name in WRITABLE},
        **dict.fromkeys((*statements.erase_owner().first[1:], statements.erase_owner()), 1),
    }
    for statement, tables in writes.items():
        assert len(OWNER_PREDICATE.findall(statement.sql)) == tables, statement.sql
    reads = {
        statements.get_task(): 1,
        statements.get_versions(): 1,
        statements.find_changes(): 3,
        statements.why_not_written(): 2,
        **{
            statements.list_tasks(status, sort, order): 2
            for status in ("complete", "incomplete", None)
            for sort in ("created", "updated", "title", "due_date", "priority")
            for order in ("asc", "desc")
        },
    }
    for statement, tables in reads.items():
        assert len(OWNER_PREDICATE.findall(statement.sql)) == tables
        assert b" OR tasks.user_id" not in statement.sql
    assert b"INSERT INTO tasks (user_id" in statements.add_task().sql
    assert statements.add_task().parameters[0] == "owner"
