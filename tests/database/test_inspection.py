"""The program refuses a database on which requests would fail, and says what to do."""

import re
from collections import defaultdict
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import psycopg
import pytest
from structlog.testing import capture_logs

from support.listening import listening
from support.majors import NEWEST, Server
from support.majors import server as running_server
from support.service import Service, running_service, settings
from todo_api import server
from todo_api.check import Finding, findings
from todo_api.database import migrations
from todo_api.database.database import Database
from todo_api.database.inspection import PRIVILEGES
from todo_api.errors import StartupError

numbers = count(1)


@pytest.fixture
def guest(sql: psycopg.Connection) -> Iterator[str]:
    """The name of an ordinary login that may serve."""
    name = f"guest_{next(numbers)}"
    sql.execute(f"CREATE ROLE {name} LOGIN IN ROLE todo_member")
    yield name
    sql.execute(f"DROP OWNED BY {name}")
    sql.execute(f"DROP ROLE {name}")


@pytest.fixture
def guest_url(database_url: str, guest: str) -> str:
    return database_url.replace("postgres@", f"{guest}@")


async def look(url: str, **values: Any) -> dict[str, Finding]:
    return {each.subject: each for each in await findings(settings(**values), url)}


def advice(text: str) -> str:
    """Return the statement that a message tells the operator to run."""
    found = re.search(r"run `([^`]*)`", text)
    assert found is not None, text
    return found[1]


async def assert_refused_until_mended(
    sql: psycopg.Connection, url: str, subject: str, **values: Any
) -> str:
    """Check that start, `check` and `/readyz` refuse, and that the printed advice is enough."""
    with pytest.raises(StartupError) as refused:
        await server.check(settings(**values), url)
    sentence = str(refused.value)
    assert "\n" not in sentence
    found = (await look(url, **values))[subject]
    assert (found.status, found.detail) == ("failure", sentence)
    database = Database(url, settings(**values))
    reason = await database.why_not_ready()
    assert reason is not None
    assert reason.startswith("The database is not in order")
    sql.execute(advice(sentence))
    database.pool.close_idle()  # a setting of a role counts for new sessions
    assert await database.why_not_ready() is None
    database.close()
    return sentence


@pytest.mark.parametrize("scope", ["DATABASE {database}", "ROLE {login}"])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("default_transaction_isolation", "'repeatable read'"),
        ("default_transaction_isolation", "serializable"),
        ("exit_on_error", "on"),
        ("row_security", "off"),
        ("session_replication_role", "replica"),
        ("transaction_timeout", "'20s'"),
    ],
)
async def test_start_is_refused_if_a_setting_changes_what_statements_mean(
    sql: psycopg.Connection, guest: str, guest_url: str, scope: str, name: str, value: str
) -> None:
    whose = scope.format(database=sql.info.dbname, login=guest)
    sql.execute(f"ALTER {whose} SET {name} = {value}")
    await assert_refused_until_mended(sql, guest_url, "database settings")


async def test_setting_of_the_url_is_refused_as_such(database_url: str) -> None:
    with pytest.raises(StartupError, match=r"exit_on_error is on; remove it from the URL"):
        await server.check(settings(), f"{database_url}&options=-c%20exit_on_error%3Don")


async def test_settings_are_checked_without_row_security_too(
    sql: psycopg.Connection, database_url: str
) -> None:
    database = sql.info.dbname
    sql.execute(f"ALTER DATABASE {database} SET default_transaction_isolation = serializable")
    sql.execute(f"ALTER DATABASE {database} SET row_security = off")  # no policy binds the login
    await assert_refused_until_mended(sql, database_url, "database settings", row_security=False)
    sql.execute(f"ALTER ROLE postgres IN DATABASE {database} RESET ALL")


IRRELEVANT = {
    "array_nulls": "off",
    "backslash_quote": "off",
    "bytea_output": "escape",
    "check_function_bodies": "off",
    "client_encoding": "LATIN1",
    "client_min_messages": "debug1",
    "constraint_exclusion": "on",
    "datestyle": "'SQL, DMY'",
    "default_text_search_config": "german",
    "default_transaction_deferrable": "on",
    "enable_hashjoin": "off",
    "enable_indexscan": "off",
    "enable_nestloop": "off",
    "extra_float_digits": "-15",
    "idle_in_transaction_session_timeout": "1",
    "intervalstyle": "sql_standard",
    "jit_above_cost": "0",
    "lc_time": "'C'",
    "lock_timeout": "1",
    "max_parallel_workers_per_gather": "8",
    "plan_cache_mode": "force_custom_plan",
    "quote_all_identifiers": "on",
    "standard_conforming_strings": "off",
    "statement_timeout": "1000",
    "synchronize_seqscans": "off",
    "synchronous_commit": "off",
    "timezone": "'Asia/Kathmandu'",
    "timezone_abbreviations": "'Australia'",
    "transform_null_equals": "on",
    "work_mem": "64",
    "xmloption": "document",
    "app.user_id": "mallory",
    "plpgsql.variable_conflict": "use_column",
    "plpgsql.extra_errors": "'all'",
}
"""Settings that a role or a database may set as it likes, with values far from the default."""


async def test_result_does_not_depend_on_settings(
    sql: psycopg.Connection, guest: str, guest_url: str, database_url: str, short_folder: Path
) -> None:
    for name, value in IRRELEVANT.items():
        sql.execute(f"ALTER ROLE {guest} SET {name} = {value}")
    await server.check(settings(), guest_url)
    results = []
    for url, folder in ((database_url, short_folder / "a"), (guest_url, short_folder / "b")):
        folder.mkdir()
        async with running_service(
            url, folder, rate_limit=600, rate_limit_store="postgresql", pool_size=1
        ) as service:
            results.append(await everything(service, "alice" if folder.name == "a" else "bobby"))
    assert results[0] == results[1]


async def everything(service: Service, user: str) -> list[Any]:
    """Call every route, and return what does not differ from user to user."""
    results: list[Any] = []

    async def call(verb: str, path: str, body: Any = None) -> Any:
        answer = await service.request(verb, path, user, **({} if body is None else {"json": body}))
        results.append((answer.status_code, _plain(answer.json() if answer.content else None)))
        return answer

    for title in ("Äpfel \\ 'und' \"Öl\"", "zoo", "Łódź", "😀 % _"):
        await call("POST", "/api/tasks", {"title": title, "description": "\\n' --"})
    day = {"title": "day", "due_date": "2026-12-01", "priority": "high"}
    first = (await call("POST", "/api/tasks", day)).json()["id"]
    instant = "2026-12-01T01:30:00.000001+05:45"
    await call("PUT", f"/api/tasks/{first}", {"due_date": instant, "status": "complete"})
    await call("GET", f"/api/tasks/{first}")
    for sort in ("created", "updated", "title", "due_date", "priority"):
        await call("GET", f"/api/tasks?sort={sort}")
    for path in ("complete", "complete"):
        await call("PATCH", f"/api/tasks/{first}/{path}")
    await call("DELETE", f"/api/tasks/{first}")
    await call("DELETE", f"/api/tasks/{first}")
    await call("DELETE", "/api/account")
    await call("GET", "/api/tasks")
    return results


_OF_THE_USER = {"id", "user_id", "version", "created_at", "updated_at", "completed_at"}


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(each) for each in value]
    if not isinstance(value, dict):
        return value
    shown = {name: each for name, each in value.items() if name not in _OF_THE_USER}
    for name in ("created_at", "updated_at", "completed_at"):
        moment = value.get(name)
        shown[name] = moment and bool(re.fullmatch(r"\d{4}(-\d\d){2}T[\d:]{8}\.\d{6}Z", moment))
    return shown


async def test_encoding_of_the_url_does_not_count(
    sql: psycopg.Connection, database_url: str
) -> None:
    async with listening(f"{database_url}&client_encoding=LATIN1") as service:
        assert (await service.create("alice", title="Ärger 😀"))["title"] == "Ärger 😀"
    assert sql.execute("SELECT title FROM tasks").fetchall() == [("Ärger 😀",)]


@pytest.mark.parametrize("encoding", ["LATIN1", "SQL_ASCII"])
async def test_database_that_is_not_utf_8_is_refused(postgres: str, encoding: str) -> None:
    name = f"encoded_{next(numbers)}"
    with psycopg.connect(postgres, autocommit=True) as connection:
        connection.execute(
            f"CREATE DATABASE {name} ENCODING '{encoding}' TEMPLATE template0"
            " LOCALE_PROVIDER libc LOCALE 'C'"
        )
        url = postgres.replace("/postgres?", f"/{name}?")
        with pytest.raises(StartupError, match=f"encoded in {encoding}"):
            migrations.migrate(url)
        with pytest.raises(StartupError, match=f"encoded in {encoding}"):
            await server.check(settings(), url)
        found = await look(url)
        assert found["encoding"].status == "failure"
        database = Database(url, settings())
        assert await database.why_not_ready() is not None
        database.close()
        connection.execute(f"DROP DATABASE {name}")


async def test_older_schema_is_refused_and_not_ready(
    sql: psycopg.Connection, database_url: str
) -> None:
    sql.execute("UPDATE alembic_version SET version_num = '0000'")
    with pytest.raises(StartupError, match="older than this program"):
        await server.check(settings(auto_migrate=False), database_url)
    found = await look(database_url, auto_migrate=False)
    assert found["schema"].status == "failure"
    assert not {"privileges", "row security"} & set(found)
    database = Database(database_url, settings())
    assert "todo-api check" in str(await database.why_not_ready())
    database.close()


@pytest.mark.parametrize(
    "change",
    [
        "DROP TABLE tombstones",
        "ALTER TABLE tasks DROP COLUMN priority CASCADE",
        "DROP FUNCTION plan_once",
    ],
)
async def test_schema_that_lacks_a_part_of_its_version_is_refused(
    sql: psycopg.Connection, database_url: str, change: str
) -> None:
    sql.execute(change)
    with pytest.raises(StartupError, match="the schema has its version, but not "):
        await server.check(settings(), database_url)
    assert (await look(database_url))["schema"].status == "failure"


@pytest.mark.parametrize(
    "revoked",
    [
        "SELECT ON tasks",
        "SELECT (tokens_from) ON users",
        "INSERT (email) ON users",
        "UPDATE (due_is_day) ON tasks",
        "DELETE ON users",
        "SELECT ON alembic_version",
        "SELECT ON restorations",
    ],
)
async def test_missing_privilege_is_refused_and_not_called_missing(
    sql: psycopg.Connection, database_url: str, revoked: str
) -> None:
    sql.execute(f"REVOKE {revoked} FROM todo_member")
    sentence = await assert_refused_until_mended(sql, database_url, "privileges")
    assert "missing" not in sentence
    assert "migrate" not in sentence


async def test_function_that_may_not_be_called_is_refused(
    sql: psycopg.Connection, guest_url: str
) -> None:
    sql.execute("REVOKE EXECUTE ON FUNCTION begin_owner FROM PUBLIC, todo_member")
    await assert_refused_until_mended(sql, guest_url, "privileges")


async def test_schema_that_may_not_be_used_is_refused_as_such(
    sql: psycopg.Connection, guest_url: str
) -> None:
    sql.execute("REVOKE USAGE ON SCHEMA public FROM PUBLIC, todo_member")
    sentence = await assert_refused_until_mended(sql, guest_url, "schema")
    assert "GRANT USAGE ON SCHEMA public TO todo_member" in sentence
    assert "missing" not in sentence


async def test_schema_outside_the_search_path_is_refused_as_such(
    sql: psycopg.Connection, guest: str, guest_url: str
) -> None:
    sql.execute(f"ALTER ROLE {guest} SET search_path = pg_catalog")
    sentence = await assert_refused_until_mended(sql, guest_url, "schema")
    assert "not in the search_path" in sentence


async def test_table_of_another_schema_in_front_is_refused(
    sql: psycopg.Connection, guest: str, guest_url: str
) -> None:
    sql.execute("CREATE SCHEMA other")
    sql.execute("CREATE TABLE other.restorations (LIKE public.restorations)")
    sql.execute("GRANT USAGE ON SCHEMA other TO PUBLIC")
    sql.execute("GRANT SELECT ON other.restorations TO todo_member")
    sql.execute(f"ALTER ROLE {guest} SET search_path = other, public")
    with pytest.raises(StartupError, match=r"several schemas \(other, public\)"):
        await server.check(settings(), guest_url)
    found = await look(guest_url)
    assert found["schema"].status == "failure"


async def test_owner_of_everything_may_have_row_security_off(
    sql: psycopg.Connection, guest_url: str, database_url: str
) -> None:
    await server.check(settings(row_security=False), database_url)
    sql.execute("GRANT SELECT ON ALL TABLES IN SCHEMA public TO PUBLIC")
    with pytest.raises(StartupError, match="ROW_SECURITY: off needs"):
        await server.check(settings(row_security=False), guest_url)
    assert (await look(guest_url, row_security=False))["row security"].status == "failure"


def test_privileges_are_those_that_the_migrations_grant(sql: psycopg.Connection) -> None:
    granted: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for table, privilege, column in sql.execute(
        "SELECT table_name, privilege_type, column_name FROM information_schema.column_privileges"
        " WHERE grantee = 'todo_member' UNION"
        " SELECT table_name, privilege_type, NULL FROM information_schema.table_privileges"
        " WHERE grantee = 'todo_member' AND privilege_type = 'DELETE'"
    ):
        granted[table][privilege] |= {column} - {None}
    assert granted == {
        table: {privilege: set(columns) for privilege, columns in privileges.items()}
        for table, privileges in PRIVILEGES.items()
    }


@pytest.fixture
def standby() -> Iterator[Server]:
    """A migrated server in recovery: everything in it can only be read."""
    with running_server(NEWEST) as running:
        migrations.migrate(running.url)
        running.stop()
        (running.data / "standby.signal").touch()
        running.start()
        yield running


async def test_standby_serves_reads_and_says_that_it_is_one(
    standby: Server, short_folder: Path
) -> None:
    with capture_logs() as logs:
        await server.check(settings(), standby.url)
    assert [each["event"] for each in logs if "is a standby" in each["event"]]
    found = await look(standby.url)
    assert found["writes"].status == "warning"
    assert "failure" not in {each.status for each in found.values()}
    async with running_service(standby.url, short_folder) as service:
        assert (await service.request("GET", "/api/tasks", "alice")).json() == []
        refused = await service.request("POST", "/api/tasks", "alice", json={"title": "x"})
        assert refused.status_code == 503
        assert (await service.request("GET", "/readyz")).status_code == 200


async def test_standby_that_is_expected_to_be_written_is_refused(standby: Server) -> None:
    counted = {"rate_limit": 600, "rate_limit_store": "postgresql"}
    with pytest.raises(StartupError, match="RATE_LIMIT_STORE: "):
        await server.check(settings(**counted), standby.url)
    assert (await look(standby.url, **counted))["writes"].status == "failure"
    with pytest.raises(StartupError, match="migrate its primary"):
        migrations.migrate(standby.at("template1"))
    assert "read-only" in (await look(standby.at("template1")))["schema"].detail


async def test_read_only_default_is_said_and_does_not_fail(
    sql: psycopg.Connection, database_url: str
) -> None:
    database = sql.info.dbname
    sql.execute(f"ALTER DATABASE {database} SET default_transaction_read_only = on")
    await server.check(settings(), database_url)
    found = (await look(database_url))["writes"]
    assert found.status == "warning"
    sql.execute("SET default_transaction_read_only = off")
    sql.execute(advice(found.detail))
    assert (await look(database_url))["writes"].status == "ok"


@pytest.mark.parametrize("name", ["synchronous_commit", "fsync"])
async def test_database_that_may_lose_acknowledged_writes_says_so(name: str) -> None:
    with running_server(NEWEST) as running:
        running.stop()
        running.start(**{"fsync": "on", name: "off"})
        migrations.migrate(running.url)
        found = (await look(running.url))["durability"]
        assert found.status == "warning"
        assert name in found.detail
        await server.check(settings(), running.url)
