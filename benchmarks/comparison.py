"""The first table: the cost of a request on each server, at the highest rate that it reaches."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import pgbench
from data import OPERATIONS
from load import CONNECTIONS, Load
from measuring import Bench, Contestant, Measurement, Results, driven, in_turn, measured
from servers import (
    FASTIFY,
    FASTIFY_LOCKED,
    FASTIFY_VERSIONED,
    FLOOR,
    IDIOMATIC,
    OURS,
    OURS_UNLOCKED,
)

SERVERS = (OURS, OURS_UNLOCKED, IDIOMATIC, FASTIFY, FASTIFY_LOCKED, FASTIFY_VERSIONED, FLOOR)
PGBENCH = "pgbench"
NAMES = (*(server.name for server in SERVERS), PGBENCH)
INTRODUCTION = f"""## As fast as they answer

Each server is one process with {CONNECTIONS} clients and {CONNECTIONS} connections to PostgreSQL.\
 Each client sends its
next request as soon as it has its answer.

*CPU* is the server's CPU time per request. *PostgreSQL* is the database's CPU time per request.
*Both* is the sum. The last two columns compare *CPU* and *both* with ours (with row security on).
1.20 means a fifth more.

- *idiomatic* uses FastAPI, SQLModel's `AsyncSession`, asyncpg and PyJWT as their documentation
  shows them.
- *fastify* uses Fastify, `pg` and `@fastify/jwt`, with schemas and named prepared statements.
- *fastify + row security* also opens a transaction, takes the role, names the owner and sets the
  timeouts. It sends all of this and its statement in one write, with `pg`'s pipeline mode.
- *fastify + versions* also gives each write a version, refuses void tokens, sets `completed_at`
  and leaves tombstones. Its statements do the same as ours. It does not remove old tombstones.
- *floor* is an ASGI application that always sends the same answer.
- *pgbench* runs our SQL with row security, without a server.

| operation | server | requests/s | CPU µs | PostgreSQL µs | both µs | p50 ms | p99 ms |\
 CPU, ours = 1 | both, ours = 1 |
|---|---|--:|--:|--:|--:|--:|--:|--:|--:|
"""


def section(bench: Bench, only: Sequence[str] | None) -> str:
    """Measure all servers, or only these, and return the table."""
    contestants: dict[str, Callable[[], Contestant]] = {
        server.name: partial(driven, bench, server, Load.flat_out) for server in SERVERS
    }
    contestants[PGBENCH] = partial(sql_alone, bench)
    chosen = {name: contestants[name] for name in NAMES if not only or name in only}
    results = in_turn(bench, chosen)
    rows = (row(operation, name, results) for operation in OPERATIONS for name in chosen)
    return INTRODUCTION + "\n".join(rows)


@contextmanager
def sql_alone(bench: Bench) -> Iterator[Callable[[str], Measurement]]:
    """Give a function that measures an operation's SQL with pgbench."""
    yield lambda operation: measured(
        bench, None, lambda: pgbench.flat_out(bench.url, operation, bench.seconds)
    )


def row(operation: str, name: str, results: Results) -> str:
    """Return one row of the table."""
    one, ours = results[name, operation], results.get((OURS.name, operation))
    cpu = both = cpu_ratio = both_ratio = ""
    if one.cpu:  # pgbench has no server
        cpu, both = f"{one.cpu:,.0f}", f"{one.both:,.0f}"
        if ours:
            cpu_ratio, both_ratio = f"{one.cpu / ours.cpu:.2f}", f"{one.both / ours.both:.2f}"
    return (
        f"| {operation} | {name}{one.remark} | {one.requests_per_second:,.0f} | {cpu} |"
        f" {one.postgres_cpu:,.0f} | {both} | {one.p50 / 1000:.1f} | {one.p99 / 1000:.1f} |"
        f" {cpu_ratio} | {both_ratio} |"
    )
