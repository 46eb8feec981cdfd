"""What the clients were told, so that it can be held against what is stored.

Each task has one writer, who waits for each answer before he goes on. So there is no concurrency
to reason about but that of the unknown: a write that was answered with 500 or 503, or not at all,
may have been kept, and may even be carried out later. It remains possible until it has been seen.
"""

from collections import Counter
from dataclasses import dataclass, field
from enum import Enum
from typing import Any


class Fate(Enum):
    """What became of an operation, as far as its client knows."""

    DONE = "done"
    REFUSED = "refused"
    UNKNOWN = "unknown"
    NOT_SENT = "not sent"


@dataclass
class Register:
    """One field of a task: what it was last known to be, and what it may have become."""

    known: object
    possible: list[object] = field(default_factory=list)

    def write(self, value: object, fate: Fate) -> None:
        """Note a write."""
        if fate is Fate.DONE:
            self.known = value
        elif fate is Fate.UNKNOWN:
            self.possible.append(value)

    def explains(self, value: object) -> bool:
        """Tell whether the value can be there; from now on it is known to be."""
        if value == self.known:
            return True
        if value not in self.possible:
            return False
        self.possible.remove(value)  # a write takes place once
        self.known = value
        return True


@dataclass
class Task:
    """A task as its only writer knows it."""

    id: int
    owner: str
    title: str
    description: Register
    completed: Register
    updated_at: str
    version: int
    deleted: Fate = Fate.REFUSED
    """What became of the latest attempt to delete it."""

    def contradiction(self, shown: dict[str, Any]) -> str | None:
        """Say what in a task that was shown cannot be, or None."""
        if (shown["id"], shown["user_id"], shown["title"]) != (self.id, self.owner, self.title):
            return f"task {self.id} was shown as another one"
        if self.deleted is Fate.DONE:
            return f"task {self.id} was shown after it had been deleted"
        before, now = ((self.updated_at, self.version), (shown["updated_at"], shown["version"]))
        if now[0] < before[0] or now[1] < before[1]:
            return f"task {self.id}: updated_at and version went back from {before} to {now}"
        if (now[0] == before[0]) != (now[1] == before[1]):
            return f"task {self.id}: of updated_at and version one alone changed, {before} to {now}"
        self.updated_at, self.version = now
        for name, register in (("description", self.description), ("completed", self.completed)):
            if not register.explains(shown[name]):
                return f"task {self.id}: {name} is {shown[name]!r}, not {register.known!r}"
        return None


@dataclass
class Ledger:
    """Everything that was done, and everything that was not as promised."""

    titles: dict[str, Fate] = field(default_factory=dict)
    """Of each attempt to create a task."""
    tasks: dict[str, Task] = field(default_factory=dict)
    """Those whose creation was acknowledged, by title."""
    fates: Counter[Fate] = field(default_factory=Counter)
    violations: dict[str, list[str]] = field(default_factory=dict)
    calm: bool = False
    """Whether nothing is being broken."""
    failed_in_calm: int = 0
    done_in_calm: int = 0
    slowest: float = 0.0

    def violated(self, promise: str, what: str) -> None:
        """Note that a promise was broken."""
        self.violations.setdefault(promise, []).append(what)

    def count(self, fate: Fate) -> None:
        """Note the end of an operation."""
        self.fates[fate] += 1
        if self.calm and fate in {Fate.DONE, Fate.REFUSED}:
            self.done_in_calm += 1
        elif self.calm:
            self.failed_in_calm += 1
