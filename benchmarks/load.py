"""Load on a server with one operation: at full speed or at a fixed rate.

Each load generator is a separate program that prints `RESULT` and five numbers.
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
"""The clients at full speed, and the size of each server's pool then."""

RATE_CONNECTIONS = 64
"""The most requests in flight at a fixed rate. It is higher, because users do not queue."""


@dataclass(frozen=True)
class Result:
    """The result of a load generator. Times are in microseconds."""

    requests: int
    duration: int
    failures: int
    p50: int
    p99: int


@dataclass(frozen=True)
class Load:
    """One operation on one server, for the users whose tokens are in a file."""

    address: str
    operation: str
    tokens: Path

    def flat_out(self, seconds: float) -> Result:
        """Send each request when the previous answer arrives. Uses wrk, or locust without wrk."""
        connections, duration = str(CONNECTIONS), f"{seconds:.0f}"
        if shutil.which("wrk"):
            command = ["wrk", "-t", "2", "-c", connections, "-d", duration]
            command += ["-s", str(HERE / "load.lua"), self.address, "--"]
        else:
            command = [str(LOCUST), str(HERE / "load_locust.py")]
            command += [self.address, connections, duration]
        return run([*command, *self._what()])

    def at_rate(self, rate: float, seconds: float) -> Result:
        """Send requests at this rate per second, even if the answers are slow."""
        command = [sys.executable, str(HERE / "load_rate.py"), self.address]
        command += [str(RATE_CONNECTIONS), str(seconds), str(rate)]
        return run([*command, *self._what()])

    def _what(self) -> list[str]:
        per_user = TASKS_PER_USER[self.operation]
        return [self.operation, str(self.tokens), str(FIRST_ID), str(per_user)]


def run(command: Sequence[str]) -> Result:
    """Run a load generator and parse its result."""
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"RESULT (.*)", output)
    if found is None:
        raise RuntimeError(output)
    return Result(*map(int, found[1].split()))
