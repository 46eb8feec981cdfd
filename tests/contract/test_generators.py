"""Clients made of the OpenAPI document compile, and accept what the service accepts.

The generators are Node programs, in `tests/contract/generators`.
"""

import json
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg
import pytest

from support.program import command, environment, serving
from support.requirements import need
from support.service import SECRET, token

FOLDER = Path(__file__).parent / "generators"
PACKAGES = FOLDER / "node_modules"
API_PAGE = Path(__file__).parents[2] / "docs" / "api.md"
GENERATORS = (
    ("openapi-typescript", "openapi.json", "--output", "openapi-typescript.d.ts"),
    ("openapi-ts", "--file", "openapi-ts.config.mjs"),
    ("orval", "--config", "orval.config.cjs"),
)
QUIET = {"REDOCLY_TELEMETRY": "off", "REDOCLY_SUPPRESS_UPDATE_NOTICE": "true"}


def missing() -> str | None:
    """Say in one sentence what is missing to run the generators, or None."""
    if shutil.which("node") is None:
        return "The program `node` (20.19 or newer) is not on the PATH."
    if not (PACKAGES / ".package-lock.json").exists():
        return "`npm ci` has not been run in tests/contract/generators."
    return None


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a program of Node's packages, or Node itself, in a folder."""
    program, *rest = arguments
    found = PACKAGES / ".bin" / program
    return subprocess.run(
        [str(found) if found.exists() else program, *rest],
        cwd=folder,
        env=environment(CI="true", NO_COLOR="1", **QUIET),
        capture_output=True,
        text=True,
        check=False,
    )


def succeed(folder: Path, *arguments: str) -> str:
    """Run a program that must succeed, and return what it prints."""
    done = run(folder, *arguments)
    assert done.returncode == 0, f"{' '.join(arguments)}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the document, the generators and their configuration."""
    need(missing())
    made = tmp_path_factory.mktemp("generators")
    for source in FOLDER.iterdir():
        if source.is_file() and not source.name.startswith("package"):
            shutil.copy(source, made)
    (made / "node_modules").symlink_to(PACKAGES)
    (made / "openapi.json").write_text(succeed(made, *command("openapi")))
    blocks = re.findall("```ts\n(.*?)```", API_PAGE.read_text(), re.DOTALL)
    (made / "documentation.ts").write_text("\n".join(blocks))
    return made


@pytest.fixture(scope="module")
def compiled(folder: Path) -> Path:
    """Return a folder with the generated clients and programs that use them, compiled."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda generator: succeed(folder, *generator), GENERATORS))
    succeed(folder, "tsc", "--project", "tsconfig.json")
    return folder / "compiled"


def test_task_makes_the_round_trip_through_every_client(
    compiled: Path, tmp_path: Path, database_url: str
) -> None:
    """`{...task, title}` compiles as a change, and the service accepts it."""
    settings = {"BETTER_AUTH_SECRET": SECRET, "DATABASE_URL": database_url}
    with serving(tmp_path, **settings) as program:
        printed = succeed(compiled, "node", "round_trip.js", program.address, token("alice"))
    assert printed.split() == ["hey-api", "openapi-fetch", "orval"]


def test_documented_typescript_does_what_the_page_says(
    compiled: Path, tmp_path: Path, database_url: str, sql: psycopg.Connection
) -> None:
    """Also after a connection that breaks between a write and its answer."""
    settings = {"BETTER_AUTH_SECRET": SECRET, "DATABASE_URL": database_url}
    with serving(tmp_path, **settings) as program:
        printed = succeed(compiled, "node", "documented.js", program.address, token("alice"))
    assert json.loads(printed) == [
        [201, "true"],
        ["final", "high", "final"],
        [2, 2, 1],
        [["once"]],
        [4, True],
    ]
    stored = sql.execute("SELECT title FROM tasks ORDER BY id").fetchall()
    assert [title for (title,) in stored] == ["final", "a", "b", "c"]


def test_generated_schemas_accept_what_the_service_accepts(compiled: Path) -> None:
    """An emoji is two UTF-16 units, which older versions of zod count against `maxLength`.

    The two generators ignore `minProperties`. Zod itself reads it, and refuses an empty change.
    """
    accepted: dict[str, bool] = json.loads(
        succeed(compiled.parent, "node", "compiled/validation.js")
    )
    refused = {name for name, is_accepted in accepted.items() if not is_accepted}
    assert refused == {
        "hey-api: a task without a title",
        "orval: a task without a title",
        "zod: an empty change",
    }


def test_redocly_finds_nothing(folder: Path) -> None:
    done = run(folder, "redocly", "lint", "openapi.json", "--format", "json")
    report: dict[str, Any] = json.loads(done.stdout)
    assert report["totals"] | {"ignored": 0} == {"errors": 0, "warnings": 0, "ignored": 0}, (
        done.stdout
    )


def test_spectral_finds_nothing(folder: Path) -> None:
    succeed(folder, "spectral", "lint", "openapi.json", "--fail-severity", "hint")
