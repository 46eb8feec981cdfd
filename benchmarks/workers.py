"""The third table: what a second worker adds."""

from functools import partial

from load import Load
from measuring import Bench, driven, in_turn
from servers import OURS, OURS_TWICE

OPERATIONS = ("list", "get", "create")
WORKERS = {1: OURS, 2: OURS_TWICE}
INTRODUCTION = """## With `--workers 2`

The load generator and PostgreSQL run on the same cores as the server: a second worker gets what
these leave, and once the whole machine is in use (100 %) there is nothing left to scale to. The
last column compares the requests per second with those of one worker.

| operation | workers | requests/s | CPU µs | PostgreSQL µs | machine's CPU | one worker = 1 |
|---|--:|--:|--:|--:|--:|--:|
"""


def section(bench: Bench) -> str:
    """Measure and write the table."""
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
