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
from todo_api.tasks.fields import WRITABLE

STATUSES: list[statements.Status | None] = [None, *get_args(statements.Status)]
SORTS, ORDERS = get_args(statements.Sort), get_args(statements.Order)
STATEMENTS = {
    "list_tasks": [
        statements.list_tasks(status, sort, order)
        for status, sort, order in product(STATUSES, SORTS, ORDERS)
    ],
    "get_task": [statements.get_task()],
    "add_task": [statements.add_task()],
    "change_task": [
        *(statements.change_task(frozenset({name})) for name in WRITABLE),
        statements.change_task(frozenset(WRITABLE)),
    ],
    "toggle_task": [statements.toggle_task()],
    "remove_task": [statements.remove_task()],
    "add_first_task": [statements.add_first_task()],
    "forget_tombstones": [statements.forget_tombstones()],
    "void_token": [statements.void_token()],
    "begin_owner": [statements.begin_owner()],
    "erase_owner": [statements.erase_owner()],
}
"""Every statement, by the function that makes it."""


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
    "email": "a@example.com",
    "issued_at": 4_000_000_000,
    "tokens_from": 4_000_000_000,
    "issuer_ahead": 1,
    "now": 4_000_000_000_000,
    **{f"new_{name}": "new" for name in WRITABLE},
    "new_status": "complete",
    "new_priority": "low",
    "new_due_date": "2030-01-01",
}
"""A value for every parameter, except the owner's and the task's."""
SMALL, BIG = 10_000, 1_000_000
FEW, SOME, MANY = "ada", "user-77", "whale"
"""Users with 20 tasks, with 100 (the usual number), and with 100,000."""

FILL = """
    INSERT INTO tasks (user_id, title, status, priority, due_date, created_at, updated_at,
        version)
    SELECT
        CASE WHEN n % (size / 20) = 0 THEN 'ada' ELSE 'user-' || n / 5 % (size / 100) END,
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
"""Tasks in the order of their creation. Every user comes twenty times and adds five, but ada adds
one. So a user's tasks lie scattered among the others', which is the worst case for an index."""


def fill(url: str, size: int, whales: int) -> None:
    """Add `size` tasks, a hundred for each user, and `whales` tasks for one more user."""
    with psycopg.connect(url, autocommit=True) as connection:
        # Without the check of each row's foreign key, which takes half of the time.
        connection.execute("SET session_replication_role = replica")
        run = RawCursor(connection).execute
        run("INSERT INTO users (id, version) VALUES ('ada', 1), ('whale', 1)")
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
            values = self._begin(owner, plan_cache_mode=planner)
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
            values = self._begin(owner)
            self._run_before(statement, values)
            ((explained,),) = self._execute(explain, values)
            plan: dict[str, Any] = explained[0]["Plan"]
            return plan

    def _begin(self, owner: str, **settings: str) -> dict[str, object]:
        """Return values for every parameter."""
        query = "SELECT max(id) FROM tasks WHERE user_id = $1"
        ((task_id,),) = RawCursor(self._connection).execute(query, [owner])
        for name, value in settings.items():
            self._connection.execute("SELECT set_config(%s, %s, true)", [name, value])
        owner_hash = sha256(owner.encode()).digest()
        return {**VALUES, "owner": owner, "owner_hash": owner_hash, "task_id": task_id}

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


def assert_one_owners_alone(plan: dict[str, Any]) -> None:
    """Assert that the plan reads every table by an index, and every index by the owner."""
    for node in scans(plan):
        if named(node) == "restorations":
            continue  # one row for each restored backup, and none of a user
        assert "Seq" not in node["Node Type"], plan
        if "Index Name" in node:
            owner = {"users_pkey": "id", "erasures_pkey": "user_hash"}
            column = owner.get(node["Index Name"], "user_id")
            assert f"({column} = " in node["Index Cond"], plan


def most_pages(statement: Statement, rows: int, owned: int) -> int:
    """Return how many pages a statement may read: a few to find its rows, and then one for each.

    A list of one status reads all tasks of its owner, because an index by status would make every
    change of a status more expensive (ADR 3).
    """
    if statement.name in {b"erase_owner", b"forget_tombstones"}:
        return 60 + 6 * owned
    if statement.writes:
        return 60
    return 12 + (owned if statement.streamed else rows)


def min_rows(statement: Statement, owner: str) -> int:
    """Return how many rows a statement has to return, as a proof that its plan ran."""
    if statement.name == b"void_token":
        return 0  # the token is good
    return int(statement.name != b"forget_tombstones" or owner != FEW)  # ada has deleted nothing


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
        assert ran.rows <= max(owned, statements.TOMBSTONES_AT_ONCE)
        assert sum(len(scans(plan)) for plan in ran.plans) >= 1
        for plan in ran.plans:
            assert_one_owners_alone(plan)
        assert ran.pages <= most_pages(statement, ran.rows, owned)


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
            assert not sorts(plan), plan
    assert not sorts(big.plan(statement, MANY))


@pytest.mark.parametrize("planner", PLANNERS)
@pytest.mark.parametrize("statement", ALL)
def test_statement_costs_the_same_with_a_hundred_times_the_tasks(
    big: Explainer, small: Explainer, statement: Statement, planner: str
) -> None:
    """Except for the depth of the indexes, each of which has one more level."""
    ran = {each: [each.run(statement, FEW, planner) for _ in range(2)] for each in (big, small)}
    assert ran[big][0].rows == ran[small][0].rows
    in_big, in_small = (min(run.pages for run in ran[each]) for each in (big, small))
    assert in_big <= in_small + (24 if statement.writes else 8)  # a write also looks for free space


@pytest.mark.parametrize("planner", PLANNERS)
def test_erasure_finds_the_tasks_by_an_index(big: Explainer, planner: str) -> None:
    """The foreign key deletes the tasks, without a statement of ours."""
    plans = big.run(statements.erase_owner(), SOME, planner).plans
    (cascade,) = [
        plan for plan in plans if (plan.get("Operation"), named(plan)) == ("Delete", "tasks")
    ]
    assert any(named(node).startswith("tasks_") for node in scans(cascade)), cascade
    assert_one_owners_alone(cascade)


@pytest.mark.parametrize(
    "statement", [case(each) for kind in STATEMENTS.values() for each in kind[:1]]
)
def test_statement_is_not_planned_for_each_request(big_url: str, statement: Statement) -> None:
    """PostgreSQL plans for the values at most five times, and then keeps the generic plan."""
    values = {**VALUES, "owner": SOME, "owner_hash": sha256(SOME.encode()).digest(), "task_id": 1}
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
    assert (custom, generic) == ((0, 8) if statement.streamed else (5, 3))
