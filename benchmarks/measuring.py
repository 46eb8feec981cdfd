"""Measurement of a run, and the order of runs."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import astuple, dataclass, replace
from itertools import product
from pathlib import Path
from statistics import median
from typing import TypeAlias

import data
import psutil
from load import CONNECTIONS, Load, Result
from servers import Server, running

WARM_UP = 1.0
"""Seconds of load before each measurement."""


@dataclass(frozen=True)
class Bench:
    """The database, tokens and durations of every measurement."""

    url: str
    postgres: psutil.Process
    tokens: Path
    rounds: int
    seconds: float


@dataclass(frozen=True)
class Measurement:
    """One run of one operation, or the medians of several. CPU and times are in microseconds."""

    requests_per_second: float
    cpu: float
    """CPU time of the server and its children, per request."""
    postgres_cpu: float
    """CPU time of PostgreSQL, per request."""
    machine: float
    """CPU use of the whole machine, in percent."""
    p50: float
    p99: float
    failures: float

    @property
    def both(self) -> float:
        """CPU time of the server and of PostgreSQL, per request."""
        return self.cpu + self.postgres_cpu

    @property
    def remark(self) -> str:
        """The failures, for the table."""
        return f" ({self.failures:.0f} failed)" if self.failures else ""


Results: TypeAlias = Mapping[tuple[str, str], Measurement]
"""Keys are contestant and operation."""

Contestant: TypeAlias = AbstractContextManager[Callable[[str], Measurement]]
"""Starts a contestant, and gives a function that measures one operation."""


def in_turn(
    bench: Bench,
    contestants: Mapping[str, Callable[[], Contestant]],
    operations: Sequence[str] = data.OPERATIONS,
) -> Results:
    """Measure all in turn (A B C A B C …), each time on new data, and return the medians.

    The speed of a shared machine changes within minutes. So one operation is measured on all
    contestants within seconds, before the next operation. All contestants run until the end,
    because an idle one costs nothing and V8 keeps its compiled code.
    """
    taken: dict[tuple[str, str], list[Measurement]] = {}
    with ExitStack() as started:
        measures = {name: started.enter_context(each()) for name, each in contestants.items()}
        for operation, number in product(operations, range(bench.rounds)):
            for name, measure in measures.items():
                data.load(bench.url, data.TASKS_PER_USER[operation])
                one = measure(operation)
                taken.setdefault((name, operation), []).append(one)
                print(number + 1, name, operation, one, file=sys.stderr)
    return {key: middle(runs) for key, runs in taken.items()}


def middle(runs: Sequence[Measurement]) -> Measurement:
    """Return the median of each number, and the sum of failures."""
    medians = Measurement(*map(median, zip(*map(astuple, runs), strict=True)))
    return replace(medians, failures=sum(run.failures for run in runs))


@contextmanager
def driven(
    bench: Bench,
    server: Server,
    drive: Callable[[Load, float], Result],
    *,
    pool_size: int = CONNECTIONS,
) -> Iterator[Callable[[str], Measurement]]:
    """Run a server, and give a function that measures one operation on it."""
    with running(server, bench.url, pool_size) as (process, address):

        def measure(operation: str) -> Measurement:
            # The warm-up must not delete tasks that the run needs.
            harmless = "get" if operation == "delete" else operation
            Load(address, harmless, bench.tokens).flat_out(WARM_UP)
            load = Load(address, operation, bench.tokens)
            return measured(bench, process, lambda: drive(load, bench.seconds))

        yield measure


def measured(bench: Bench, server: psutil.Process | None, run: Callable[[], Result]) -> Measurement:
    """Run the load, and compare the CPU times before and after."""
    before = cpu_seconds(server), cpu_seconds(bench.postgres)
    psutil.cpu_percent()
    result = run()
    machine = psutil.cpu_percent()
    after = cpu_seconds(server), cpu_seconds(bench.postgres)
    cpu, postgres_cpu = (
        (end - start) / result.requests * 1e6 for start, end in zip(before, after, strict=True)
    )
    return Measurement(
        requests_per_second=result.requests / result.duration * 1e6,
        cpu=cpu,
        postgres_cpu=postgres_cpu,
        machine=machine,
        p50=result.p50,
        p99=result.p99,
        failures=result.failures,
    )


def cpu_seconds(process: psutil.Process | None) -> float:
    """Return the CPU time of a process and of all its children, ended ones too."""
    if process is None:
        return 0
    total = 0.0
    for member in [*process.children(recursive=True), process]:
        with suppress(psutil.NoSuchProcess):  # it ended, so its parent counts its time
            times = member.cpu_times()
            total += times.user + times.system + times.children_user + times.children_system
    return total
