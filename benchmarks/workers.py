"""The third table: the effect of a second worker."""

from functools import partial

from load import Load
from measuring import Bench, driven, in_turn
from servers import OURS, OURS_TWICE

OPERATIONS = ("list", "get", "create")
WORKERS = {1: OURS, 2: OURS_TWICE}
INTRODUCTION = """## With `--workers 2`

The load generator and PostgreSQL run on the same cores as the server. So a second worker gets only
the CPU that they leave free, and at 100 % there is none left. The last column compares the
requests per second with those of one worker.

| operation | workers | requests/s | CPU µs | PostgreSQL µs | machine's CPU | one worker = 1 |
|---|--:|--:|--:|--:|--:|--:|
"""


def section(bench: Bench) -> str:
    """Measure, and return the table."""
    contestants = {
        server.name: partial(driven, bench, server, Load.flat_out) for server in WORKERS.values()
    }
    results = in_turn(bench, contestants, OPERATIONS)
    rows = (
        f"| {operation} | {workers}{one.remark} | {one.requests_per_second:,.0f} | {one.cpu:,.0f} |"
        f" {one.postgres_cpu:,.0f} | {one.machine:.0f} % |"
        f" {one.requests_per_second / results[OURS.name, operation].requests_per_second:.2f} |"
        for operation in OPERATIONS
        for workers, server in WORKERS.items()
        for one in [results[server.name, operation]]
    )
    return INTRODUCTION + "\n".join(rows)
