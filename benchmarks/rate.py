"""The second table: how long an answer takes where the load does not wait for the answers."""

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
"""Requests a second that no server here keeps up with."""

INTRODUCTION = f"""## At a fixed rate

Each operation at half of what *fastify* answered at most, just before, to the same load generator
(half of what it answers to wrk, which costs less, is three quarters of what this machine can do
with this one). Every request is due at its own instant, and its latency counts from then, on at
most {RATE_CONNECTIONS} connections: a server that falls behind is not spared. Each server has two
connections to PostgreSQL a core, as PostgreSQL's wiki advises: with sixteen, all had far worse
tails. Generator, server and PostgreSQL share the machine, so what counts is the work of all three:
*fastify + versions* asks as much of PostgreSQL as ours does.
[ADR 11](adr/0011-what-the-guarantee-costs.md) says where the time goes, and what was tried.

| operation | requests/s | server | p50 ms | p99 ms | CPU µs | machine's CPU |
|---|--:|---|--:|--:|--:|--:|
"""


def section(bench: Bench) -> str:
    """Measure and write the table."""
    return INTRODUCTION + "\n".join(chain(*(rows(bench, operation) for operation in OPERATIONS)))


def rows(bench: Bench, operation: str) -> Iterator[str]:
    """Measure one operation and write its rows."""
    maximum = at_rate(bench, operation, TOO_FAST, [FASTIFY])[FASTIFY.name, operation]
    rate = maximum.requests_per_second / 2
    results = at_rate(bench, operation, rate, SERVERS)
    for (name, _), one in results.items():
        yield (
            f"| {operation} | {rate:,.0f} | {name}{one.remark} | {one.p50 / 1000:.2f} |"
            f" {one.p99 / 1000:.2f} | {one.cpu:,.0f} | {one.machine:.0f} % |"
        )


def at_rate(bench: Bench, operation: str, rate: float, servers: Sequence[Server]) -> Results:
    """Measure one operation, at one rate."""

    def drive(load: Load, seconds: float) -> Result:
        return load.at_rate(rate, seconds)

    contestants = {
        server.name: partial(driven, bench, server, drive, pool_size=POOL_SIZE)
        for server in servers
    }
    return in_turn(bench, contestants, [operation])
