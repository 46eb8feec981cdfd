"""The cost of a statement depends on the rows it returns, not on other users' tasks."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from itertools import product
from typing import Any, NamedTuple, get_args

import psycopg
import psycopg.sql
import pytest
from psycopg.raw_cursor import RawCursor

from support.service import settings
from todo_api.database.preamble import Preamble
from todo_api.database.statement import Statement, encode
from todo_api.tasks import statements
from todo_api.tasks.fields import WRITABLE, Status
from todo_api.tasks.schemas import Order, Sort

STATUSES: list[Status | None] = [None, *get_args(Status)]
SORTS, ORDERS = get_args(Sort), get_args(Order)
TERMS = [
    statements.PLAIN,
    statements.Terms(if_match=True),
    statements.Terms(if_match=True, keyed=True),
    statements.Terms(if_match=True, batched=True),
    statements.Terms(if_match=True, keyed=True, batched=True),
]
STATEMENTS = {
    "list_tasks": [
        statements.list_tasks(status, sort, order)
        for status, sort, order in product(STATUSES, SORTS, ORDERS)
    ],
    "find_tasks": [statements.find_tasks(sort, order) for sort, order in product(SORTS, ORDERS)],
    "get_task": [statements.get_task()],
    "find_changes": [statements.find_changes()],
    "get_versions": [statements.get_versions()],
    "add_task": [
        statements.add_task(statements.Terms(keyed=keyed, batched=batched))
        for keyed, batched in product((False, True), repeat=2)
    ],
    "_change_columns": [
        *(statements.change_task(frozenset({name})) for name in WRITABLE),
        statements.change_task(frozenset(WRITABLE)),
    ],
    "change_any": [statements.change_any(each) for each in TERMS[1:]],
    "toggle_task": [statements.toggle_task(each) for each in TERMS],
    "remove_task": [statements.remove_task(each) for each in TERMS],
    "import_task": [statements.import_task()],
    "add_first_task": [statements.add_first_task()],
    "forget_tombstones": [statements.forget_tombstones()],
    "forget_answer": [statements.forget_answer()],
    "forget_answers": [statements.forget_answers()],
    "check_key": [statements.check_key()],
    "claim_key": [statements.claim_key()],
    "take_versions": [
        statements.take_versions(statements.Terms(keyed=keyed, batched=True))
        for keyed in (False, True)
    ],
    "why_not_written": [statements.why_not_written()],
    "begin_owner": [statements.begin_owner()],
    "lock_owner": [statements.lock_owner()],
    "erase_owner": [statements.erase_owner()],
}
"""Every statement, by the function that makes it."""


FIRST = {
    statements.find_tasks(sort, order).name: {
        f"after_{number}": value
        for number, value in enumerate(statements.first_position(sort, order), 1)
    }
    for sort, order in product(SORTS, ORDERS)
} | {statements.find_changes().name: {"since": 0, "limit": 50}}
"""The position before every task, for each search by its name."""


def case(statement: Statement) -> Any:
    """Return a test case, named after the statement and those that run before it."""
    names = [each.name.decode() for each in (statement, *statement.first)]
    return pytest.param(statement, id="_after_".join(names))


ALL = [case(each) for kind in STATEMENTS.values() for each in kind]
IN_DEFAULT_ORDER = [
    case(statements.list_tasks(status, "created", order))
    for status, order in product(STATUSES, ORDERS)
]
PLANNERS = [
    pytest.param("force_custom_plan", id="custom"),
    pytest.param("force_generic_plan", id="generic"),
]
VALUES: dict[str, object] = {
    "known_version": None,
    "idempotency_key": "a key",
    "request_hash": b"hash",
    **dict.fromkeys(("status", "priority", "due_from", "due_before"), None),
    "without_due_date": False,
    "words": ["task"],
    **{name: [1] for name in statements.RUNS},
    "count": False,
    "limit": None,
    "if_match": [1],  # of every task in these tables
    "email": "a@example.com",
    "issued_at": 4_000_000_000,
    "tokens_from": 4_000_000_000,
    "issuer_ahead": 1,
    "now": 4_000_000_000_000,
    "operation": 1,
    **dict.fromkeys(("later_operations", "more_operations"), 0),
    **{f"new_{name}": "new" for name in WRITABLE},
    **{f"sets_{name}": True for name in WRITABLE},
    "source": b"source",
    "exported_id": 1,
    "exported_at": "2026-01-01T00:00:00Z",
    "new_status": "complete",
    "new_priority": "low",
    "new_due_date": "2030-01-01",
    "new_due_is_day": False,
}
"""A value for every parameter, except the owner's and the task's."""
SMALL, BIG = 10_000, 1_000_000
FEW, FEW_TOO, SOME, MANY = "ada", "eve", "user-77", "whale"
"""Users with 20 tasks, again with 20, with 100 (the usual number), and with 100,000."""

FILL = """
    INSERT INTO tasks (user_id, title, status, priority, due_date, created_at, updated_at,
        version)
    SELECT
        CASE n % (size / 20)
            WHEN 0 THEN 'ada'
            WHEN 1 THEN 'eve'
            ELSE 'user-' || n / 5 % (size / 100)
        END,
        'Task ' || n % 7919,
        CASE WHEN twentieth % 4 = 0 THEN 'complete' ELSE 'incomplete' END,
        (ARRAY['low', 'medium', 'high', NULL])[1 + twentieth % 4],
        CASE WHEN twentieth % 5 > 0 THEN moment + interval '1 month' END,
        moment,
        moment + n % 11 * interval '1 hour',
        1
    FROM
        (SELECT $1::int) AS given (size),
        generate_series(0, size - 1) AS n,
        LATERAL (SELECT n * 20::bigint / size) AS part (twentieth),
        LATERAL (SELECT now() - (size - n) * interval '1 second') AS time (moment)
"""
"""Tasks in the order of their creation. Every user comes twenty times and adds five, but ada and
eve add one. So a user's tasks lie scattered among the others', the worst case for an index."""


def fill(url: str, size: int, whales: int) -> None:
    """Add `size` tasks, a hundred for each user, and `whales` tasks for one more user."""
    with psycopg.connect(url, autocommit=True) as connection:
        # VACUUM below does this once. Later it would come between two counts of pages.
        for table in ("users", "tasks", "erasures", "tombstones"):
            connection.execute(f"ALTER TABLE {table} SET (autovacuum_enabled = false)")
        # Without the check of each row's foreign key, which takes half of the time.
        connection.execute("SET session_replication_role = replica")
        run = RawCursor(connection).execute
        run("INSERT INTO users (id, version) VALUES ('ada', 1), ('eve', 1), ('whale', 1)")
        run(
            "INSERT INTO users (id, version)"
            " SELECT 'user-' || n, 1 FROM generate_series(0, $1::int) AS n",
            [size // 100 - 1],
        )
        run(
            "INSERT INTO erasures (user_hash, version)"
            " SELECT sha256(n::text::bytea), 1 FROM generate_series(1, $1::int) AS n",
            [size // 100],
        )
        run(FILL, [size])
        run(
            "INSERT INTO tasks (user_id, title, version)"
            " SELECT 'whale', 'Task ' || n, 1 FROM generate_series(1, $1::int) AS n",
            [whales],
        )
        run(
            "INSERT INTO tombstones (user_id, version, task_id)"
            " SELECT 'user-' || n % ($1::int / 100), n, n FROM generate_series(1, $1::int) AS n",
            [size],
        )
        run(
            "INSERT INTO answers (user_id, key, request_hash, body, created_at)"
            " SELECT 'user-' || n % ($1::int / 100), n, '', '', now() - n % 3 * interval '1 day'"
            " FROM generate_series(1, $1::int / 5) AS n",
            [size],
        )
        run("VACUUM ANALYZE")


@contextmanager
def filled(postgres: str, template: str, size: int, whales: int) -> Iterator[str]:
    name = f"filled_{size}"
    with psycopg.connect(postgres, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name} TEMPLATE {template}")
        try:
            url = postgres.replace("/postgres?", f"/{name}?")
            fill(url, size, whales)
            yield url
        finally:
            connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


class Ran(NamedTuple):
    """The result of running a statement."""

    rows: int
    pages: int
    """The number of pages of our tables and their indexes that it read, from memory or disk."""
    plans: list[dict[str, Any]]
    """Its plan, and the plans of queries in begin_owner and in foreign keys."""


class Explainer:
    """Runs statements as requests do, rolls them back, and returns their plans."""

    def __init__(self, connection: psycopg.Connection) -> None:
        self._connection = connection
        self._plans: list[dict[str, Any]] = []
        connection.add_notice_handler(self._on_notice)
        connection.execute("""
            LOAD 'auto_explain';
            SET auto_explain.log_min_duration = 0;
            SET auto_explain.log_nested_statements = on;
            SET auto_explain.log_analyze = on;
            SET auto_explain.log_timing = off;
            SET auto_explain.log_format = json;
            SET auto_explain.log_level = notice;
        """)
        connection.commit()

    def run(self, statement: Statement, owner: str, planner: str) -> Ran:
        """Run a statement for an owner and their newest task."""
        with self._connection.transaction(force_rollback=True):
            values = self._begin(statement, owner, plan_cache_mode=planner)
            before = self._pages()
            self._plans.clear()
            self._run_before(statement, values)
            rows = len(self._execute(statement, values))
            pages = self._pages() - before
            return Ran(rows, pages, self._plans[:-1])  # the last one is of `_pages`

    def plan(self, statement: Statement, owner: str) -> dict[str, Any]:
        """Plan a statement for an owner, without running it."""
        explain = Statement(
            b"", b"EXPLAIN (FORMAT JSON) " + statement.sql, statement.parameters, writes=False
        )
        with self._connection.transaction(force_rollback=True):
            values = self._begin(statement, owner)
            self._run_before(statement, values)
            ((explained,),) = self._execute(explain, values)
            plan: dict[str, Any] = explained[0]["Plan"]
            return plan

    def _begin(self, statement: Statement, owner: str, **settings: str) -> dict[str, object]:
        """Return values for every parameter."""
        query = "SELECT max(id) FROM tasks WHERE user_id = $1"
        ((task_id,),) = RawCursor(self._connection).execute(query, [owner])
        for name, value in settings.items():
            self._connection.execute("SELECT set_config(%s, %s, true)", [name, value])
        owner_hash = sha256(owner.encode()).digest()
        own = {"owner": owner, "owner_hash": owner_hash, "task_id": task_id}
        return {**VALUES, **FIRST.get(statement.name, {}), **own}

    def _run_before(self, statement: Statement, values: Mapping[str, object]) -> None:
        """Run the preamble, and the statements that run before this one."""
        before = Preamble(settings()).before(statement)
        assert before is not None
        for each in (before, *statement.first):
            self._execute(each, values)

    def _execute(self, statement: Statement, values: Mapping[str, object]) -> list[Any]:
        encoded = [encode(values[name]) for name in statement.parameters]
        given = [value if value is None else value.decode() for value in encoded]
        ran = RawCursor(self._connection).execute(statement.sql, given, prepare=True)
        return ran.fetchall() if ran.description else [()] * ran.rowcount

    def _pages(self) -> int:
        ((pages,),) = self._connection.execute("""
            SELECT sum(pg_stat_get_xact_blocks_fetched(oid))::int FROM pg_class
            WHERE relnamespace = 'public'::regnamespace
        """)
        return int(pages)

    def _on_notice(self, notice: psycopg.errors.Diagnostic) -> None:
        _, _, plan = (notice.message_primary or "").partition("plan:\n")
        self._plans.append(json.loads(plan)["Plan"])


@pytest.fixture(scope="module")
def big_url(postgres: str, template: str) -> Iterator[str]:
    with filled(postgres, template, BIG, whales=100_000) as url:
        yield url


@pytest.fixture(scope="module")
def small_url(postgres: str, template: str) -> Iterator[str]:
    with filled(postgres, template, SMALL, whales=1) as url:
        yield url


@pytest.fixture
def big(big_url: str) -> Iterator[Explainer]:
    with psycopg.connect(big_url) as connection:
        yield Explainer(connection)


@pytest.fixture
def small(small_url: str) -> Iterator[Explainer]:
    with psycopg.connect(small_url) as connection:
        yield Explainer(connection)


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for below in plan.get("Plans", []):
        yield from nodes(below)


def sorts(plan: dict[str, Any]) -> bool:
    return any("Sort" in node["Node Type"] for node in nodes(plan))


def scans(plan: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the nodes that read tables and indexes."""
    return [node for node in nodes(plan) if "Scan" in node["Node Type"] and named(node)]


def named(node: dict[str, Any]) -> str:
    """Return the name of a node's index or table, if any."""
    return str(node.get("Index Name") or node.get("Relation Name") or "")


def outline(plan: dict[str, Any], depth: int = 0) -> str:
    """Write a plan as EXPLAIN does, a line for each node."""
    condition = plan.get("Index Cond") or plan.get("Recheck Cond") or plan.get("Filter") or ""
    rows = f"{plan['Actual Rows']:.0f} rows" if "Actual Rows" in plan else "not run"
    line = f"\n{'  ' * depth}{plan['Node Type']} {named(plan)} {condition} ({rows})"
    return line + "".join(outline(each, depth + 1) for each in plan.get("Plans", []))


def assert_one_owners_alone(plan: dict[str, Any]) -> None:
    """Assert that the plan reads every table by an index, and every index by the owner."""
    for node in scans(plan):
        name = named(node)
        if name == "restorations":
            continue  # one row for each restored backup, and none of a user
        assert "Seq" not in node["Node Type"], (
            f"the whole table {name} is read, because no index fits:{outline(plan)}"
        )
        if "Index Name" in node:
            owner = {"users_pkey": "id", "erasures_pkey": "user_hash"}
            column = owner.get(name, "user_id")
            assert f"({column} = " in node.get("Index Cond", ""), (
                f"the index {name} is read for more than one {column}:{outline(plan)}"
            )


def most_pages(statement: Statement, rows: int, owned: int) -> int:
    """Return how many pages a statement may read: a few to find its rows, and then one for each.

    A list of one status reads all tasks of its owner, because an index by status would make every
    change of a status more expensive (ADR 3). A page also looks up its owner's version. A
    creation reads 46 pages. The first one of a session reads ten more, and so does one that has to
    find a page with room (measured).
    """
    if statement.name in {b"erase_owner", b"forget_tombstones", b"forget_answers"}:
        return 80 + 8 * owned
    if statement.name == b"find_changes":
        return 16 + 2 * owned  # also as many tombstones
    if statement.writes:
        return 80 + 30 * statement.name.endswith(b"_keyed")  # which also stores its answer
    return 16 + (owned if statement.streamed else rows)


def min_rows(statement: Statement, owner: str) -> int:
    """Return how many rows a statement has to return, as a proof that its plan ran."""
    if statement.name in {b"forget_answer", b"check_key", b"claim_key"}:
        return 0  # no user has this key, or the statement returns nothing
    if statement.name.startswith(b"take_versions"):
        return 0
    return int(not statement.name.startswith(b"forget_") or owner not in {FEW, FEW_TOO, MANY})


def test_every_statement_is_in_these_tests() -> None:
    own = [each for each in vars(statements).values() if hasattr(each, "cache_info")]
    made = {each.__name__ for each in own if each.__module__ == statements.__name__}
    assert made == set(STATEMENTS)


@pytest.mark.parametrize("planner", PLANNERS)
@pytest.mark.parametrize("statement", ALL)
def test_statement_reads_its_owners_rows_by_an_index(
    big: Explainer, statement: Statement, planner: str
) -> None:
    for owner, owned in ((FEW, 20), (SOME, 100)):
        ran = big.run(statement, owner, planner)
        assert ran.rows >= min_rows(statement, owner)
        assert ran.rows <= max(owned + 1, statements.EXPIRED_AT_ONCE)
        assert statement.name == b"claim_key" or any(scans(plan) for plan in ran.plans)
        for plan in ran.plans:
            assert_one_owners_alone(plan)
        most = most_pages(statement, ran.rows, owned)
        assert ran.pages <= most, (
            f"{statement.name.decode()} of a user with {owned} tasks reads {ran.pages} pages, and"
            f" most_pages() allows {most} for {ran.rows} rows:{''.join(map(outline, ran.plans))}"
        )


@pytest.mark.parametrize("statement", ALL)
def test_planner_uses_the_same_indexes_for_the_user_with_most_tasks(
    big: Explainer, statement: Statement
) -> None:
    """They have a tenth of all tasks, and the statistics show it."""
    assert_one_owners_alone(big.plan(statement, MANY))


@pytest.mark.parametrize("statement", IN_DEFAULT_ORDER)
def test_default_order_needs_no_sort(big: Explainer, statement: Statement) -> None:
    for owner in (FEW, SOME):
        for planner in ("force_custom_plan", "force_generic_plan"):
            plan = big.run(statement, owner, planner).plans[-1]
            assert not sorts(plan), (
                f"tasks_by_creation does not give the default order:{outline(plan)}"
            )
    plan = big.plan(statement, MANY)
    assert not sorts(plan), f"tasks_by_creation does not give the default order:{outline(plan)}"


@pytest.mark.parametrize("planner", PLANNERS)
@pytest.mark.parametrize("statement", ALL)
def test_statement_costs_the_same_with_a_hundred_times_the_tasks(
    big: Explainer, small: Explainer, statement: Statement, planner: str
) -> None:
    """Except for the depth of the indexes, each of which has one more level.

    This user has the same dead rows in both, because no other test writes to their tasks.
    """
    ran = {each: [each.run(statement, FEW_TOO, planner) for _ in range(2)] for each in (big, small)}
    assert ran[big][0].rows == ran[small][0].rows
    in_big, in_small = (min(ran[each], key=lambda run: run.pages) for each in (big, small))
    more = 30 if statement.writes else 8  # a write also looks for room
    more += 15 * statement.name.endswith(b"_keyed")  # which also stores its answer
    assert in_big.pages <= in_small.pages + more, (
        f"{statement.name.decode()} reads {in_big.pages} pages among {BIG:,} tasks and"
        f" {in_small.pages} among {SMALL:,}, and {more} more are allowed:"
        f"{''.join(map(outline, in_big.plans))}"
    )


@pytest.mark.parametrize("planner", PLANNERS)
def test_erasure_finds_the_tasks_by_an_index(big: Explainer, planner: str) -> None:
    """The foreign key deletes the tasks, without a statement of ours."""
    plans = big.run(statements.erase_owner(), SOME, planner).plans
    (cascade,) = [
        plan for plan in plans if (plan.get("Operation"), named(plan)) == ("Delete", "tasks")
    ]
    assert any(named(node).startswith("tasks_") for node in scans(cascade)), (
        f"no index of tasks finds what the erasure deletes:{outline(cascade)}"
    )
    assert_one_owners_alone(cascade)


@pytest.mark.parametrize(
    "statement", [case(each) for kind in STATEMENTS.values() for each in kind[:1]]
)
def test_statement_is_not_planned_for_each_request(big_url: str, statement: Statement) -> None:
    """PostgreSQL plans for the values at most five times, and then keeps the generic plan."""
    values = {**VALUES, "owner": SOME, "owner_hash": sha256(SOME.encode()).digest(), "task_id": 1}
    values |= FIRST.get(statement.name, {})
    before = Preamble(settings()).before(statement)
    assert before is not None
    with psycopg.connect(big_url) as connection:
        RawCursor(connection).execute(before.sql, [SOME])
        connection.execute(b"PREPARE planned AS " + statement.sql)
        given = psycopg.sql.SQL(", ").join(
            psycopg.sql.Literal(None if value is None else value.decode())
            for value in (encode(values[name]) for name in statement.parameters)
        )
        for _ in range(8):
            connection.execute(psycopg.sql.SQL("EXECUTE planned({})").format(given))
        ((custom, generic),) = connection.execute(
            "SELECT custom_plans, generic_plans FROM pg_prepared_statements WHERE name = 'planned'"
        ).fetchall()
        connection.rollback()
    expected = (0, 8) if statement.streamed or statement.planned_once else (5, 3)
    assert (custom, generic) == expected, (
        f"of 8 runs {custom} were planned anew for their values, and {expected[0]} were to be"
    )
