"""Workers that die, hang or cannot start: the supervisor replaces them, says why, or gives up."""

import json
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx2
import pytest

from support.http import LOCAL
from support.program import Program, serving
from support.service import SECRET
from support.waiting import wait_for

SHORT = "server.SILENT_SECONDS = 3"
"""Code that shortens the time limit for a worker, which is a minute."""

SHORT_AFTER_SIGALRM = """
import signal
signal.signal(signal.SIGALRM, lambda *_: setattr(server, "SILENT_SECONDS", 3))
"""

BROKEN = """
import os, time
from contextlib import asynccontextmanager
from pathlib import Path
from fastapi import FastAPI
from todo_api import server

working = server._application

@asynccontextmanager
async def lifespan(app):
    raise ValueError("refused")
    yield

def application(*arguments):
    if Path("exit").exists():
        os._exit(7)
    if Path("hang").exists():
        time.sleep(3600)
    if Path("lifespan").exists():
        return FastAPI(lifespan=lifespan)
    return working(*arguments)
"""
"""A module with an application that starts or not, depending on which file exists."""


@pytest.fixture
def variables(database_url: str) -> Mapping[str, str]:
    return {
        "DATABASE_URL": database_url,
        "BETTER_AUTH_SECRET": SECRET,
        "WORKERS": "2",
    }


@pytest.fixture
def breakable(tmp_path: Path) -> str:
    """Code that lets the workers of a program in `tmp_path` use the application above."""
    (tmp_path / "broken.py").write_text(BROKEN)
    return "import broken; server._application = broken.application"


def replaced(folder: Path) -> dict[int, str]:
    """Return the logged reason for each replaced worker."""
    return {entry["pid"]: entry["reason"] for entry in logged(folder, "replacing worker")}


def logged(folder: Path, event: str) -> list[dict[str, Any]]:
    """Return the log's lines of a kind."""
    lines = (folder / "log").read_text().splitlines()
    entries = [json.loads(line) for line in lines if line.startswith("{")]
    return [entry for entry in entries if entry["event"].startswith(event)]


def is_live(program: Program) -> bool:
    try:
        return httpx2.get(f"{program.address}/livez", **LOCAL | {"timeout": 1}).status_code == 200
    except httpx2.TransportError:
        return False


def wait_for_workers(program: Program, folder: Path) -> None:
    """Wait until two workers run and the supervisor knows that both serve."""

    def both_serve() -> bool:
        running = {each.pid for each in program.workers()}
        return len(running) == 2 and running <= {
            each["pid"] for each in logged(folder, "worker serves")
        }

    wait_for(both_serve)


def test_replacement_of_a_dead_worker_is_logged_with_its_reason(
    tmp_path: Path, variables: Mapping[str, str]
) -> None:
    with serving(tmp_path, **variables) as program:
        wait_for_workers(program, tmp_path)
        victim = program.workers()[0]
        victim.kill()
        wait_for(lambda: replaced(tmp_path) == {victim.pid: "signal 9"})
        wait_for_workers(program, tmp_path)
        assert program.stop() == 0


def test_hanging_worker_is_replaced(tmp_path: Path, variables: Mapping[str, str]) -> None:
    with serving(tmp_path, prelude=SHORT_AFTER_SIGALRM, **variables) as program:
        wait_for_workers(program, tmp_path)
        victim = program.workers()[0]
        victim.suspend()
        program.process.send_signal(signal.SIGALRM)
        wait_for(lambda: victim.pid in replaced(tmp_path))
        assert replaced(tmp_path)[victim.pid].endswith(" 3 seconds")
        assert not victim.is_running()


@pytest.mark.parametrize(
    ("fault", "attempts", "reason"),
    [
        ("exit", 3, "exit code 7"),
        ("hang", 3, "not ready after 3 seconds"),
        ("lifespan", 1, "exit code 3"),
    ],
)
def test_program_gives_up_if_no_worker_can_start(
    tmp_path: Path,
    variables: Mapping[str, str],
    breakable: str,
    fault: str,
    attempts: int,
    reason: str,
) -> None:
    (tmp_path / fault).touch()
    prelude = f"{breakable}; {SHORT}" if fault == "hang" else breakable
    prelude += "; server.STOP_SECONDS = 1"
    with serving(tmp_path, prelude=prelude, SHUTDOWN_TIMEOUT="1", **variables) as program:
        assert program.process.wait(120) == 1
    (last,) = logged(tmp_path, "giving up")
    assert {*replaced(tmp_path).values(), last["reason"]} == {reason}
    assert len(replaced(tmp_path)) in {2 * attempts - 2, 2 * attempts - 1}


def test_working_worker_serves_while_another_cannot_start(
    tmp_path: Path, variables: Mapping[str, str], breakable: str
) -> None:
    prelude = f"{breakable}; server.FAILED_STARTS = 1"  # so that the pauses stay short
    with serving(tmp_path, prelude=prelude, **variables) as program:
        wait_for_workers(program, tmp_path)
        (tmp_path / "exit").touch()
        program.workers()[0].kill()
        wait_for(lambda: list(replaced(tmp_path).values()).count("exit code 7") >= 2)
        assert is_live(program)
        (tmp_path / "exit").unlink()
        wait_for_workers(program, tmp_path)
        assert program.stop() == 0


def test_program_stops_although_a_worker_hangs(
    tmp_path: Path, variables: Mapping[str, str]
) -> None:
    prelude = "server.STOP_SECONDS = 1"
    with serving(tmp_path, prelude=prelude, SHUTDOWN_TIMEOUT="1", **variables) as program:
        wait_for_workers(program, tmp_path)
        victim = program.workers()[0]
        victim.suspend()
        assert program.stop() == 0
        assert victim.pid in {entry["pid"] for entry in logged(tmp_path, "killing worker")}


def test_program_stops_at_once_while_its_workers_start(
    tmp_path: Path, variables: Mapping[str, str], breakable: str
) -> None:
    (tmp_path / "hang").touch()
    with serving(tmp_path, prelude=breakable, **variables) as program:
        wait_for(lambda: len(program.workers()) == 2)
        assert program.stop() == 0
