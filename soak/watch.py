"""What the program's processes hold, from the first moment to the last."""

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from statistics import linear_regression

import psutil

SETTLED = 10.0
"""Seconds after which a process has imported and cached what it needs."""

LONG_ENOUGH = 20.0
"""Seconds that have to be seen after that, to speak of a slope."""


@dataclass(frozen=True)
class Sample:
    """One look at one process."""

    second: float
    memory: int
    descriptors: int


class Watch:
    """Looks at every worker twice a second."""

    def __init__(self, workers: Callable[[], list[psutil.Process]]) -> None:
        self._workers = workers
        self._samples: dict[int, list[Sample]] = {}

    async def run(self) -> None:
        """Look until cancelled."""
        while True:
            for worker in self._workers():
                with suppress(psutil.NoSuchProcess):
                    memory, descriptors = worker.memory_info().rss, worker.num_fds()
                    sample = Sample(time.monotonic(), memory, descriptors)
                    self._samples.setdefault(worker.pid, []).append(sample)
            await asyncio.sleep(0.5)

    @property
    def most_descriptors(self) -> int:
        """How many one of them had open at most."""
        return max(each.descriptors for samples in self._samples.values() for each in samples)

    def slopes(self) -> list[float]:
        """Return by how much the memory grew, in bytes a minute, of each that lived long enough."""
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
