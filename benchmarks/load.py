"""Driving a server with one operation: flat out or at a fixed rate.

Each load generator is a program of its own that prints `RESULT` and five numbers.
"""

import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data import FIRST_ID, TASKS_PER_USER

HERE = Path(__file__).parent
LOCUST = HERE.parent / ".venv" / "bench" / "bin" / "python"
CONNECTIONS = 16
"""How many requests are under way at once when driven flat out; also each server's pool then."""

RATE_CONNECTIONS = 64
"""How many may be under way at a fixed rate: more than flat out, as users do not queue."""


@dataclass(frozen=True)
class Result:
    """What a load generator saw. Times are in microseconds."""

    requests: int
    duration: int
    failures: int
    p50: int
    p99: int


@dataclass(frozen=True)
class Load:
    """One operation asked of one server, for the users whose tokens are in a file."""

    address: str
    operation: str
    tokens: Path

    def flat_out(self, seconds: float) -> Result:
        """Ask as fast as the answers come, with wrk, or with locust where it is absent."""
        connections, duration = str(CONNECTIONS), f"{seconds:.0f}"
        if shutil.which("wrk"):
            command = ["wrk", "-t", "2", "-c", connections, "-d", duration]
            command += ["-s", str(HERE / "load.lua"), self.address, "--"]
        else:
            command = [str(LOCUST), str(HERE / "load_locust.py")]
            command += [self.address, connections, duration]
        return run([*command, *self._what()])

    def at_rate(self, rate: float, seconds: float) -> Result:
        """Ask so many times a second, whatever the answers take."""
        command = [sys.executable, str(HERE / "load_rate.py"), self.address]
        command += [str(RATE_CONNECTIONS), str(seconds), str(rate)]
        return run([*command, *self._what()])

    def _what(self) -> list[str]:
        per_user = TASKS_PER_USER[self.operation]
        return [self.operation, str(self.tokens), str(FIRST_ID), str(per_user)]


def run(command: Sequence[str]) -> Result:
    """Run a load generator."""
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"RESULT (.*)", output)
    if found is None:
        raise RuntimeError(output)
    return Result(*map(int, found[1].split()))
