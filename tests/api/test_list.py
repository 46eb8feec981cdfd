"""Filters and sorts of a list."""

from collections.abc import Callable
from itertools import product
from typing import Any

import psycopg
import pytest

from support.problems import problem
from support.service import Service
from todo_api.tasks.search import fold

UNKNOWN = (
    "Unknown query parameter {}. Allowed are status, sort, order, limit, cursor, count, q,"
    " priority, due, due_from and due_before"
)
SORTS: dict[str, tuple[str, Callable[[dict[str, Any]], Any]]] = {
    "created": ("desc", lambda task: task["created_at"]),
    "updated": ("desc", lambda task: task["updated_at"]),
    "title": ("asc", lambda task: fold(task["title"])),
    "due_date": ("asc", lambda task: task["due_date"]),
    "priority": (
        "desc",
        lambda task: {None: None, "low": 1, "medium": 2, "high": 3}[task["priority"]],
    ),
}


def expected(tasks: list[dict[str, Any]], status: str, sort: str, order: str | None) -> list[int]:
    """Return the ids in the order of the contract."""
    default, key = SORTS[sort]
    wanted = {"pending": "incomplete", "completed": "complete"}.get(status, status)
    chosen = [task for task in tasks if wanted in {"all", task["status"]}]
    descending = (order or default) == "desc"
    some = [task for task in chosen if key(task) is not None]
    none = [task for task in chosen if key(task) is None]
    some.sort(key=lambda task: (key(task), task["id"]), reverse=descending)
    none.sort(key=lambda task: task["id"], reverse=descending)
    return [task["id"] for task in some + none]


@pytest.fixture
async def tasks(service: Service, sql: psycopg.Connection) -> list[dict[str, Any]]:
    """Tasks with ties and nulls in the sort keys, and another user's tasks between them."""
    made = []
    values = product(
        ["b", "A", "ä"],
        [None, "low", "high", "medium"],
        [None, "2026-05-01T00:00:00Z", "2026-05-01", "1999-01-01"],
    )
    for number, (title, priority, due_date) in enumerate(values):
        status = "complete" if number % 3 == 0 else "incomplete"
        made.append(
            await service.create(
                "alice", title=title, priority=priority, due_date=due_date, status=status
            )
        )
        await service.create("bob", title=title)
    sql.execute("UPDATE tasks SET created_at = date_trunc('day', now()) WHERE id % 3 = 0")
    sql.execute("UPDATE tasks SET updated_at = date_trunc('day', now()) WHERE id % 4 = 1")
    return [
        (await service.request("GET", f"/api/tasks/{task['id']}", "alice")).json() for task in made
    ]


async def test_every_combination_gives_a_total_order(
    service: Service, tasks: list[dict[str, Any]]
) -> None:
    statuses = ["all", "incomplete", "pending", "complete", "completed", None]
    for status, sort, order in product(statuses, [*SORTS, None], ["asc", "desc", None]):
        query = {"status": status, "sort": sort, "order": order}
        params = {name: value for name, value in query.items() if value}
        for path in ("/api/tasks", "/api/alice/tasks"):
            response = await service.request("GET", path, "alice", params=params)
            assert response.status_code == 200
            ids = [task["id"] for task in response.json()]
            assert ids == expected(tasks, status or "all", sort or "created", order), params


TITLES = [
    *("100", "Æ", "ae", "Äpfel", "apfel", "Đ", "déjà", "ei", "Ħ", "İ", "ı", "Łódź", "lodz", "ö"),
    *("Ø", "œ", "ß", "SS", "ﬁ", "fi", "þ", "th", "ÅNGSTRÖM", "Zoo", "Żoo", "А", "а", "日本", "Éa"),
]
IN_ORDER = [
    *("100", "Æ", "ae", "ÅNGSTRÖM", "Äpfel", "apfel", "Đ", "déjà", "Éa", "ei", "ﬁ", "fi", "Ħ"),
    *("İ", "ı", "Łódź", "lodz", "ö", "Ø", "œ", "ß", "SS", "þ", "th", "Zoo", "Żoo", "А", "а"),
    "日本",
]


async def test_titles_stand_as_a_reader_expects_them(
    service: Service, sql: psycopg.Connection
) -> None:
    """Whatever the database's collation, which is not even case-insensitive here."""
    for title in TITLES:
        await service.create("alice", title=title)
    response = await service.request("GET", "/api/tasks?sort=title", "alice")
    assert [task["title"] for task in response.json()] == IN_ORDER
    changed = next(task for task in response.json() if task["title"] == "Zoo")
    await service.request("PUT", f"/api/tasks/{changed['id']}", "alice", json={"title": "Ąoo"})
    assert sql.execute("SELECT title_key FROM tasks WHERE title = 'Ąoo'").fetchall() == [("aoo",)]


@pytest.mark.parametrize(
    ("query", "message"),
    [
        *(
            (
                f"status={value}",
                "Invalid status value. Must be all, incomplete, pending, complete or completed",
            )
            for value in ("", "done", "Complete", "%00", "%ff", "complete%20", "ALL", "\ud800")
        ),
        *(
            (
                f"sort={value}",
                "Invalid sort value. Must be created, updated, title, due_date or priority",
            )
            for value in ("", "id", "user_id", "title;DROP", "(select+1)", "Title")
        ),
        *(
            (f"order={value}", "Invalid order value. Must be asc or desc")
            for value in ("", "ASC", "up")
        ),
        *(
            (query, UNKNOWN.format(shown))
            for query, shown in (
                ("user_id=bob", "'user_id'"),
                ("status[]=all", "'status[]'"),
                ("Status=all", "'Status'"),
                ("x", "'x'"),
                ("=", "''"),
                ("%00%ff%c5%81=1", r"'\x00\udcff\u0141'"),
                ("a" * 999, repr("a" * 100)),
            )
        ),
        ("status=all&status=all", "The query parameter status must be given at most once"),
        ("sort=title&order=asc&sort=title", "The query parameter sort must be given at most once"),
    ],
)
async def test_service_refuses_a_wrong_parameter(
    service: Service, query: str, message: str
) -> None:
    response = await service.request(
        "GET",
        f"/api/tasks?{query}".encode("utf-8", "surrogatepass").decode("latin-1")
        if "\ud800" in query
        else f"/api/tasks?{query}",
        "alice",
    )
    assert (response.status_code, response.json()) == (400, problem("invalid_parameter", message))


async def test_service_refuses_very_many_parameters(service: Service) -> None:
    response = await service.request("GET", "/api/tasks?" + "a=1&" * 5000, "alice")
    assert response.status_code == 400


async def test_other_routes_ignore_parameters(service: Service) -> None:
    task = await service.create("alice")
    response = await service.request("GET", f"/api/tasks/{task['id']}?x=1&status=no", "alice")
    assert (response.status_code, response.json()) == (200, task)


async def test_list_larger_than_the_socket_buffer_is_complete(
    service: Service, sql: psycopg.Connection
) -> None:
    await service.create("alice")
    sql.execute(
        "INSERT INTO tasks (user_id, title, description, version)"
        " SELECT 'alice', 'number ' || n, repeat('x', 1000), 1 FROM generate_series(1, 2000) AS n"
    )
    response = await service.request("GET", "/api/tasks?sort=created&order=asc", "alice")
    assert len(response.json()) == 2001
