"""The answers that the clients got, to compare with the stored tasks.

Each task has one writer, and the writer waits for each answer before the next request. So only
writes with an unknown outcome can overlap. After a 500, a 503 or no answer, PostgreSQL may have
stored the write, or may store it later. So its value stays possible until a client sees it.
"""

from collections import Counter
from dataclasses import dataclass, field
from enum import Enum
from typing import Any


class Fate(Enum):
    """The outcome of an operation, as far as its client knows."""

    DONE = "done"
    REFUSED = "refused"
    UNKNOWN = "unknown"
    NOT_SENT = "not sent"


@dataclass
class Register:
    """One field of a task: its last known value, and the values that it may have now."""

    known: object
    possible: list[object] = field(default_factory=list)

    def write(self, value: object, fate: Fate) -> None:
        """Record a write and its outcome."""
        if fate is Fate.DONE:
            self.known = value
        elif fate is Fate.UNKNOWN:
            self.possible.append(value)

    def explains(self, value: object) -> bool:
        """Return whether this value is possible, and make it the known value."""
        if value == self.known:
            return True
        if value not in self.possible:
            return False
        self.possible.remove(value)  # a write happens only once
        self.known = value
        return True


@dataclass
class Task:
    """A task, as its only writer knows it."""

    id: int
    owner: str
    title: str
    description: Register
    completed: Register
    updated_at: str
    version: int
    deleted: Fate = Fate.REFUSED
    """The outcome of the latest attempt to delete it."""

    def contradiction(self, shown: dict[str, Any]) -> str | None:
        """Return what in a shown task is impossible, or None."""
        if (shown["id"], shown["user_id"], shown["title"]) != (self.id, self.owner, self.title):
            return f"task {self.id} has another id, owner or title"
        if self.deleted is Fate.DONE:
            return f"task {self.id} is visible after its deletion"
        before, now = ((self.updated_at, self.version), (shown["updated_at"], shown["version"]))
        if now[0] < before[0] or now[1] < before[1]:
            return f"task {self.id}: updated_at and version went back from {before} to {now}"
        if (now[0] == before[0]) != (now[1] == before[1]):
            return f"task {self.id}: only one of updated_at and version changed, {before} to {now}"
        self.updated_at, self.version = now
        for name, register in (("description", self.description), ("completed", self.completed)):
            if not register.explains(shown[name]):
                return f"task {self.id}: {name} is {shown[name]!r}, not {register.known!r}"
        return None


@dataclass
class Ledger:
    """All operations, and all broken promises."""

    titles: dict[str, Fate] = field(default_factory=dict)
    """The outcome of each attempt to create a task, by title."""
    tasks: dict[str, Task] = field(default_factory=dict)
    """Tasks whose creation was acknowledged, by title."""
    fates: Counter[Fate] = field(default_factory=Counter)
    violations: dict[str, list[str]] = field(default_factory=dict)
    calm: bool = False
    """True once the faults have stopped."""
    failed_in_calm: int = 0
    done_in_calm: int = 0
    slowest: float = 0.0

    def violated(self, promise: str, what: str) -> None:
        """Record a broken promise."""
        self.violations.setdefault(promise, []).append(what)

    def count(self, fate: Fate) -> None:
        """Record the outcome of an operation."""
        self.fates[fate] += 1
        if self.calm and fate in {Fate.DONE, Fate.REFUSED}:
            self.done_in_calm += 1
        elif self.calm:
            self.failed_in_calm += 1
