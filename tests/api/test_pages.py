"""Pages, search and filters of a list."""

import asyncio
import re
import unicodedata
from base64 import urlsafe_b64encode
from collections.abc import Callable
from itertools import chain, product
from random import Random
from typing import Any
from zlib import compress

import httpx2
import psycopg
import pytest

from support.problems import problem
from support.service import Service, bearer
from todo_api.tasks import query, schemas, search
from todo_api.tasks.search import fold

SORTS = ("created", "updated", "title", "due_date", "priority")
FAMILIES = ["/api/tasks", "/api/alice/tasks"]


async def ask(service: Service, path: str, user: str = "alice", **params: Any) -> httpx2.Response:
    return await service.request("GET", path, user, params=params)


async def pages(service: Service, path: str, user: str = "alice", **params: Any) -> list[list[int]]:
    """Follow the links from page to page, and return the ids on each."""
    found = []
    answer = await ask(service, path, user, **params)
    while True:
        assert answer.status_code == 200, answer.text
        found.append([task["id"] for task in answer.json()])
        if "link" not in answer.headers:
            return found
        link = re.fullmatch(r'<(/api/[^>]*)>; rel="next"', answer.headers["link"])
        assert link
        answer = await service.request("GET", link[1], user)


@pytest.fixture
async def tasks(service: Service, sql: psycopg.Connection) -> list[int]:
    """Tasks with ties and gaps in every key."""
    made = []
    dues = [None, "2026-05-01", "2026-05-01T00:00:00Z"]
    values = product(["b", "Ä", "a"], [None, "low", "high"], dues)
    for number, (title, priority, due_date) in enumerate(values):
        status = "complete" if number % 3 == 0 else "incomplete"
        task = await service.create(
            "alice", title=title, priority=priority, due_date=due_date, status=status
        )
        made.append(task["id"])
        await service.create("bob", title=title)
    sql.execute("UPDATE tasks SET created_at = date_trunc('day', now()) WHERE id % 3 = 0")
    sql.execute("UPDATE tasks SET updated_at = date_trunc('day', now()) WHERE id % 4 = 1")
    return made


@pytest.mark.parametrize(("sort", "order"), list(product(SORTS, ("asc", "desc"))))
async def test_pages_together_are_the_list(
    service: Service, tasks: list[int], sort: str, order: str
) -> None:
    for path, status in product(FAMILIES, ("all", "incomplete")):
        whole = await ask(service, path, sort=sort, order=order, status=status)
        expected = [task["id"] for task in whole.json()]
        for limit in (1, 4, 200):
            found = await pages(service, path, sort=sort, order=order, status=status, limit=limit)
            assert list(chain.from_iterable(found)) == expected
            assert {len(page) for page in found[:-1]} <= {limit}
    assert len(tasks) == 27


@pytest.mark.parametrize(("sort", "order"), list(product(SORTS, ("asc", "desc"))))
async def test_task_that_exists_throughout_is_on_exactly_one_page(
    service: Service, tasks: list[int], sort: str, order: str
) -> None:
    """Also while other tasks before and after it come and go."""
    others = [(await service.create("alice", title=title))["id"] for title in ("0", "z", "a")]
    seen: list[int] = []
    path = f"/api/tasks?sort={sort}&order={order}&limit=5"
    while path:
        answer = await service.request("GET", path, "alice")
        seen += [task["id"] for task in answer.json()]
        if others:
            await service.request("DELETE", f"/api/tasks/{others.pop()}", "alice")
        await service.create("alice", title="m", priority="medium", due_date="2026-04-01")
        link = answer.headers.get("link", "")
        path = link.partition(">")[0].removeprefix("<")
    assert sorted(each for each in seen if each in tasks) == sorted(tasks)


STEADY = 40
WALKS = 12


def made_up(draw: Random) -> dict[str, Any]:
    """Return a task with values that many others have too."""
    days = ("2026-05-01", "2026-05-02")
    return {
        "title": " ".join(draw.choices(("b", "Ä", "aa", "Zoo"), k=2)),
        "description": draw.choice((None, "straße b", "x")),
        "status": draw.choice(("incomplete", "complete")),
        "priority": draw.choice((None, "low", "medium", "high")),
        "due_date": draw.choice((None, *days, *(f"{day}T00:00:00Z" for day in days))),
    }


def made_up_filters(draw: Random) -> dict[str, str]:
    """Return the parameters of a list, each of which selects some tasks."""
    values = {
        "status": draw.choice(("all", "incomplete", "completed")),
        "priority": draw.choice(("low", "high", "none")),
        "q": draw.choice(("a", "ZOO", "strasse", "b a")),
        "due_from": draw.choice(("2026-05-01", "2026-05-02T00:00:00Z")),
        "due_before": draw.choice(("2026-05-02", "2026-05-02T00:00:01Z")),
        "due": "none",
    }
    return {name: values[name] for name in draw.sample(sorted(values), draw.randint(0, 2))}


def selects(filters: dict[str, str], task: dict[str, Any]) -> bool:
    """Return whether a list shows a task, as the description of the API says."""
    due = task["due_date"] and task["due_date"][:10]
    text = fold(f"{task['title']} {task['description'] or ''}")
    tests: dict[str, Callable[[str], bool]] = {
        "status": lambda value: value in {"all", task["status"], f"{task['status']}d"},
        "priority": lambda value: value == (task["priority"] or "none"),
        "q": lambda value: all(word in text for word in fold(value).split()),
        "due_from": lambda value: due is not None and due >= value[:10],
        "due_before": lambda value: due is not None and (due < value[:10] or len(value) > 10),
        "due": lambda _: due is None,
    }
    return all(tests[name](value) for name, value in filters.items())


def place(sort: str, order: str, task: dict[str, Any]) -> Any:
    """Return the key by which an order sorts a task, whose id breaks ties."""
    down = order == "desc"
    due = task["due_date"]
    ranks = {None: 0 if down else 4, "low": 1, "medium": 2, "high": 3}
    keys = {
        "created": task["created_at"],
        "updated": task["updated_at"],
        "title": fold(task["title"]),
        "due_date": ("" if down else "z") if due is None else f"{due:T<11}",
        "priority": ranks[task["priority"]],
    }
    return keys[sort], task["id"]


async def keep_writing(service: Service, draw: Random, end: asyncio.Event) -> None:
    """Create, change and delete tasks of alice until the end."""
    alice = bearer("alice")
    while not end.is_set():
        made = await service.client.post("/api/tasks", headers=alice, json=made_up(draw))
        assert made.status_code == 201, made.text
        path = made.headers["location"]
        if draw.random() < 0.5:
            await service.client.put(path, headers=alice, json=made_up(draw))
        if draw.random() < 0.8:
            await service.client.delete(path, headers=alice)


@pytest.mark.parametrize(("sort", "order"), list(product(SORTS, ("asc", "desc"))))
async def test_walk_shows_each_steady_task_once_and_in_order_while_others_write(
    service: Service, sort: str, order: str
) -> None:
    """Also with filters, and with another limit for each page."""
    draw = Random(f"{sort} {order}")  # noqa: S311  a repeatable test
    steady = {}
    for _ in range(STEADY):
        task = await service.create("alice", **made_up(draw))
        steady[task["id"]] = task
    async with asyncio.TaskGroup() as group:
        end = asyncio.Event()
        for seed in range(2):
            group.create_task(keep_writing(service, Random(seed), end))  # noqa: S311  repeatable
        for _ in range(WALKS):
            filters = made_up_filters(draw)
            matching = [task for task in steady.values() if selects(filters, task)]
            matching.sort(key=lambda task: place(sort, order, task), reverse=order == "desc")
            seen = await walk(service, draw, sort=sort, order=order, **filters)
            found = [task for task in seen if task["id"] in steady]
            assert found == matching, filters
        end.set()


async def walk(service: Service, draw: Random, **params: str) -> list[dict[str, Any]]:
    """Return the tasks of all pages, each page with a limit of its own."""
    seen = []
    path = str(httpx2.URL("/api/tasks", params={**params, "limit": "1"}))
    while path:
        path = path.replace("limit=1", f"limit={draw.choice((1, 3, 10))}")
        answer = await service.client.get(path, headers=bearer("alice"))
        assert answer.status_code == 200, answer.text
        seen += answer.json()
        assert len(seen) < 1000, "the walk does not end"
        link = answer.headers.get("link", "").partition(">")[0].removeprefix("<")
        path = re.sub(r"limit=\d+", "limit=1", link)
    return seen


async def test_limit_may_change_between_pages_and_a_cursor_alone_has_the_largest(
    service: Service, tasks: list[int]
) -> None:
    first = await ask(service, "/api/tasks", limit=2)
    cursor = re.search(r"cursor=([^&>]+)", first.headers["link"])
    assert cursor
    second = await ask(service, "/api/tasks", cursor=cursor[1], limit=3)
    rest = await ask(service, "/api/tasks", cursor=cursor[1])
    everything = [task["id"] for task in (await ask(service, "/api/tasks")).json()]
    assert [task["id"] for task in second.json()] == everything[2:5]
    assert [task["id"] for task in rest.json()] == everything[2:]
    assert "link" not in rest.headers
    assert len(everything) == len(tasks)


@pytest.mark.usefixtures("tasks")
async def test_cursor_of_another_list_or_user_is_refused(service: Service) -> None:
    answer = await ask(service, "/api/tasks", limit=2, sort="title")
    found = re.search(r"cursor=([^&>]+)", answer.headers["link"])
    assert found
    cursor = found[1]
    lists = [
        {"sort": "created"},
        {"sort": "title", "order": "desc"},
        {"sort": "title", "status": "complete"},
        {"sort": "title", "q": "a"},
        {"sort": "title", "priority": "low"},
        {"sort": "title", "due_from": "2026-01-01"},
    ]
    answers = [await ask(service, "/api/tasks", cursor=cursor, **each) for each in lists]
    answers.append(await ask(service, "/api/tasks", "bob", cursor=cursor, sort="title"))
    forged = ("", "x", "a" * 5000, cursor[:-1], cursor + "AAAA", "é", "%00", "=" * 9, "'")
    answers += [await ask(service, "/api/tasks", cursor=each, sort="title") for each in forged]
    message = "Invalid cursor. It must come from a Link of the same list, with the same parameters"
    for answer in answers:
        assert (answer.status_code, answer.json()) == (400, problem("invalid_parameter", message))
    same = await ask(service, "/api/alice/tasks", cursor=cursor, sort="title", order="asc")
    assert same.status_code == 200


@pytest.mark.parametrize(
    ("sort", "content"),
    [
        ("created", b'["2026-12-01T00:00:00+16:00",1]'),
        ("updated", b'["0001-01-02T00:00:00+23:59",1]'),
        ("due_date", b'["2026-12-01T00:00:00-23:59",true,1]'),
    ],
)
async def test_forged_cursor_with_an_odd_offset_is_read(
    service: Service, sort: schemas.Sort, content: bytes
) -> None:
    made = schemas.TaskQuery.model_construct(sort=sort)
    packed = compress(content)
    digest = query._digest(packed, made, "alice")
    cursor = urlsafe_b64encode(digest + packed).decode().rstrip("=")
    answer = await ask(service, "/api/tasks", sort=sort, cursor=cursor)
    assert (answer.status_code, answer.json()) == (200, [])


FORGED: list[tuple[str, bytes]] = [
    *(("created", content) for content in (b"", b"x", b"null", b"[]", b"{}", b'["x",1]', b"\xff")),
    ("created", b'["\\u0000",1]'),
    ("created", b'["2026-12-01",0]'),
    ("created", b'["2026-12-01",100000000000000000000]'),
    ("created", b'["2026-12-01",' + b"1" * 5000 + b"]"),
    ("updated", b'["2026-12-01","1"]'),
    ("title", b'["a\\u0000",1]'),
    ("title", b'["a",1,2]'),
    ("due_date", b'["2026-12-01",1,1]'),
    ("due_date", b'["2026-13-01",true,1]'),
    ("priority", b'["high",1]'),
    ("priority", b"[99,1]"),
]


@pytest.mark.parametrize(("sort", "content"), FORGED)
@pytest.mark.parametrize("pack", [compress, bytes])
async def test_forged_cursor_is_refused_although_its_digest_is_right(
    service: Service, sort: schemas.Sort, content: bytes, pack: Callable[[bytes], bytes]
) -> None:
    packed = pack(content)
    made = schemas.TaskQuery.model_construct(sort=sort)
    digest = query._digest(packed, made, "alice")
    cursor = urlsafe_b64encode(digest + packed).decode().rstrip("=")
    answer = await ask(service, "/api/tasks", sort=sort, cursor=cursor)
    assert answer.status_code == 400, answer.text
    assert answer.json()["code"] == "invalid_parameter"


@pytest.mark.parametrize("junk", ["=", "==", "!", "*", "\n"])
async def test_cursor_with_junk_is_refused(service: Service, tasks: list[int], junk: str) -> None:
    del tasks
    answer = await ask(service, "/api/tasks", limit=1)
    _, cursor = answer.headers["link"].split("cursor=")
    cursor = cursor.split(">")[0]
    for changed in (cursor + junk, cursor[:5] + junk + cursor[5:]):
        answer = await ask(service, "/api/tasks", limit=1, cursor=changed)
        assert answer.status_code == 400, changed


@pytest.mark.parametrize("letter", ["\ufdfa", "㌖", "\U0001f600"])
async def test_pages_by_title_can_be_followed_whatever_the_titles(
    service: Service, letter: str
) -> None:
    """A folded title can have eighteen times the characters of the title."""
    for _ in range(3):
        await service.create("alice", title=letter * 255)
    assert len(await pages(service, "/api/tasks", sort="title", limit=1)) == 3


async def test_count_is_that_of_all_matching_tasks(service: Service, tasks: list[int]) -> None:
    cases: list[tuple[dict[str, Any], int]] = [
        ({}, len(tasks)),
        ({"limit": 2}, len(tasks)),
        ({"limit": 2, "status": "complete"}, 9),
        ({"q": "nothing"}, 0),
    ]
    for params, total in cases:
        answer = await ask(service, "/api/tasks", count="true", **params)
        assert answer.headers["x-total-count"] == str(total)
    second = await ask(service, "/api/tasks", count="true", limit=20)
    link = second.headers["link"].partition(">")[0].removeprefix("<")
    assert (await service.request("GET", link, "alice")).headers["x-total-count"] == "27"
    assert "x-total-count" not in (await ask(service, "/api/tasks", count="false")).headers


async def test_page_that_has_not_changed_is_not_sent_again(
    service: Service, tasks: list[int]
) -> None:
    params: dict[str, Any] = {"limit": 2, "count": "true", "q": "a"}
    first = await ask(service, "/api/tasks", **params)
    headers = {"If-None-Match": first.headers["etag"]}
    again = await service.request("GET", "/api/tasks", "alice", params=params, headers=headers)
    assert (again.status_code, again.content) == (304, b"")
    assert tasks


TEXTS = [
    ("Buy Äpfel", "100% organic_juice"),
    ("Call Łukasz", None),
    ("straße", "back\\slash 'quote' \"double\""),
    ("Déjà vu", "SELECT * FROM tasks; -- .* [a-z]+"),
]


@pytest.mark.parametrize(
    ("q", "found"),
    [
        *[("apfel", [0]), ("ÄPFEL buy", [0]), ("buy vu", []), ("lukasz", [1]), ("Łuk", [1])],
        *[("STRASSE", [2]), ("deja", [3]), ("DÉJÀ  tasks", [3]), ("e", [0, 2, 3]), ("%", [0])],
        *[("_", [0]), ("\\", [2]), ("'", [2]), ('"', [2]), (".*", [3]), ("[a-z]", [3])],
        *[("´tasks", [3]), ("\u00a0VU\u3000", [3]), ("tasks\u2028from", [3])],
        *[("--", [3]), ("a%b", []), ("{", []), ("apf\u0308el", [0]), ("日", [])],
    ],
)
async def test_search_finds_tasks_with_every_word(
    service: Service, q: str, found: list[int]
) -> None:
    ids = [
        (await service.create("alice", title=title, description=description))["id"]
        for title, description in TEXTS
    ]
    await service.create("bob", title=q)
    answer = await ask(service, "/api/tasks", q=q, order="asc")
    assert [task["id"] for task in answer.json()] == [ids[each] for each in found]


async def test_search_stores_no_word_of_a_description_that_is_in_another_one(
    service: Service, sql: psycopg.Connection
) -> None:
    await service.create("alice", title="to to", description="Äpfel or\n APFEL fel or\tnot")
    stored = sql.execute("SELECT title_key, description_key FROM tasks").fetchall()
    assert stored == [("to to", "apfel not or")]


async def test_search_finds_each_part_of_a_long_description(
    service: Service, sql: psycopg.Connection
) -> None:
    letters = Random(7)  # noqa: S311 - texts for a test
    long = [
        " ".join("".join(letters.choices(alphabet, k=7)) for _ in range(600))
        for alphabet in ("abcdefghijkl", "бвгдежзийклм", "日月火水木金土年時分")
    ]
    ids = [(await service.create("alice", description=each))["id"] for each in long]
    filters = sql.execute("SELECT octet_length(description_filter) FROM tasks").fetchall()
    assert all(1000 < size <= 3800 for (size,) in filters)
    for length, start in product(range(1, 8), range(0, 4800, 400)):
        for each, task in zip(long, ids, strict=True):
            part = each[start + 7 - length : start + 7]
            answer = await ask(service, "/api/tasks", q=part)
            assert task in [found["id"] for found in answer.json()], part
    assert (await ask(service, "/api/tasks", q=f"{long[0][:3]} {long[1][:2]}")).json() == []


async def test_search_reads_no_long_description_whose_filter_lacks_the_word(
    service: Service, sql: psycopg.Connection
) -> None:
    await service.create("alice", description=" ".join(map(str, range(100_000, 100_400))))
    sql.execute("UPDATE tasks SET description_key = 'kiwi'")
    assert (await ask(service, "/api/tasks", q="kiwi")).json() == []
    sql.execute("UPDATE tasks SET description_filter = NULL")
    assert len((await ask(service, "/api/tasks", q="kiwi")).json()) == 1


@pytest.mark.parametrize("empty", ["", " \n", "\u0301"])
async def test_search_passes_over_a_description_without_words(service: Service, empty: str) -> None:
    await service.create("alice", title="bread", description=empty)
    milk = await service.create("alice", title="milk")
    answer = await ask(service, "/api/tasks", q="milk")
    assert [task["id"] for task in answer.json()] == [milk["id"]]


def test_marks_that_only_decompose_into_marks_go_before_the_decomposition() -> None:
    """A long run of them takes quadratic time to sort."""
    only_marks = [
        letter
        for letter in map(chr, range(0x110000))
        if all(map(unicodedata.combining, unicodedata.normalize("NFKD", letter)))
    ]
    assert len(only_marks) > 800
    assert search._without_marks("".join(only_marks)) == ""


async def test_short_description_has_no_filter(service: Service, sql: psycopg.Connection) -> None:
    task = await service.create("alice", description="long " + "x" * 4000)
    stored = "SELECT description_filter IS NULL FROM tasks"
    assert sql.execute(stored).fetchone() == (False,)
    body = {"description": "short " * 800}
    await service.request("PATCH", f"/api/tasks/{task['id']}", "alice", json=body)
    assert sql.execute(stored).fetchone() == (True,)


async def test_write_of_the_same_description_gives_it_a_filter_and_keeps_the_version(
    service: Service, sql: psycopg.Connection
) -> None:
    """Tasks from before a change of the filters have none."""
    body = {"description": "long " + "x" * 4000}
    task = await service.create("alice", **body)
    stored = "SELECT description_filter FROM tasks"
    before = sql.execute(stored).fetchall()
    sql.execute("UPDATE tasks SET description_filter = NULL")
    answer = await service.request("PATCH", f"/api/tasks/{task['id']}", "alice", json=body)
    assert answer.json() == task
    assert sql.execute(stored).fetchall() == before != [(None,)]


async def test_search_follows_changes(service: Service) -> None:
    task = await service.create("alice", description="before")
    path = f"/api/tasks/{task['id']}"
    await service.request("PATCH", path, "alice", json={"description": "after"})
    assert (await ask(service, "/api/tasks", q="before")).json() == []
    assert len((await ask(service, "/api/tasks", q="after")).json()) == 1
    await service.request("PATCH", path, "alice", json={"description": None})
    assert (await ask(service, "/api/tasks", q="after")).json() == []


async def test_filters_combine(service: Service) -> None:
    dues = [None, "2026-12-01", "2026-12-01T00:00:00Z", "2026-12-01T23:00:00-02:00", "2026-12-02"]
    ids = [
        (await service.create("alice", priority=priority, due_date=due))["id"]
        for due, priority in product(dues, (None, "high"))
    ]

    async def found(**params: str) -> set[int]:
        answer = await ask(service, "/api/tasks", **params)
        assert answer.status_code == 200, answer.text
        return {ids.index(task["id"]) for task in answer.json()}

    assert await found(priority="none") == {0, 2, 4, 6, 8}
    assert await found(priority="high", due="none") == {1}
    assert await found(due_from="2026-12-01", due_before="2026-12-02") == {2, 3, 4, 5}
    assert await found(due_from="2026-12-02T01:00:00Z") == {6, 7}
    assert await found(due_before="2026-12-01T00:00:00+01:00") == set()
    assert await found(due_from="2026-12-01", priority="low") == set()
    assert await found(due="none", due_from="2026-12-01") == set()


ALLOWED = "status, sort, order, limit, cursor, count, q, priority, due, due_from and due_before"
MOMENT = "a day as YYYY-MM-DD or an RFC 3339 timestamp with an offset, + sent as %2B"


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("page=2", f"Unknown query parameter 'page'. Allowed are {ALLOWED}"),
        *[
            (f"limit={value}", "Invalid limit value. Must be a number from 1 to 200")
            for value in ("0", "201", "-1", "1.0", "", "01", "x", "9999999999")
        ],
        ("limit=1&limit=1", "The query parameter limit must be given at most once"),
        ("count=1", "Invalid count value. Must be true or false"),
        ("priority=urgent", "Invalid priority value. Must be low, medium, high or none"),
        ("due=2026-01-01", "Invalid due value. Must be none"),
        *[
            (f"q={value}", "Invalid q value. Must be at least one word, and at most 200 characters")
            for value in ("", "%20", "x" * 201, "a%00", "%CC%88", "a%ff", "%ED%A0%80", "a+%C3")
        ],
        *[
            (f"due_from={value}", f"Invalid due_from value. Must be {MOMENT}")
            for value in ("", "x", "2026-13-01", "2026-12-01T00:00:00+01:00", "0001-01-01T00:00Z")
        ],
    ],
)
async def test_wrong_parameter_is_refused_with_what_is_allowed(
    service: Service, query: str, message: str
) -> None:
    answer = await service.request("GET", f"/api/tasks?{query}", "alice")
    assert (answer.status_code, answer.json()) == (400, problem("invalid_parameter", message))


async def test_pages_hold_while_others_write(service: Service, tasks: list[int]) -> None:
    ended = False

    async def write() -> None:
        while not ended:
            answer = await service.client.post(
                "/api/tasks", headers=bearer("alice"), json={"title": "n", "priority": "medium"}
            )
            await service.client.delete(
                f"/api/tasks/{answer.json()['id']}", headers=bearer("alice")
            )

    async def walk(sort: str, order: str) -> None:
        path = f"/api/tasks?sort={sort}&order={order}&limit=3"
        seen: list[int] = []
        while path:
            answer = await service.client.get(path, headers=bearer("alice"))
            seen += [task["id"] for task in answer.json()]
            path = answer.headers.get("link", "").partition(">")[0].removeprefix("<")
        assert sorted(each for each in seen if each in tasks) == sorted(tasks), (sort, order)

    async with asyncio.TaskGroup() as group:
        writers = [group.create_task(write()) for _ in range(2)]
        try:
            for sort, order in product(SORTS, ("asc", "desc")):
                await walk(sort, order)
        finally:
            ended = True
    assert all(writer.exception() is None for writer in writers)


@pytest.mark.parametrize(
    ("text", "folded"),
    [
        *[("Ä", "a"), ("é", "e"), ("Ł", "l"), ("Ø", "o"), ("Đ", "d"), ("ß", "ss"), ("Æ", "ae")],
        *[("Œ", "oe"), ("Þ", "th"), ("Ð", "d"), ("ı", "i"), ("İ", "i"), ("ﬁ", "fi"), ("Å", "a")],
        *[("Ħ", "h"), ("Ŧ", "t"), ("①", "1"), ("\u0301", ""), ("Ωμέγα", "ωμεγα")],
    ],
)
def test_folding_is_that_of_the_contract(text: str, folded: str) -> None:
    assert fold(text) == folded
