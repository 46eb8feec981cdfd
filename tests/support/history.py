"""The history of one register under concurrent use, and whether it is linearizable.

Wing and Gong look for one order of all operations in which each reads what the last one wrote,
and which no operation contradicts that had been answered before another was asked. Here every
answer carries a version, and versions are promised to grow with each write: that leaves one order,
so it is enough to look at that one.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import Literal


@dataclass
class Operation:
    """A read, or a write of a value that no other write has. Without an answer it is open."""

    kind: Literal["read", "write"]
    invoked: int
    value: str | None = None
    version: str | None = None
    answered: int | None = None


@dataclass
class History:
    """What the clients of one register saw."""

    operations: list[Operation] = field(default_factory=list)
    _clock: Iterator[int] = field(default_factory=count)

    def invoke(self, kind: Literal["read", "write"], value: str | None = None) -> Operation:
        """Note that an operation begins."""
        operation = Operation(kind, next(self._clock), value)
        self.operations.append(operation)
        return operation

    def answer(self, operation: Operation, value: str, version: str) -> None:
        """Note what came back."""
        assert operation.kind == "read" or operation.value == value, "the answer to another write"
        operation.value, operation.version = value, version
        operation.answered = next(self._clock)

    def open_operations(self) -> list[Operation]:
        """Return those that nobody knows the end of."""
        return [each for each in self.operations if each.answered is None]

    def violation(self) -> str | None:
        """Say why the history is not linearizable, or None where it is."""
        answered = [each for each in self.operations if each.answered is not None]
        writes: dict[str, Operation] = {}
        for write in answered:
            if write.kind == "write" and writes.setdefault(write.version or "", write) != write:
                return f"two writes have the version {write.version}"
        open_writes = {each.value: each for each in self.open_operations() if each.kind == "write"}
        for read in answered:
            if read.kind == "read" and (wrong := _explain(read, writes, open_writes)):
                return wrong
        seen = [each for each in open_writes.values() if each.version is not None]
        return _against_real_time(answered + seen)


def _explain(
    read: Operation, writes: dict[str, Operation], open_writes: dict[str | None, Operation]
) -> str | None:
    """Find the write that a read has seen; an open one then turns out to have been carried out."""
    version = read.version or ""
    if version not in writes and read.value in open_writes:
        write = open_writes[read.value]
        if write.version is not None:
            return f"one write has the versions {write.version} and {version}"
        write.version = version
        writes[version] = write
    if version not in writes:
        return f"nobody wrote the version {version}"
    if writes[version].value != read.value:
        return f"the version {version} was read as another value than was written"
    return None


def _against_real_time(operations: list[Operation]) -> str | None:
    """Look for one that comes before another in the order, and began only after its answer."""

    def rank(operation: Operation) -> tuple[str, bool]:
        return operation.version or "", operation.kind == "read"

    answers = sorted(
        (each for each in operations if each.answered is not None),
        key=lambda each: each.answered or 0,
    )
    latest, position = ("", False), 0
    for operation in sorted(operations, key=lambda each: each.invoked):
        while position < len(answers) and (answers[position].answered or 0) < operation.invoked:
            latest = max(latest, rank(answers[position]))
            position += 1
        if rank(operation) < latest:
            return f"a {operation.kind} of {operation.version} began after {latest[0]} was known"
    return None
