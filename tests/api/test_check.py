"""`todo-api check` finds mistakes, says what to do, and shows no secret."""

import json
import re
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import psycopg
import pytest
from pydantic import SecretStr

from support.program import command, environment
from support.publisher import Publisher
from support.service import SECRET, settings
from todo_api.check import Finding, findings


@pytest.fixture
async def publisher() -> AsyncIterator[Publisher]:
    async with Publisher() as publisher:
        yield publisher


async def look(url: str, **values: Any) -> dict[str, Finding]:
    found = await findings(settings(**{"database_url": SecretStr(url), **values}), url)
    assert len({finding.subject for finding in found}) == len(found)
    return {finding.subject: finding for finding in found}


async def test_everything_is_ok(database_url: str, publisher: Publisher) -> None:
    found = await look(database_url, better_auth_url=publisher.url, cors_origins=(publisher.url,))
    durability = found["durability"]  # the tests' server is fast instead
    assert (durability.status, "fsync" in durability.detail) == ("warning", True)
    assert {each.status for each in found.values() if each is not durability} == {"ok"}
    assert list(found) == [
        *("database", "encoding", "database settings", "writes", "durability"),
        *("schema", "privileges", "row security", "prepared statements"),
        *("shared secret", "key set", "clock", "origins"),
    ]
    name, _, host = database_url.rpartition("/")[2].partition("?host=")
    answers = rf"PostgreSQL 1\d\.\d+ answers \({name} on {unquote(host)}\)"
    assert re.fullmatch(answers, found["database"].detail)
    assert "1 keys (EdDSA)" in found["key set"].detail


async def test_settings_that_are_probably_wrong(database_url: str) -> None:
    embedded = await look(database_url, database_url=None)
    assert embedded["database"].detail.endswith("answers (embedded)")
    assert embedded["settings"].status == "warning"
    assert embedded["settings"].detail.startswith("DATABASE_URL (or ")
    found = await look(database_url, better_auth_secret=SecretStr(f"{SECRET}\n"))
    assert found["settings"].status == "warning"
    assert found["settings"].detail.startswith("BETTER_AUTH_SECRET: ends with white space (U+000A)")


async def test_database_that_does_not_answer() -> None:
    found = await look("postgresql://u:hunter2@127.0.0.1:1/x")
    assert found["database"] == Finding("database", "failure", "DATABASE_URL: Connection refused")
    assert "schema" not in found


async def test_schema_that_is_missing_or_newer(
    empty_database_url: str, database_url: str, sql: psycopg.Connection
) -> None:
    missing = await look(empty_database_url, auto_migrate=False)
    assert missing["schema"].status == "failure"
    assert "todo-api migrate" in missing["schema"].detail
    fresh = await look(empty_database_url)
    assert fresh["schema"].status == "warning"
    assert "row security" not in fresh
    sql.execute("UPDATE alembic_version SET version_num = '9999'")
    newer = await look(database_url)
    assert newer["schema"].status == "warning"
    assert newer["row security"].status == "ok"


async def test_row_security_that_is_off_or_loosened(
    database_url: str, sql: psycopg.Connection
) -> None:
    assert (await look(database_url, row_security=False))["row security"].status == "warning"
    sql.execute("ALTER POLICY tasks_owner ON tasks USING (true)")
    assert (await look(database_url))["row security"].status == "failure"


@pytest.mark.parametrize("mode", ["error", "html", "redirect", "large"])
async def test_key_set_that_cannot_be_fetched(
    database_url: str, publisher: Publisher, mode: Any
) -> None:
    publisher.mode = mode
    found = await look(database_url, better_auth_url=publisher.url)
    assert found["key set"].status == "failure"
    assert "BETTER_AUTH_URL" in found["key set"].detail


async def test_key_set_that_cannot_be_decoded(database_url: str, publisher: Publisher) -> None:
    publisher.encoding = "br"
    found = await look(database_url, better_auth_url=publisher.url)
    assert found["key set"].status == "failure"
    assert "Content-Encoding" in found["key set"].detail


async def test_refused_keys_are_not_an_empty_set(database_url: str, publisher: Publisher) -> None:
    good, bad = publisher.keys[0], {"kty": "EC", "crv": "P-384", "kid": "b", "alg": "ES384"}
    refused = 'refused: kid "b": the type "EC P-384" is not supported'
    for keys, status, detail in (
        ([bad], "failure", f"no usable key; 1 {refused}"),
        ([good, bad], "warning", f"1 keys (EdDSA); 1 {refused}"),
        ([], "warning", "empty; Better Auth makes a key with its first token"),
    ):
        publisher.keys = keys
        found = await look(database_url, better_auth_url=publisher.url)
        assert (found["key set"].status, found["key set"].detail) == (status, detail)


async def test_clock_of_a_cache_is_not_the_issuers(database_url: str, publisher: Publisher) -> None:
    publisher.age, publisher.clock_offset = 60, -60
    found = await look(database_url, better_auth_url=publisher.url)
    assert found["clock"].status == "warning"
    assert "a cache answered" in found["clock"].detail


@pytest.mark.parametrize(
    ("offset", "status"),
    [
        (0, "ok"),
        (-6, "warning"),
        (6, "warning"),
        (-60, "failure"),
        (60, "failure"),
        (None, "warning"),
    ],
)
async def test_clock_that_differs(
    database_url: str, publisher: Publisher, offset: float | None, status: str
) -> None:
    publisher.clock_offset = offset
    found = await look(database_url, better_auth_url=publisher.url)
    assert found["clock"].status == status


async def test_origins_that_do_not_fit(database_url: str, publisher: Publisher) -> None:
    lacking = await look(database_url, better_auth_url=publisher.url)
    assert lacking["origins"].status == "warning"
    assert publisher.url in lacking["origins"].detail
    plain = await look(database_url, cors_origins=("http://app.example",))
    assert plain["origins"].status == "warning"
    loopback = await look(database_url, cors_origins=("http://[::1]:3000", "http://localhost:1"))
    assert loopback["origins"].status == "ok"


def run(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command("check", *arguments),
        cwd=folder,
        env=environment(**variables),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_program_prints_lines_or_json(tmp_path: Path, database_url: str) -> None:
    variables = {"DATABASE_URL": database_url, "BETTER_AUTH_SECRET": SECRET}
    lines = run(tmp_path, **variables)
    assert lines.returncode == 0
    assert {line.split()[0] for line in lines.stdout.splitlines()} == {"ok", "warning"}
    document = json.loads(run(tmp_path, "--json", **variables).stdout)
    assert document["ok"] is True
    assert {each["status"] for each in document["checks"]} == {"ok", "warning"}
    assert all(set(each) == {"subject", "status", "detail"} for each in document["checks"])


def test_failure_exits_with_1_and_shows_no_secret(tmp_path: Path) -> None:
    url = "postgresql://user:hunter2@127.0.0.1:1/x"
    failed = run(tmp_path, DATABASE_URL=url, BETTER_AUTH_SECRET=SECRET)
    assert failed.returncode == 1
    wrong = run(tmp_path, "--json", DATABASE_URL=url, BETTER_AUTH_SECRET="hunter2")
    assert wrong.returncode == 1
    assert json.loads(wrong.stdout)["ok"] is False
    for output in (failed.stdout, failed.stderr, wrong.stdout, wrong.stderr):
        for secret in ("hunter2", SECRET, "127.0.0.1"):
            assert secret not in output
