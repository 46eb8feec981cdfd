"""Memory and open files of the program's processes over time."""

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from statistics import linear_regression

import psutil

SETTLED = 40.0
"""Seconds that a process needs to import modules and fill its caches (measured: 20 to 40)."""

LONG_ENOUGH = 40.0
"""Seconds of samples after that, for a meaningful slope. Memory grows in steps of a megabyte."""


@dataclass(frozen=True)
class Sample:
    """Memory (bytes) and open files of one process at one time."""

    second: float
    memory: int
    descriptors: int


class Watch:
    """Samples every worker twice per second."""

    def __init__(self, workers: Callable[[], list[psutil.Process]]) -> None:
        self._workers = workers
        self._samples: dict[int, list[Sample]] = {}

    async def run(self) -> None:
        """Take samples until cancelled."""
        while True:
            for worker in self._workers():
                with suppress(psutil.NoSuchProcess):
                    memory, descriptors = worker.memory_info().rss, worker.num_fds()
                    sample = Sample(time.monotonic(), memory, descriptors)
                    self._samples.setdefault(worker.pid, []).append(sample)
            await asyncio.sleep(0.5)

    @property
    def most_descriptors(self) -> int:
        """The most open files of any worker."""
        return max(each.descriptors for samples in self._samples.values() for each in samples)

    def slopes(self) -> list[float]:
        """Return the memory growth of each long-lived worker, in bytes per minute."""
        return [
            60
            * linear_regression(
                [each.second for each in settled], [each.memory for each in settled]
            ).slope
            for settled in self._settled()
        ]

    def _settled(self) -> Iterator[list[Sample]]:
        for samples in self._samples.values():
            settled = [each for each in samples if each.second > samples[0].second + SETTLED]
            if settled and settled[-1].second - settled[0].second > LONG_ENOUGH:
                yield settled
