"""The connection and the pool, with a server that fails in every way."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest

from support.service import settings
from support.waiting import LIMIT, until
from support.wire import Wire
from todo_api import server
from todo_api.database import pool
from todo_api.database.connection import BATCH_BYTES, Connection
from todo_api.database.database import Database
from todo_api.database.statement import Statement, encode
from todo_api.errors import (
    ApiError,
    DatabaseBusy,
    DatabaseUnreachable,
    InternalError,
    ServiceUnavailable,
    ShuttingDown,
    StartupError,
    StatementTimeout,
)

ECHO = Statement(b"echo", b"SELECT $1::text", ("text",), writes=False)
SLEEP = Statement(b"sleep", b"SELECT pg_sleep($1)::text", ("seconds",), writes=False)
WHO = Statement(
    b"who",
    b"SELECT json_build_object('role', current_user,"
    b" 'owner', current_setting('app.user_id', true))",
    (),
    writes=False,
)
UNREACHABLE = "The database does not answer"


@asynccontextmanager
async def opened(url: str, **values: Any) -> AsyncIterator[Database]:
    database = Database(url, settings(**values))
    await database.open()
    try:
        yield database
    finally:
        database.close()


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    async with opened(database_url, pool_size=2, pool_timeout=LIMIT, statement_timeout=LIMIT) as it:
        yield it


async def echo(database: Database, text: str = "hello") -> bytes:
    (row,) = await database.run("alice", ECHO, {"text": text})
    return row


async def test_owner_and_role_hold_for_the_statement_alone(
    database: Database,
) -> None:
    (row,) = await database.run("alice", WHO, {})
    assert row == b'{"role" : "todo_member", "owner" : "alice"}'
    (row,), _ = await database._attempt([(WHO, [])])
    assert row == b'{"role" : "postgres", "owner" : ""}'


async def test_first_use_of_a_statement_takes_one_round_trip(
    database_url: str, short_folder: Path
) -> None:
    async with Wire(database_url, short_folder) as wire, opened(wire.url) as database:
        for text in ("first", "second"):
            wire.reset()
            assert await echo(database, text) == text.encode()
            assert (wire.round_trips, wire.connections) == (1, 0)


@pytest.mark.parametrize("row_security", [True, False])
@pytest.mark.parametrize("prepared_statements", [True, False])
async def test_without_prepared_statements_or_row_security(
    database_url: str, short_folder: Path, row_security: bool, prepared_statements: bool
) -> None:
    async with (
        Wire(database_url, short_folder) as wire,
        opened(
            wire.url, row_security=row_security, prepared_statements=prepared_statements
        ) as database,
    ):
        wire.reset()
        for text in ("a", "b"):
            assert await echo(database, text) == text.encode()
        assert wire.round_trips == 2
        with pytest.raises(StatementTimeout):
            async with opened(wire.url, row_security=row_security, statement_timeout=0.5) as short:
                await short.run("alice", SLEEP, {"seconds": 5})


async def test_value_larger_than_the_sockets_buffer(database: Database) -> None:
    """The connection sends the remainder when the socket takes more."""
    text = "x" * 8_000_000
    assert await echo(database, text) == text.encode()
    assert await echo(database) == b"hello"


async def test_concurrent_statements_share_the_pool(database: Database) -> None:
    texts = [str(number) for number in range(200)]
    rows = await asyncio.gather(*(echo(database, text) for text in texts))
    assert rows == [text.encode() for text in texts]
    assert len(database.pool._open) <= 2


async def test_error_leaves_the_connection_usable(database: Database) -> None:
    wrong = Statement(b"wrong", b"SELECT 1 / $1::int", ("divisor",), writes=True)
    for _ in range(3):
        with pytest.raises(InternalError):
            await database.run("alice", wrong, {"divisor": 0})
        assert await echo(database) == b"hello"
    assert len(database.pool._open) == 1


async def test_server_reports_its_statement_timeout(database_url: str) -> None:
    async with opened(database_url, statement_timeout=1) as database:
        with pytest.raises(StatementTimeout):
            await database.run("alice", SLEEP, {"seconds": 60})
        assert await echo(database) == b"hello"
        assert len(database.pool._open) == 1


async def test_waiter_without_a_connection_in_time_gets_database_busy(
    database_url: str, sql: psycopg.Connection
) -> None:
    waits = Statement(b"waits", b"SELECT pg_advisory_xact_lock_shared(1)::text", (), writes=False)
    async with opened(database_url, pool_size=2, pool_timeout=0.05) as database:
        sql.execute("SELECT pg_advisory_lock(1)")
        slow = [asyncio.create_task(database.run("alice", waits, {})) for _ in range(2)]
        await until(lambda: len(database.pool._open) == 2 and database.pool._limiter.in_use == 2)
        with pytest.raises(DatabaseBusy):
            await echo(database)
        sql.execute("SELECT pg_advisory_unlock(1)")
        await asyncio.gather(*slow)
        assert await echo(database) == b"hello"


async def test_cancelled_request_keeps_its_connection_until_the_server_is_done(
    database: Database,
) -> None:
    """The next owner must not get the result or the role of this one."""
    for seconds in (0.0, 0.01, 0.05):
        task = asyncio.create_task(database.run("mallory", SLEEP, {"seconds": seconds}))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        (row,) = await database.run("alice", WHO, {})
        assert row == b'{"role" : "todo_member", "owner" : "alice"}'
    await until(lambda: len(database.pool._idle) == len(database.pool._open))
    assert database.pool._limiter.in_use == 0


async def test_request_cancelled_while_waiting_or_connecting_releases_its_slot(
    database_url: str,
) -> None:
    async with opened(database_url, pool_size=1) as database:
        busy = asyncio.create_task(database.run("alice", SLEEP, {"seconds": 0.2}))
        await until(lambda: database.pool._limiter.in_use == 1)
        waiting = asyncio.create_task(echo(database))
        await asyncio.sleep(0)
        waiting.cancel()
        await busy
        for connection in list(database.pool._open):
            connection.close()
        connecting = asyncio.create_task(echo(database))
        await asyncio.sleep(0)
        connecting.cancel()
        await asyncio.gather(waiting, connecting, return_exceptions=True)
        assert await echo(database) == b"hello"
        assert database.pool._limiter.in_use == 0


async def test_pool_that_closes_while_it_connects_leaves_nothing_open(
    database_url: str,
) -> None:
    async with opened(database_url, pool_size=1) as database:
        for connection in list(database.pool._open):
            connection.close()
        connecting = asyncio.create_task(echo(database))
        await asyncio.sleep(0)
        assert database.pool._limiter.in_use == 1
        database.close()
        with pytest.raises(ShuttingDown):
            await connecting
        assert not database.pool._open
        assert database.pool._limiter.in_use == 0


async def taken_from(database: Database) -> Connection:
    """Take a connection out of the pool. `_release` gives it back."""
    assert database.pool._limiter.try_acquire()
    return database.pool._pop_idle() or await database.pool._connect()


async def test_released_connection_goes_to_the_oldest_waiter(
    database_url: str,
) -> None:
    async with opened(database_url, pool_size=1) as database:
        order: list[str] = []

        async def ask(text: str) -> None:
            order.append((await echo(database, text)).decode())

        connection = await taken_from(database)
        tasks = [asyncio.create_task(ask(str(number))) for number in range(6)]
        await until(lambda: database.pool.levels()["pool_waiting"] == 6)
        tasks[3].cancel()
        database.pool._release(connection)
        await asyncio.gather(*tasks, return_exceptions=True)
        assert order == ["0", "1", "2", "4", "5"]
        assert (len(database.pool._open), database.pool._limiter.in_use) == (1, 0)


async def test_released_connection_works_before_the_loop_resumes_the_waiter(
    database_url: str,
) -> None:
    async with opened(database_url, pool_size=1) as database:
        connection = await taken_from(database)
        waiting = asyncio.create_task(echo(database))
        await until(lambda: database.pool.levels()["pool_waiting"] == 1)
        database.pool._release(connection)
        assert connection.busy
        assert await waiting == b"hello"


@pytest.mark.parametrize("lost", ["never", "before", "after"])
async def test_request_cancelled_just_after_it_got_a_connection_passes_it_on(
    database: Database, lost: str
) -> None:
    """It goes to the next waiter, or without one back to the pool."""
    first, second = await taken_from(database), await taken_from(database)
    waiting = [asyncio.create_task(echo(database, text)) for text in ("no", "yes")]
    await until(lambda: database.pool.levels()["pool_waiting"] == 2)
    if lost == "before":
        first.close()
        database.pool._limiter.release()
    else:
        database.pool._release(first)
    waiting[0].cancel()
    if lost == "after":
        first.close()
    with pytest.raises(asyncio.CancelledError):
        await waiting[0]
    assert await waiting[1] == b"yes"
    third = await taken_from(database)
    assert (third is first) == (lost == "never")
    alone = asyncio.create_task(echo(database))
    await until(lambda: database.pool.levels()["pool_waiting"] == 1)
    for connection in (second, third):
        database.pool._release(connection)
    alone.cancel()
    with pytest.raises(asyncio.CancelledError):
        await alone
    await until(lambda: database.pool._limiter.in_use == 0)
    assert {connection for connection, _ in database.pool._idle} == {second, third}
    assert await echo(database) == b"hello"


async def test_pool_that_closes_refuses_its_waiters(database_url: str) -> None:
    async with opened(database_url, pool_size=1) as database:
        busy = asyncio.create_task(database.run("alice", SLEEP, {"seconds": 5}))
        await until(lambda: any(each.busy for each in database.pool._open))
        waiting = [asyncio.create_task(echo(database)) for _ in range(3)]
        await until(lambda: database.pool.levels()["pool_waiting"] == 3)
        database.close()
        ends = await asyncio.gather(busy, *waiting, return_exceptions=True)
        assert [type(end) for end in ends] == [ShuttingDown] * 4
        assert not database.pool._open


async def test_pool_replaces_killed_idle_connections_without_an_error(
    database: Database, sql: psycopg.Connection
) -> None:
    write = Statement(b"write", b"SELECT 'written'", (), writes=True)
    for wait in (True, False, False):
        await asyncio.gather(*(echo(database) for _ in range(5)))
        assert terminate_all(sql) == 2
        if wait:
            await until(lambda: not database.pool._open)
        assert await database.run("alice", write, {}) == [b"written"]


SLOW_ONCE = b"pg_sleep(CASE nextval('calls') WHEN 1 THEN 60 ELSE 0 END)::text"
"""Takes long on its first call. `nextval` counts calls that are rolled back, too."""


def count_calls(sql: psycopg.Connection) -> None:
    sql.execute("CREATE SEQUENCE calls; GRANT USAGE ON SEQUENCE calls TO todo_member")


def calls(sql: psycopg.Connection) -> Any:
    return sql.execute("SELECT last_value FROM calls").fetchone()


async def test_read_killed_in_flight_is_tried_again(
    database_url: str, sql: psycopg.Connection
) -> None:
    count_calls(sql)
    read = Statement(b"slow_once", b"SELECT " + SLOW_ONCE, (), writes=False)
    async with opened(database_url, statement_timeout=LIMIT) as database:
        task = asyncio.create_task(database.run("alice", read, {}))
        await until(lambda: terminate_all(sql, "%nextval%"))
        assert await task == [b""]
    assert calls(sql) == (2,)


async def test_write_killed_in_flight_is_tried_again_because_it_was_rolled_back(
    database_url: str, sql: psycopg.Connection
) -> None:
    count_calls(sql)
    sql.execute("CREATE TABLE log (n int); GRANT ALL ON log TO todo_member")
    write = Statement(
        b"slow_write",
        b"WITH slow AS (INSERT INTO log VALUES (1) RETURNING %b) SELECT 'ok' FROM slow" % SLOW_ONCE,
        (),
        writes=True,
    )
    async with opened(database_url, statement_timeout=LIMIT) as database:
        task = asyncio.create_task(database.run("alice", write, {}))
        await until(lambda: terminate_all(sql, "%INSERT INTO log%"))
        assert await task == [b"ok"]
    assert sql.execute("SELECT count(*) FROM log").fetchone() == (1,)
    assert calls(sql) == (2,)


async def test_write_is_not_repeated_after_its_result_was_lost(
    database_url: str, short_folder: Path, sql: psycopg.Connection
) -> None:
    """The connection breaks after COMMIT, so the row is there once, and the client gets 500."""
    sql.execute("CREATE TABLE log (n int); GRANT ALL ON log TO todo_member")
    write = Statement(
        b"write", b"WITH w AS (INSERT INTO log VALUES (1)) SELECT 'ok'", (), writes=True
    )
    async with Wire(database_url, short_folder) as wire, opened(wire.url) as database:
        wire.cut_answers = True
        task = asyncio.create_task(database.run("alice", write, {}))
        await until(lambda: wire.answers_cut > 0)
        wire.cut_answers = False  # a second try would succeed
        with pytest.raises(DatabaseUnreachable):
            await task
        assert await echo(database) == b"hello"
    assert sql.execute("SELECT count(*) FROM log").fetchone() == (1,)


async def test_read_is_tried_again_after_its_result_was_lost(
    database_url: str, short_folder: Path
) -> None:
    async with Wire(database_url, short_folder) as wire, opened(wire.url) as database:
        wire.cut_answers = True
        task = asyncio.create_task(echo(database))
        await until(lambda: wire.answers_cut > 0)
        wire.cut_answers = False
        assert await task == b"hello"


async def test_list_that_breaks_off_is_read_again_at_once(
    database_url: str, short_folder: Path, sql: psycopg.Connection
) -> None:
    """Before the deadline, although libpq has closed the socket that the loop watches."""
    count_calls(sql)
    rows = Statement(
        b"rows",
        b"SELECT repeat('x', 1000) FROM generate_series(1, 20) UNION ALL SELECT " + SLOW_ONCE,
        (),
        writes=False,
        streamed=True,
    )
    async with Wire(database_url, short_folder) as wire, opened(wire.url) as database:
        task = asyncio.create_task(database.stream("alice", rows, {}))
        await until(lambda: any(list(each._pending) == [None] for each in database.pool._open))
        wire.cut()
        found, rest = await task
        assert (len(found), rest) == (21, None)


async def test_request_to_a_frozen_server_times_out(database_url: str, short_folder: Path) -> None:
    async with (
        Wire(database_url, short_folder) as wire,
        opened(wire.url, statement_timeout=2, pool_size=1) as database,
    ):
        wire.frozen = True
        with pytest.raises(StatementTimeout):
            await asyncio.wait_for(echo(database), LIMIT)
        wire.frozen = False
        assert await echo(database) == b"hello"
        assert database.pool._limiter.in_use == 0


async def test_unreachable_server_is_reported_after_a_few_attempts(
    database_url: str, short_folder: Path
) -> None:
    async with Wire(database_url, short_folder) as wire:
        database = Database(wire.url, settings())
        await database.open()
    await until(lambda: not database.pool._open)
    assert await database.why_not_ready() == UNREACHABLE
    with pytest.raises(DatabaseUnreachable) as caught:
        await asyncio.wait_for(echo(database), LIMIT)
    assert str(caught.value.__cause__) == "Connection refused"
    async with Wire(database_url, short_folder):
        assert await echo(database) == b"hello"
        assert await database.why_not_ready() is None
    database.close()


async def test_readiness_asks_the_database_only_after_a_failure(
    database_url: str, short_folder: Path, sql: psycopg.Connection
) -> None:
    async with Wire(database_url, short_folder) as wire, opened(wire.url) as database:
        wire.reset()
        assert await database.why_not_ready() is None
        assert wire.round_trips == 0
        terminate_all(sql)
        await until(lambda: not database.pool._open)
        assert await database.why_not_ready() is None
        assert wire.connections == 1


async def test_closing_idle_connections_does_not_affect_readiness(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    await asyncio.gather(*(echo(database) for _ in range(5)))
    monkeypatch.setattr(pool, "IDLE_LIMIT", 0.0)
    database.pool._sweep()
    assert (database.pool._open, database.pool._idle) == (set(), [])
    assert await database.why_not_ready() is None
    assert not database.pool._open


async def test_lost_prepared_statements_are_prepared_again(
    database: Database,
) -> None:
    assert await echo(database) == b"hello"
    await database._attempt([(Statement(b"d", b"DEALLOCATE ALL", (), writes=False), [])])
    assert await echo(database) == b"hello"


@pytest.mark.parametrize(
    ("sqlstate", "error"),
    [
        *[
            ("40001", ServiceUnavailable),
            ("40P01", ServiceUnavailable),
            ("55P03", StatementTimeout),
        ],
        *[("53100", DatabaseBusy), ("53300", DatabaseBusy), ("25006", ServiceUnavailable)],
        *[("57P03", DatabaseUnreachable), ("08P01", DatabaseUnreachable)],
        *[("08006", ServiceUnavailable), ("CIINF", ServiceUnavailable), ("42501", InternalError)],
        *[("22001", InternalError), ("XX000", ServiceUnavailable), ("58030", ServiceUnavailable)],
    ],
)
async def test_sqlstate_becomes_an_api_error(
    database: Database, sqlstate: str, error: type[ApiError]
) -> None:
    code = f"DO $$ BEGIN RAISE EXCEPTION 'title' USING ERRCODE = '{sqlstate}'; END $$"
    statement = Statement(f"raise_{sqlstate}".encode(), code.encode(), (), writes=True)
    with pytest.raises(ApiError) as caught:
        await database.run("alice", statement, {})
    assert type(caught.value) is error
    assert "title" not in f"{caught.value} {caught.value.__cause__}"
    assert await echo(database) == b"hello"


async def test_start_is_refused_if_the_login_cannot_take_the_role(
    database_url: str, sql: psycopg.Connection
) -> None:
    sql.execute("DROP ROLE IF EXISTS guest")
    sql.execute("CREATE ROLE guest LOGIN")
    url = database_url.replace("postgres@", "guest@")
    with pytest.raises(StartupError, match=r"ROW_SECURITY: .*GRANT todo_member"):
        await checked(url)
    sql.execute("GRANT todo_member TO guest WITH SET TRUE")
    async with opened(url) as database:
        assert await echo(database) == b"hello"


@pytest.mark.parametrize(
    "change",
    [
        "ALTER TABLE tasks DISABLE ROW LEVEL SECURITY",
        "DROP POLICY tasks_owner ON tasks",
        "CREATE POLICY everything ON tasks USING (true)",
    ],
)
async def test_start_is_refused_if_row_security_was_weakened(
    database_url: str, sql: psycopg.Connection, change: str
) -> None:
    sql.execute(change)
    with pytest.raises(StartupError, match="ROW_SECURITY: "):
        await checked(database_url)
    async with opened(database_url, row_security=False) as database:
        assert await echo(database) == b"hello"


async def test_start_is_refused_without_a_schema(empty_database_url: str) -> None:
    with pytest.raises(StartupError, match="run `todo-api migrate`"):
        await checked(empty_database_url)


@pytest.mark.parametrize("host", ["127.0.0.1:1", "nowhere.invalid"])
async def test_start_without_a_server_says_why_and_shows_no_address(host: str) -> None:
    with pytest.raises(StartupError, match=r"^DATABASE_URL: ") as caught:
        await server.check(settings(), f"postgresql://u:hunter2@{host}/x")
    for secret in ("hunter2", "127.0.0.1", "nowhere"):
        assert secret not in str(caught.value)


async def test_row_security_off_needs_a_login_that_bypasses_it(
    database_url: str, sql: psycopg.Connection
) -> None:
    sql.execute("DROP ROLE IF EXISTS visitor")
    sql.execute("CREATE ROLE visitor LOGIN IN ROLE todo_member")
    with pytest.raises(StartupError, match="ROW_SECURITY: off needs"):
        await checked(database_url.replace("postgres@", "visitor@"), row_security=False)


async def test_worker_that_starts_while_the_database_is_away_recovers(
    database_url: str, short_folder: Path
) -> None:
    wire = Wire(database_url, short_folder)
    database = Database(wire.url, settings())
    await database.open()
    assert await database.why_not_ready() == UNREACHABLE
    async with wire:
        assert await echo(database) == b"hello"
        assert await database.why_not_ready() is None
    database.close()
    with pytest.raises(ShuttingDown):
        await echo(database)


async def checked(url: str, **values: Any) -> None:
    database = Database(url, settings(**values))
    try:
        await database.check()
    finally:
        database.close()


def test_nul_never_reaches_libpq() -> None:
    """libpq reads a text value up to its NUL, so alice\\0x would become alice."""
    with pytest.raises(ValueError, match="NUL"):
        encode("alice\0x")


def terminate_all(sql: psycopg.Connection, query: str = "%") -> int:
    """Kill the service's backends that run, or last ran, a query like this. Return how many."""
    killed = sql.execute(
        "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity"
        " WHERE datname = current_database() AND pid <> pg_backend_pid() AND query LIKE %s",
        [query],
    ).fetchone()
    assert killed is not None
    count: int = killed[0]
    return count


STREAMED = Statement(
    b"streamed",
    b"SELECT repeat('x', 1000) || n FROM pg_sleep(0.02), generate_series(1, $1::int) AS n",
    ("owner",),
    writes=False,
    streamed=True,
)
"""Returns as many rows as the owner's name says."""


@pytest.mark.parametrize("row_security", [True, False])
@pytest.mark.parametrize("prepared_statements", [True, False])
@pytest.mark.parametrize("rows", [0, 1, 63, 64, 65, 128, 5_000])
async def test_stream_comes_in_batches(
    database_url: str, row_security: bool, prepared_statements: bool, rows: int
) -> None:
    async with opened(
        database_url, row_security=row_security, prepared_statements=prepared_statements
    ) as database:
        for _ in range(2):
            first, more = await database.stream(str(rows), STREAMED, {})
            batches = [first]
            if more is not None:
                batches += [batch async for batch in more]
                more.close()
            assert [row[1000:] for batch in batches for row in batch] == [
                str(number + 1).encode() for number in range(rows)
            ]
            assert max(sum(map(len, batch)) for batch in batches) < BATCH_BYTES + 66_000
        assert (more is not None) == (rows == 5_000)
        assert database._streams == 0
        assert len(database.pool._open) == 1


async def test_stream_that_is_not_read_loses_its_connection(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("todo_api.database.connection.PAUSE_SECONDS", 0.05)
    _, more = await database.stream("5000", STREAMED, {})
    assert more is not None
    await until(lambda: not database.pool._open)
    assert await database.why_not_ready() is None
    assert not database.pool._open, "a slow client caused a query for readiness"
    with pytest.raises(DatabaseUnreachable):
        await anext(more)
    more.close()
    assert await echo(database) == b"hello"
    assert database.pool._limiter.in_use == 0


async def test_stream_that_is_closed_early_releases_its_slot(database: Database) -> None:
    for _ in range(5):
        _, more = await database.stream("5000", STREAMED, {})
        assert more is not None
        with pytest.raises(DatabaseBusy):
            await database.stream("5000", STREAMED, {})
        more.close()
    asking = asyncio.ensure_future(database.stream("5000", STREAMED, {}))
    await until(lambda: any(each.busy for each in database.pool._open))
    asking.cancel()
    await until(lambda: database.pool._limiter.in_use == 0)
    assert await echo(database) == b"hello"
    assert database._streams == 0


async def test_full_pool_is_not_ready_for_its_own_reason(database_url: str) -> None:
    async with opened(database_url, pool_size=1, pool_timeout=0.05) as database:
        connection = await taken_from(database)
        database._invalidate_readiness()
        assert await database.why_not_ready() == "No connection to the database is free"
        database.pool._release(connection)
        assert await database.why_not_ready() is None


FAILING = Statement(
    b"failing",
    b"SELECT repeat('x', 1000) || 1 / (3000 - n) FROM generate_series(1, 5000) AS n",
    (),
    writes=False,
    streamed=True,
)


async def test_stream_that_failed_leaves_its_connection_to_others(
    database: Database,
) -> None:
    """The connection is free once the error arrives, before the reader resumes."""
    _, more = await database.stream("alice", FAILING, {})
    assert more is not None
    (connection,) = database.pool._open
    with pytest.raises(InternalError):
        async for _ in more:
            pass
    write = Statement(b"write", b"SELECT 'written'", (), writes=True)
    writing = asyncio.create_task(database.run("bob", write, {}))
    await until(lambda: connection.busy or writing.done())
    more.close()
    assert await writing == [b"written"]
    assert database.pool._open == {connection}
