"""One login migrates and another one serves, and `check` tells the truth about both.

On every major version of PostgreSQL that is supported.
"""

import re
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import psycopg
import pytest
from pydantic import SecretStr

from support.majors import MAJORS, NEWEST, Server
from support.majors import server as running_server
from support.service import running_service, settings
from todo_api import server
from todo_api.check import Finding, findings
from todo_api.database import migrations, schema
from todo_api.errors import StartupError

OPERATIONS = Path(__file__).parents[2] / "docs" / "operations.md"
SET_TRUE_SINCE = 16
numbers = count(1)


@pytest.fixture(scope="module", params=MAJORS, ids=lambda major: f"PostgreSQL {major}")
def major(request: pytest.FixtureRequest) -> int:
    number: int = request.param
    return number


@pytest.fixture(scope="module")
def cluster(major: int) -> Iterator[Server]:
    with running_server(major) as running:
        yield running


@pytest.fixture
def name(cluster: Server) -> Iterator[str]:
    """A database that the login `migrator` owns, in a cluster without other roles of ours."""
    name = f"database_{next(numbers)}"
    execute(cluster.url, "CREATE ROLE migrator LOGIN", f"CREATE DATABASE {name} OWNER migrator")
    yield name
    execute(
        cluster.url,
        f"DROP DATABASE {name} WITH (FORCE)",
        "DROP ROLE IF EXISTS todo_app",
        "DROP ROLE IF EXISTS todo_member",
        "DROP ROLE migrator",
    )


def execute(url: str, *statements: str) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        for statement in statements:
            connection.execute(statement)


def documented(heading: str) -> list[str]:
    """Return the SQL statements of the first block below a heading of docs/operations.md."""
    _, _, section = OPERATIONS.read_text().partition(f"\n## {heading}\n")
    block = re.search(r"```sql\n(.*?)```", section, re.DOTALL)
    assert block is not None
    return [each.strip() for each in block[1].split(";") if each.strip()]


async def look(url: str, **values: Any) -> dict[str, Finding]:
    return {
        each.subject: each
        for each in await findings(settings(database_url=SecretStr(url), **values), url)
    }


def advice(text: str, keyword: str) -> str:
    """Return the statement that a message tells the operator to run."""
    found = re.search(rf"`({keyword}[^`]*)`", text)
    assert found is not None, text
    return found[1]


@pytest.mark.parametrize("option", ["INHERIT", "NOINHERIT"])
async def test_administrator_migrates_and_another_login_serves(
    cluster: Server, name: str, short_folder: Path, option: str
) -> None:
    execute(cluster.url, "ALTER ROLE migrator CREATEROLE")
    migrations.migrate(cluster.at(name, "migrator"))
    for statement in documented("Two roles"):
        execute(cluster.at(name, "migrator"), statement)
    execute(cluster.url, f"ALTER ROLE todo_app {option}")
    url = cluster.at(name, "todo_app")
    found = await look(url, auto_migrate=False)
    assert {each.subject for each in found.values() if each.status != "ok"} == {"durability"}
    await server.check(settings(), url)
    async with running_service(url, short_folder) as service:
        await service.create("alice")
        assert len((await service.request("GET", "/api/tasks", "alice")).json()) == 1
        assert (await service.request("GET", "/readyz")).status_code == 200


async def test_printed_grant_lets_a_login_serve(cluster: Server, name: str, major: int) -> None:
    execute(cluster.url, "ALTER ROLE migrator CREATEROLE", "CREATE ROLE todo_app LOGIN")
    migrations.migrate(cluster.at(name, "migrator"))
    url = cluster.at(name, "todo_app")
    refused = (await look(url, auto_migrate=False))["row security"]
    assert refused.status == "failure"
    grant = advice(refused.detail, "GRANT")
    assert ("WITH SET TRUE" in grant) == (major >= SET_TRUE_SINCE)
    execute(cluster.at(name, "migrator"), grant)
    await server.check(settings(), url)


@pytest.mark.parametrize("version", ["newest", "none"])
async def test_login_that_may_not_read_the_version_is_told_so(
    cluster: Server, name: str, version: str
) -> None:
    """Not permitted is not missing: neither `serve` nor `check` calls it that."""
    execute(cluster.url, "ALTER ROLE migrator CREATEROLE", "CREATE ROLE todo_app LOGIN NOINHERIT")
    migrations.migrate(cluster.at(name, "migrator"))
    execute(cluster.url, "GRANT todo_member TO todo_app")
    if version == "none":
        execute(cluster.at(name), "REVOKE SELECT ON alembic_version FROM todo_member")
    url = cluster.at(name, "todo_app")
    with pytest.raises(StartupError, match="may not read the schema's version"):
        schema.current(url)
    found = await look(url)
    if version == "newest":
        assert found["schema"].status == "ok"
    else:
        assert found["privileges"].status == "failure"
        assert "schema" not in found
        execute(cluster.at(name), advice(found["privileges"].detail, "GRANT"))
        assert (await look(url))["schema"].status == "ok"


MIGRATORS: dict[str, list[str]] = {
    "superuser": ["ALTER ROLE migrator SUPERUSER"],
    "owner that makes the role": ["ALTER ROLE migrator CREATEROLE"],
    "owner without CREATEROLE": [],
    "owner that is not a member": ["CREATE ROLE todo_member"],
    "owner that is a member": ["CREATE ROLE todo_member", "GRANT todo_member TO migrator"],
    "CREATEROLE and another's role": ["CREATE ROLE todo_member", "ALTER ROLE migrator CREATEROLE"],
    "member with ADMIN": [
        "CREATE ROLE todo_member",
        "GRANT todo_member TO migrator WITH ADMIN OPTION",
    ],
    "no schema": [
        "ALTER ROLE migrator CREATEROLE",
        "ALTER ROLE migrator SET search_path = nowhere",
    ],
    "no right to create": [
        "ALTER ROLE migrator CREATEROLE",
        "ALTER DATABASE {name} OWNER TO postgres",
        "REVOKE CREATE ON SCHEMA public FROM PUBLIC",
    ],
    "read-only": [
        "ALTER ROLE migrator CREATEROLE",
        "ALTER ROLE migrator SET default_transaction_read_only = on",
    ],
}


@pytest.mark.parametrize("preparation", MIGRATORS.values(), ids=MIGRATORS)
async def test_check_promises_a_migration_exactly_if_it_works(
    cluster: Server, name: str, preparation: list[str]
) -> None:
    execute(cluster.at(name), *(each.format(name=name) for each in preparation))
    url = cluster.at(name, "migrator")
    found = (await look(url))["schema"]
    assert found.status in {"warning", "failure"}
    promised = found.status == "warning"
    assert ("serve` will migrate" in found.detail) == promised
    try:
        migrations.migrate(url)
        await server.check(settings(), url)
    except StartupError:
        assert not promised, found.detail
    else:
        assert promised, found.detail


async def test_check_promises_no_migration_of_another_logins_tables(
    cluster: Server, name: str
) -> None:
    execute(cluster.url, "ALTER ROLE migrator CREATEROLE", "CREATE ROLE todo_app LOGIN CREATEROLE")
    migrations.migrate(cluster.at(name, "migrator"))
    execute(cluster.url, "GRANT todo_member TO todo_app")
    execute(
        cluster.at(name),
        "GRANT ALL ON SCHEMA public TO todo_app",
        "UPDATE alembic_version SET version_num = '0000'",
    )
    found = (await look(cluster.at(name, "todo_app")))["schema"]
    assert found.status == "failure"
    assert "does not own the tables" in found.detail
    owned = (await look(cluster.at(name, "migrator")))["schema"]
    assert owned.status == "warning"


async def test_documented_restore_works(cluster: Server, name: str, major: int) -> None:
    """What `Restoring a dump` says to run first is understood by every version."""
    del major
    execute(cluster.url, "ALTER ROLE migrator CREATEROLE")
    execute(cluster.at(name, "migrator"), *documented("Restoring a dump"))
    migrations.migrate(cluster.at(name, "migrator"))
    await server.check(settings(), cluster.at(name, "migrator"))


def test_newest_version_is_the_embedded_one(cluster: Server, major: int) -> None:
    if major == NEWEST:
        with psycopg.connect(cluster.url) as connection:
            assert connection.info.server_version // 10_000 == NEWEST
