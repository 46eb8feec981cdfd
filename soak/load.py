"""`make load`: run the program at twice its capacity.

The generator measures the capacity in a closed loop, then offers twice that rate in an open loop.
It repeats both in turn, because the speed of a shared machine changes.

Generator, program and database share one machine, so the test must choose the bottleneck. A proxy
delays PostgreSQL by twenty milliseconds, like the network in production. So the ten connections of
the pool limit the capacity, and the machine has CPU left for twice the load. The test then shows
how the program handles overload, and not how processes compete for two cores. The program has a
core of its own, and the other processes share the rest. With `--milliseconds 0`, the program's CPU
is the bottleneck, and each refusal uses some of it.
"""

import argparse
import gc
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from itertools import pairwise
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from urllib.parse import urlsplit

import psutil
import psycopg

from soak.distance import at_a_distance
from soak.generator import Generator, Tally
from soak.verdict import Check, say, verdict
from soak.workload import SHARES, Message, messages, seed
from support.program import serving
from support.service import SECRET
from todo_api.database import migrations
from todo_api.database.embedded import EmbeddedPostgres

AT_ONCE = 100
"""The most requests in flight while the capacity is measured."""

CONNECTIONS = 2000
"""All connections take turns, because a request on a just-used connection is cheaper (measured)."""

ROUNDS = 3
FACTOR = 2.0
GOODPUT = 0.9
MEMORY = 50e6
"""The memory growth that is allowed, in bytes, because Python returns little memory."""

BESIDE_REQUESTS = 100
"""The most transactions without a request: new sessions, the start, autovacuum."""


@dataclass(frozen=True)
class Limits:
    """The program's settings for overload."""

    in_flight: int
    wait: float


@dataclass(frozen=True)
class State:
    """The program's memory and open files."""

    memory: int
    descriptors: int


@dataclass
class Bench:
    """The running program, and a count of its answers."""

    address: str
    process: psutil.Process
    messages: Iterator[Message]
    at_once: int
    """Requests in flight in the closed loop, few enough that none is refused."""
    statuses: Counter[int] = field(default_factory=Counter)
    tags: dict[str, bytes] = field(default_factory=dict)
    """The latest tag of each task and list, which conditional requests send."""
    created: int = 0
    replayed: int = 0

    def run(self, name: str, drive: Callable[[Generator], Tally]) -> Tally:
        """Put load on the program, and print the result."""
        before = sum(self.process.cpu_times()[:2])
        with Generator(self.address, CONNECTIONS, self.tags) as generator:
            tally = drive(generator)
        cpu = (sum(self.process.cpu_times()[:2]) - before) / tally.seconds
        self.statuses += tally.statuses
        self.created += tally.created
        self.replayed += tally.replayed
        say(
            f"{name:<20} {tally.goodput:7,.0f}/s done {tally.statuses[503]:8,} refused"
            f"   p50 {tally.percentile(50):5.2f} s   p99 {tally.percentile(99):5.2f} s"
            f"   CPU {cpu:4.0%}"
        )
        return tally

    def closed_loop(self, name: str, seconds: float) -> Tally:
        """Measure the capacity."""
        return self.run(name, lambda it: it.closed_loop(self.messages, self.at_once, seconds))

    def open_loop(self, name: str, rate: float, seconds: float) -> Tally:
        """Send requests at a fixed rate."""
        return self.run(name, lambda it: it.open_loop(self.messages, rate, seconds))

    def state(self) -> State:
        """Read memory and open files after all connections are closed."""
        deadline = time.monotonic() + 5
        while self._is_connected() and time.monotonic() < deadline:
            time.sleep(0.05)
        return State(self.process.memory_info().rss, self.process.num_fds())

    def _is_connected(self) -> bool:
        port = urlsplit(self.address).port
        return any(
            each.laddr.port == port and each.status != psutil.CONN_LISTEN
            for each in self.process.net_connections("tcp4")
        )


@dataclass(frozen=True)
class Outcome:
    """All results that the checks need."""

    limits: Limits
    most: list[Tally]
    """Results at full capacity: before, between and after the rounds."""
    over: list[Tally]
    """Results at twice the capacity, one per round."""
    before: State
    end: State
    statuses: Counter[int]
    created: int
    replayed: int
    stored: int
    transactions: int

    @property
    def done(self) -> int:
        """The number of requests that succeeded, in all runs."""
        return sum(
            number for status, number in self.statuses.items() if status < HTTPStatus.BAD_REQUEST
        )

    @property
    def most_beside(self) -> float:
        """The most other transactions. A list that changes meanwhile takes two (ADR 14)."""
        return BESIDE_REQUESTS + SHARES["list if changed"] / sum(SHARES.values()) * self.done

    @property
    def expected_transactions(self) -> int:
        """One for each success, and two for each 412, because the service asks for its reason."""
        return self.done + 2 * self.statuses[HTTPStatus.PRECONDITION_FAILED]


def main() -> int:
    """Run the test, and print the verdict."""
    parser = argparse.ArgumentParser(prog="make load", description=__doc__)
    parser.add_argument("--seconds", type=float, default=30, help="time at twice the capacity")
    parser.add_argument("--milliseconds", type=float, default=20, help="round trip to PostgreSQL")
    parser.add_argument("--max-in-flight", type=int, default=100, help="MAX_IN_FLIGHT")
    parser.add_argument("--wait", type=float, default=3, help="POOL_TIMEOUT, in seconds")
    parser.add_argument("--counts-alone", action="store_true", help="do not judge measured values")
    options = parser.parse_args()
    limits = Limits(options.max_in_flight, options.wait)
    outcome = measure(options.seconds, options.milliseconds / 1000, limits)
    say()
    return verdict(list(checks(outcome)), measured=not options.counts_alone)


def measure(seconds: float, distance: float, limits: Limits) -> Outcome:
    """Start all processes, run the rounds, and return the results."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[1:] or cores)
    with (
        TemporaryDirectory(prefix="todo-api-load-") as name,
        EmbeddedPostgres.start(Path(name) / "postgres", durable=False) as postgres,
    ):
        migrations.migrate(postgres.url)
        seed(postgres.url)
        transactions = count(postgres.url, TRANSACTIONS)
        with at_a_distance(postgres.url, distance) as url, started(name, url, limits) as bench:
            bench.process.cpu_affinity(cores[:1])
            gc.disable()
            bench.closed_loop("warming up", seconds / 10)
            before = bench.state()
            each = seconds / ROUNDS
            most, over = [bench.closed_loop("at full capacity", each / 2)], []
            for _ in range(ROUNDS):
                rate = FACTOR * most[-1].goodput
                over.append(bench.open_loop("twice the capacity", rate, each))
                most.append(bench.closed_loop("right afterwards", each / 2))
            end = bench.state()
        return Outcome(
            limits,
            most,
            over,
            before,
            end,
            bench.statuses,
            bench.created,
            bench.replayed,
            count(postgres.url, "SELECT count(*) FROM tasks WHERE title LIKE 'new %'"),
            count(postgres.url, TRANSACTIONS) - transactions,
        )


TRANSACTIONS = """
SELECT xact_commit + xact_rollback FROM pg_stat_database WHERE datname = current_database()
"""


def count(url: str, query: str) -> int:
    """Return the number that a query selects."""
    with psycopg.connect(url) as sql:
        row = sql.execute(query).fetchone()
    return int(row[0]) if row else 0


@contextmanager
def started(folder: str, url: str, limits: Limits) -> Iterator[Bench]:
    """Run the program with default settings, except for the overload limits."""
    variables = {
        "DATABASE_URL": url,
        "BETTER_AUTH_SECRET": SECRET,
        "MAX_IN_FLIGHT": str(limits.in_flight),
        "POOL_TIMEOUT": str(limits.wait),
    }
    with serving(Path(folder), **variables) as program:
        process = psutil.Process(program.process.pid)
        yield Bench(program.address, process, messages(), min(AT_ONCE, limits.in_flight))
        program.stop()


def checks(it: Outcome) -> Iterator[Check]:
    """Compare the results with the promises."""
    refused = it.statuses[503]
    wrong = sum((tally.wrong for tally in it.most + it.over), Counter[str]())
    yield Check("the program refuses some requests", f"{refused:,} refused", refused > 0)
    yield Check(
        "all other answers are 412, or 503 in the right shape",
        ", ".join(f"{number:,} {what}" for what, number in wrong.items()) or "nothing else",
        not wrong,
    )
    yield Check(
        "acknowledged tasks are stored, and refused tasks are not",
        f"{it.created:,} acknowledged, {it.stored:,} stored",
        it.created == it.stored,
    )
    effects = {"304": it.statuses[304], "replayed": it.replayed}
    yield Check(
        "conditional lists and repeated keys have an effect",
        ", ".join(f"{number:,} {what}" for what, number in effects.items()),
        all(effects.values()),
    )
    yield Check(
        "refused requests do not reach the database",
        f"{it.done:,} done, {it.statuses[412]:,} with 412, {it.transactions:,} transactions",
        0 <= it.transactions - it.expected_transactions < it.most_beside,
    )
    refused_afterwards = sum(tally.statuses[503] for tally in it.most)
    yield Check(
        "no request is refused after the overload",
        f"{refused_afterwards:,} refused",
        refused_afterwards == 0,
    )
    yield Check(
        "all extra files are closed",
        f"{it.before.descriptors} before, {it.end.descriptors} after",
        it.end.descriptors <= it.before.descriptors,
    )
    yield from measured_checks(it)


def measured_checks(it: Outcome) -> Iterator[Check]:
    """Compare the results that depend on the machine."""
    most = [tally.goodput for tally in it.most]
    ratio = median(
        2 * over.goodput / (before + after)
        for over, (before, after) in zip(it.over, pairwise(most), strict=True)
    )
    yield Check(
        f"goodput at twice the capacity is at least {GOODPUT:.0%} of it",
        f"{ratio:.0%}",
        ratio >= GOODPUT,
        "measured",
    )
    again = median(after / before for before, after in pairwise(most))
    yield Check(
        f"goodput right afterwards is at least {GOODPUT:.0%} too",
        f"{again:.0%}",
        again >= GOODPUT,
        "measured",
    )
    # Little's law: requests in flight / rate = average time. Before that, they wait for a slot.
    bound = it.limits.wait + 2 * it.limits.in_flight / median(most)
    p99 = median(tally.percentile(99) for tally in it.over)
    yield Check(
        f"p99 of accepted requests <= {it.limits.wait:g} s for a slot"
        f" + 2 x {it.limits.in_flight} slots / rate = {bound:.2f} s",
        f"{p99:.2f} s",
        p99 <= bound,
        "measured",
    )
    growth = it.end.memory - it.before.memory
    yield Check(
        f"memory grows by less than {MEMORY / 1e6:.0f} MB",
        f"{it.before.memory / 1e6:.0f} MB before, {it.end.memory / 1e6:.0f} MB after",
        growth < MEMORY,
        "measured",
    )


if __name__ == "__main__":
    sys.exit(main())
