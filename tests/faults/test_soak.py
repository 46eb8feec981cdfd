"""`make load` and `make soak` in short: judged by what they count, not by what they measure."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(module: str, *arguments: str) -> None:
    """Run one of them, and show its table where it says FAIL."""
    finished = subprocess.run(
        [sys.executable, "-m", module, "--counts-alone", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr


def test_what_is_over_the_limit_is_refused_in_shape_and_never_comes_to_the_database() -> None:
    run("soak.load", "--seconds", "3", "--max-in-flight", "2")


def test_every_acknowledged_operation_is_stored_whatever_breaks() -> None:
    run("soak.soak", "--minutes", "0.06", "--seed", "3")
