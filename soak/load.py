"""`make load`: the program at twice the load that it can carry.

What it can carry is measured first, closed-loop; then twice that rate is offered open-loop; and so
on in turn, since a machine that is shared is not always as fast. Generator, program and database
share one machine, so what is the limit has to be chosen: here PostgreSQL is put twenty milliseconds
away, behind a proxy, as it is in production, and the ten connections of the pool decide how much
can be carried. The machine then has CPU to spare for twice that, and what is measured is what the
program does with too much work, not who wins the fight for two cores. The program has one core to
itself, the rest share the others. With `--milliseconds 0` the program's own CPU is the limit, and
each refusal takes some of it.
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
from soak.workload import messages, seed
from support.program import serving
from support.service import SECRET
from todo_api.database import migrations
from todo_api.database.embedded import EmbeddedPostgres

AT_ONCE = 100
"""How many requests are under way at once, at most, to find out what can be carried."""

CONNECTIONS = 2000
"""How many take turns, always: a request on one that was used just now is cheaper (measured)."""

ROUNDS = 3
FACTOR = 2.0
GOODPUT = 0.9
MEMORY = 50e6
"""What the program may keep in bytes: Python gives back little of what it once had."""

BESIDE_REQUESTS = 100
"""Transactions that no request asked for: sessions that begin, the start, autovacuum."""


@dataclass(frozen=True)
class Limits:
    """How the program is set."""

    in_flight: int
    wait: float


@dataclass(frozen=True)
class State:
    """What the program holds."""

    memory: int
    descriptors: int


@dataclass
class Bench:
    """The running program, and what it has answered so far."""

    address: str
    process: psutil.Process
    messages: Iterator[bytes]
    at_once: int
    """How many requests are under way at once where nothing shall be refused."""
    statuses: Counter[int] = field(default_factory=Counter)

    def run(self, name: str, drive: Callable[[Generator], Tally]) -> Tally:
        """Drive the program and say how it went."""
        before = sum(self.process.cpu_times()[:2])
        with Generator(self.address, CONNECTIONS) as generator:
            tally = drive(generator)
        cpu = (sum(self.process.cpu_times()[:2]) - before) / tally.seconds
        self.statuses += tally.statuses
        say(
            f"{name:<20} {tally.goodput:7,.0f}/s done {tally.statuses[503]:8,} refused"
            f"   p50 {tally.percentile(50):5.2f} s   p99 {tally.percentile(99):5.2f} s"
            f"   CPU {cpu:4.0%}"
        )
        return tally

    def closed_loop(self, name: str, seconds: float) -> Tally:
        """Find out how much can be carried."""
        return self.run(name, lambda it: it.closed_loop(self.messages, self.at_once, seconds))

    def open_loop(self, name: str, rate: float, seconds: float) -> Tally:
        """Offer a rate."""
        return self.run(name, lambda it: it.open_loop(self.messages, rate, seconds))

    def state(self) -> State:
        """Look at the program once the connections to it are gone."""
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
    """Everything that the checks look at."""

    limits: Limits
    most: list[Tally]
    """Before, between and after the rounds."""
    over: list[Tally]
    """At twice the load, in each round."""
    before: State
    end: State
    statuses: Counter[int]
    stored: int
    transactions: int

    @property
    def done(self) -> int:
        """How many requests succeeded, from the first to the last."""
        return sum(
            number
            for status, number in self.statuses.items()
            if status < HTTPStatus.MULTIPLE_CHOICES
        )


def main() -> int:
    """Run, and judge."""
    parser = argparse.ArgumentParser(prog="make load", description=__doc__)
    parser.add_argument("--seconds", type=float, default=30, help="at twice the load")
    parser.add_argument("--milliseconds", type=float, default=20, help="to PostgreSQL and back")
    parser.add_argument("--max-in-flight", type=int, default=100, help="MAX_IN_FLIGHT")
    parser.add_argument("--wait", type=float, default=3, help="POOL_TIMEOUT, in seconds")
    parser.add_argument("--counts-alone", action="store_true", help="judge nothing measured")
    options = parser.parse_args()
    limits = Limits(options.max_in_flight, options.wait)
    outcome = measure(options.seconds, options.milliseconds / 1000, limits)
    say()
    return verdict(list(checks(outcome)), measured=not options.counts_alone)


def measure(seconds: float, distance: float, limits: Limits) -> Outcome:
    """Start everything, and drive it."""
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
            most, over = [bench.closed_loop("as fast as it can", each / 2)], []
            for _ in range(ROUNDS):
                rate = FACTOR * most[-1].goodput
                over.append(bench.open_loop("twice that", rate, each))
                most.append(bench.closed_loop("at once afterwards", each / 2))
            end = bench.state()
        return Outcome(
            limits,
            most,
            over,
            before,
            end,
            bench.statuses,
            count(postgres.url, "SELECT count(*) FROM tasks WHERE title LIKE 'new %'"),
            count(postgres.url, TRANSACTIONS) - transactions,
        )


TRANSACTIONS = """
SELECT xact_commit + xact_rollback FROM pg_stat_database WHERE datname = current_database()
"""


def count(url: str, query: str) -> int:
    """Ask the database for a number."""
    with psycopg.connect(url) as sql:
        row = sql.execute(query).fetchone()
    return int(row[0]) if row else 0


@contextmanager
def started(folder: str, url: str, limits: Limits) -> Iterator[Bench]:
    """Run the program, with row security on and everything else as it comes."""
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
    """Compare what was seen with what was promised."""
    refused = it.statuses[503]
    wrong = sum((tally.wrong for tally in it.most + it.over), Counter[str]())
    yield Check("there is something to refuse", f"{refused:,} refused", refused > 0)
    yield Check(
        "everything else is 503 with Retry-After, in the contract's shape",
        ", ".join(f"{number:,} {what}" for what, number in wrong.items()) or "nothing else",
        not wrong,
    )
    yield Check(
        "what was acknowledged is stored, and nothing that was refused",
        f"{it.statuses[201]:,} acknowledged, {it.stored:,} stored",
        it.statuses[201] == it.stored,
    )
    yield Check(
        "what was refused has not come to the database",
        f"{it.done:,} done, {it.transactions:,} transactions",
        it.done <= it.transactions < it.done + BESIDE_REQUESTS,
    )
    refused_afterwards = sum(tally.statuses[503] for tally in it.most)
    yield Check(
        "nothing is refused once the load is gone",
        f"{refused_afterwards:,} refused",
        refused_afterwards == 0,
    )
    yield Check(
        "no file stays open",
        f"{it.before.descriptors} before, {it.end.descriptors} after",
        it.end.descriptors <= it.before.descriptors,
    )
    yield from measured_checks(it)


def measured_checks(it: Outcome) -> Iterator[Check]:
    """Compare what depends on the machine as well."""
    most = [tally.goodput for tally in it.most]
    ratio = median(
        2 * over.goodput / (before + after)
        for over, (before, after) in zip(it.over, pairwise(most), strict=True)
    )
    yield Check(
        f"at twice the load at least {GOODPUT:.0%} of the most is done",
        f"{ratio:.0%}",
        ratio >= GOODPUT,
        "measured",
    )
    again = median(after / before for before, after in pairwise(most))
    yield Check(
        f"at once afterwards too: {GOODPUT:.0%}", f"{again:.0%}", again >= GOODPUT, "measured"
    )
    # Little: so many in flight, at such a rate, take so long on average. Before that they wait.
    bound = it.limits.wait + 2 * it.limits.in_flight / median(most)
    p99 = median(tally.percentile(99) for tally in it.over)
    yield Check(
        f"p99 of what was accepted, below {it.limits.wait:g} s for a place"
        f" + 2 x {it.limits.in_flight} in flight / the rate = {bound:.2f} s",
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
