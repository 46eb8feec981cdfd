"""The SQL that pgbench runs in `make bench` is the service's, and PostgreSQL accepts it."""

import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
EACH_ONCE = """
import sys, data, pgbench
data.load(sys.argv[1], 1)
for operation in pgbench.STATEMENTS:
    result = pgbench.run(sys.argv[1], operation, "--transactions=1")
    assert result.requests, operation
    assert not result.failures, operation
"""


def test_every_operation_runs(database_url: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", EACH_ONCE, database_url],
        cwd=BENCHMARKS,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    assert done.returncode == 0
