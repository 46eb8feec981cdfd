"""The second table: how long an answer takes where the load does not wait for the answers."""

import os
from dataclasses import replace
from functools import partial

from data import OPERATIONS
from load import RATE_CONNECTIONS, Load, Result
from measuring import Bench, driven, in_turn
from servers import FASTIFY, FASTIFY_LOCKED, OURS

SERVERS = (OURS, FASTIFY, FASTIFY_LOCKED)
POOL_SIZE = 2 * (os.cpu_count() or 1)
INTRODUCTION = f"""## At a fixed rate

Each operation at half of what *fastify* answered at most, just before. Every request is due at its
own instant, and its latency counts from then, on at most {RATE_CONNECTIONS} connections: a server
that falls behind is not spared. Each server has two connections to PostgreSQL a core, as
PostgreSQL's wiki advises: with sixteen, all had far worse tails. Generator, server and PostgreSQL
share the machine, so what counts is the work of all three: *same guarantee* asks as much of
PostgreSQL as ours does. [ADR 11](adr/0011-what-the-guarantee-costs.md) says where the time
goes, and what was tried.

| operation | requests/s | server | p50 ms | p99 ms | CPU µs | machine's CPU |
|---|--:|---|--:|--:|--:|--:|
"""


def section(bench: Bench) -> str:
    """Measure and write the table."""
    rates = half_of_fastify(bench)

    def at_its_rate(load: Load, seconds: float) -> Result:
        return load.at_rate(rates[load.operation], seconds)

    contestants = {
        server.name: partial(driven, bench, server, at_its_rate, warm_up=0.5, pool_size=POOL_SIZE)
        for server in SERVERS
    }
    results = in_turn(bench, contestants)
    rows = (
        f"| {operation} | {rates[operation]:,.0f} | {name}{one.remark} | {one.p50 / 1000:.2f} |"
        f" {one.p99 / 1000:.2f} | {one.cpu:,.0f} | {one.machine:.0f} % |"
        for operation in OPERATIONS
        for name in contestants
        for one in [results[name, operation]]
    )
    return INTRODUCTION + "\n".join(rows)


def half_of_fastify(bench: Bench) -> dict[str, float]:
    """Return half of the requests per second that fastify manages, by operation."""
    once = replace(bench, rounds=1)
    results = in_turn(once, {"maximum": partial(driven, bench, FASTIFY, Load.flat_out)})
    return {operation: one.requests_per_second / 2 for (_, operation), one in results.items()}
