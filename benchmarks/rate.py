"""The second table: latency at a fixed rate, which slow answers do not reduce."""

import os
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain

from data import OPERATIONS
from load import RATE_CONNECTIONS, Load, Result
from measuring import Bench, Results, driven, in_turn
from servers import FASTIFY, FASTIFY_VERSIONED, OURS, Server

SERVERS = (OURS, FASTIFY, FASTIFY_VERSIONED)
POOL_SIZE = 2 * (os.cpu_count() or 1)
TOO_FAST = 20_000.0
"""Requests per second. This is more than any server here can answer."""

INTRODUCTION = f"""## At a fixed rate

Each operation runs at half of *fastify*'s maximum rate, measured just before with the same load
generator. This generator costs more CPU than wrk. So half of the rate under wrk would be three
quarters of what this machine can do here.

Every request has a fixed start time, and its latency counts from that time. So a slow server gets
no easier load. There are at most {RATE_CONNECTIONS} connections. Each server has two connections\
 to PostgreSQL per
core, as PostgreSQL's wiki advises. With sixteen, all servers had far worse tails.

Generator, server and PostgreSQL share the machine, so the work of all three counts.
*{FASTIFY_VERSIONED.name}* needs as much work from PostgreSQL as ours.
[ADR 11](adr/0011-what-the-guarantee-costs.md) shows where the time goes, and what was tried.

| operation | requests/s | server | p50 ms | p99 ms | CPU µs | machine's CPU |
|---|--:|---|--:|--:|--:|--:|
"""


def section(bench: Bench) -> str:
    """Measure, and return the table."""
    return INTRODUCTION + "\n".join(chain(*(rows(bench, operation) for operation in OPERATIONS)))


def rows(bench: Bench, operation: str) -> Iterator[str]:
    """Measure one operation, and give its rows."""
    maximum = at_rate(bench, operation, TOO_FAST, [FASTIFY])[FASTIFY.name, operation]
    rate = maximum.requests_per_second / 2
    results = at_rate(bench, operation, rate, SERVERS)
    for (name, _), one in results.items():
        yield (
            f"| {operation} | {rate:,.0f} | {name}{one.remark} | {one.p50 / 1000:.2f} |"
            f" {one.p99 / 1000:.2f} | {one.cpu:,.0f} | {one.machine:.0f} % |"
        )


def at_rate(bench: Bench, operation: str, rate: float, servers: Sequence[Server]) -> Results:
    """Measure one operation on these servers, at one rate."""

    def drive(load: Load, seconds: float) -> Result:
        return load.at_rate(rate, seconds)

    contestants = {
        server.name: partial(driven, bench, server, drive, pool_size=POOL_SIZE)
        for server in servers
    }
    return in_turn(bench, contestants, [operation])
