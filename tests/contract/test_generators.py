"""Clients made of the OpenAPI document compile, and accept what the service accepts.

The generators are Node programs, in `tests/contract/generators`.
"""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from support.node import copy_sources, missing, run, succeed
from support.program import command, serving
from support.requirements import need
from support.service import SECRET, token

GENERATORS = (
    ("openapi-typescript", "openapi.json", "--output", "openapi-typescript.d.ts"),
    ("openapi-ts", "--file", "openapi-ts.config.mjs"),
    ("orval", "--config", "orval.config.cjs"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the document, the generators and their configuration."""
    need(missing())
    made = tmp_path_factory.mktemp("generators")
    copy_sources(made)
    (made / "openapi.json").write_text(succeed(made, *command("openapi")))
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
