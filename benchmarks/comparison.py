"""The first table: what a request costs each server, driven as fast as it answers."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import pgbench
from data import OPERATIONS
from load import CONNECTIONS, Load
from measuring import Bench, Contestant, Measurement, Results, driven, in_turn, measured
from servers import FASTIFY, FASTIFY_LOCKED, FLOOR, IDIOMATIC, OURS, OURS_UNLOCKED

SERVERS = (OURS, OURS_UNLOCKED, IDIOMATIC, FASTIFY, FASTIFY_LOCKED, FLOOR)
PGBENCH = "pgbench"
NAMES = (*(server.name for server in SERVERS), PGBENCH)
INTRODUCTION = f"""## As fast as they answer

One process a server, {CONNECTIONS} connections, the next request as soon as an answer is there,
and as many connections to PostgreSQL.
*CPU* is what a request costs the server, *PostgreSQL* what it costs the database; the last column
compares the former with that of ours (with row security on): 1.20 means a fifth more. *idiomatic*
is FastAPI, SQLModel's `AsyncSession`, asyncpg and PyJWT as documented; *fastify* is Fastify, `pg`
and `@fastify/jwt` with schemas and named prepared statements; *same guarantee* adds the
transaction, the role, the user for row security and the check for an erased account, in `pg`'s
pipeline mode. There are two floors: *floor* is an ASGI application that answers a constant;
*pgbench* runs our own SQL, row security included, without a server.

| operation | server | requests/s | CPU µs | PostgreSQL µs | p50 ms | p99 ms | CPU, ours = 1 |
|---|---|--:|--:|--:|--:|--:|--:|
"""


def section(bench: Bench, only: Sequence[str] | None) -> str:
    """Measure everything, or only these, and write the table."""
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
    """Let pgbench run the SQL of an operation."""
    yield lambda operation: measured(
        bench, None, lambda: pgbench.flat_out(bench.url, operation, bench.seconds)
    )


def row(operation: str, name: str, results: Results) -> str:
    """Write one row."""
    one, ours = results[name, operation], results.get((OURS.name, operation))
    cpu = f"{one.cpu:,.0f}" if one.cpu else ""
    ratio = f"{one.cpu / ours.cpu:.2f}" if ours and one.cpu else ""
    return (
        f"| {operation} | {name}{one.remark} | {one.requests_per_second:,.0f} | {cpu} |"
        f" {one.postgres_cpu:,.0f} | {one.p50 / 1000:.1f} | {one.p99 / 1000:.1f} | {ratio} |"
    )
