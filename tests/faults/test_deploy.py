"""The files in deploy: systemd accepts the unit, and the image's health check works."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

from support.program import environment, serving
from support.requirements import need
from support.service import SECRET
from todo_api.server import STOP_SECONDS
from todo_api.settings import Settings, variables

ROOT = Path(__file__).parents[2]
UNIT = (ROOT / "deploy" / "todo-api.service").read_text()
IMAGE = (ROOT / "deploy" / "Dockerfile").read_text().replace("\\\n", "")
IGNORED = (ROOT / "deploy" / "Dockerfile.dockerignore").read_text()


def of_unit(name: str) -> str:
    (value,) = re.findall(rf"^{name}=(.*)$", UNIT, re.MULTILINE)
    return str(value)


def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        need("The program `systemd-analyze` is not on the PATH.")
    unit = tmp_path / "todo-api.service"
    assert of_unit("ExecStart") == "/opt/todo-api/bin/todo-api serve"
    unit.write_text(UNIT.replace("/opt/todo-api/bin/todo-api", sys.executable))  # it must exist
    verified = subprocess.run(
        ["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False
    )
    assert (verified.returncode, verified.stderr) == (0, "")


def test_unit_takes_rights_away_and_waits_for_a_graceful_shutdown() -> None:
    assert of_unit("DynamicUser") == of_unit("NoNewPrivileges") == "yes"
    assert of_unit("ProtectSystem") == "strict"
    assert of_unit("Restart") == "on-failure"
    longest = Settings.model_fields["shutdown_timeout"].default + STOP_SECONDS
    assert int(of_unit("TimeoutStopSec")) > longest
    assert of_unit("Environment") == f"DATA_DIR=%S/{of_unit('StateDirectory')}"


def test_image_has_only_what_it_needs_and_runs_without_root() -> None:
    everything, *kept = [line for line in IGNORED.splitlines() if line and line[0] in "*!"]
    assert everything == "*"
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", IMAGE, re.MULTILINE)
    sources = {source for line in copied for source in line.split()}
    assert {line.removeprefix("!") for line in kept if line[0] == "!"} == sources
    assert all((ROOT / source).exists() for source in sources)
    assert "--require-hashes -r requirements.lock" in IMAGE
    *_, final = IMAGE.split("\nFROM ")
    assert re.findall(r"^USER (.+)$", final, re.MULTILINE) == ["todo-api"]
    (given,) = re.findall(r"^ENV (.+)$", final, re.MULTILINE)
    names = set(re.findall(r"(\w+)=", given))
    assert names <= {*variables(), "PATH", "PYTHONDONTWRITEBYTECODE"}
    assert not names & {"DATABASE_URL", "BETTER_AUTH_SECRET", "LOG_KEY"}


def test_health_check_of_the_image_follows_the_program(tmp_path: Path, database_url: str) -> None:
    (written,) = re.findall(r"^HEALTHCHECK .* CMD (\[.+\])$", IMAGE, re.MULTILINE)
    python, *arguments = json.loads(written)
    assert python == "python"
    variables = {"DATABASE_URL": database_url, "BETTER_AUTH_SECRET": SECRET}
    with serving(tmp_path, **variables) as program:
        port = str(urlsplit(program.address).port)

        def code() -> int:
            there = environment(PORT=port, http_proxy="http://127.0.0.1:1")
            done = subprocess.run(
                [sys.executable, *arguments], env=there, capture_output=True, check=False
            )
            return done.returncode

        assert code() == 0
        assert program.stop() == 0
        assert code() == 1
