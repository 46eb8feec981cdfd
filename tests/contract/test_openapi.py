"""Schemathesis tests the service against its own OpenAPI document."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support.program import environment, serving
from support.service import SECRET, bearer, token

HERE = Path(__file__).parent
PHASES = ("examples", "coverage", "fuzzing", "stateful")

FAMILIES = {
    "token-scoped": ("--exclude-path-regex", "^/api/{user_id}/"),
    "user-scoped": ("--include-path-regex", "^/api/{user_id}/"),
}
"""One run per family. Both families serve the same tasks, but Schemathesis does not know this. So
in a single run, a task deleted through one family would look like a task lost by the other."""


def attack(folder: Path, address: str, *arguments: str) -> tuple[str, dict[str, Any]]:
    """Run Schemathesis on a service, and return its output and its report."""
    users = folder / "users.json"
    headers = {user: bearer(user)["Authorization"] for user in ("alice", "bob")}
    users.write_text(
        json.dumps(
            {
                "auth": [
                    {"name": user, "fixedHeaders": [{"name": "Authorization", "value": value}]}
                    for user, value in headers.items()
                ]
            }
        )
    )
    report = folder / "report.json"
    process = subprocess.run(
        [
            *(sys.executable, "-m", "schemathesis.cli"),
            *("--config-file", str(HERE / "schemathesis.toml")),
            *("run", f"{address}/openapi.json", "--no-color", "--checks", "all"),
            *("--report", "json", "--report-json-path", str(report), *arguments),
        ],
        cwd=folder,
        env=environment(
            BOBS_TOKEN=token("bob"),
            CAROLS_TOKEN=token("carol"),
            HOOKS=str(HERE / "two_users.py"),
            PYTHONHASHSEED="0",
            USERS=str(users),
        ),
        capture_output=True,
        text=True,
        check=False,
    )
    printed = process.stdout + process.stderr
    return printed, json.loads(report.read_text()) if report.exists() else {}


@pytest.mark.parametrize("family", FAMILIES)
def test_service_matches_its_openapi_document(
    tmp_path: Path, database_url: str, family: str
) -> None:
    """The service accepts all valid requests, refuses all others, and answers as documented.

    The test also checks that every phase ran and reached every operation.
    """
    settings = {"BETTER_AUTH_SECRET": SECRET, "LOG_LEVEL": "warning"}
    with serving(tmp_path, DATABASE_URL=database_url, **settings) as program:
        printed, report = attack(tmp_path, program.address, *FAMILIES[family])
        assert report.get("exit_code") == 0, printed
        assert not any(report["warnings"].values()), printed
        assert {phase: report["phases"][phase]["status"] for phase in PHASES} == dict.fromkeys(
            PHASES, "success"
        )
        assert report["operations"]["tested"] == report["operations"]["selected"]
        reached = [
            operation
            for operation, phases in report["valid_rates"].items()
            if any(phase["accepted"] for phase in phases.values())
        ]
        assert len(reached) == report["operations"]["selected"], printed
        assert program.stop() == 0
    assert not (tmp_path / "log").read_text()
