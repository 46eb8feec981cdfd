"""The answers that the clients got, to compare with the stored tasks.

Each task has one writer, and the writer waits for each answer before the next request. So only
writes with an unknown outcome can overlap. After a 500, a 503 or no answer, PostgreSQL may have
stored the write, or may store it later. So its values stay possible until a client sees them, or
until the task has left the version that the write demands.

A write with an idempotency key is repeated until it has an answer. Then its outcome is known: its
first request can no longer be stored beside the repeat.
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


NEVER_STORED = {Fate.REFUSED, Fate.NOT_SENT}


@dataclass(eq=False)
class Write:
    """What a request writes to a task."""

    values: dict[str, object] | None
    """The new values of some fields, or None for a deletion."""
    version: int | None = None
    """The version that the task must have, if the request names one."""

    def explains(self, name: str, value: object) -> bool:
        """Return whether it sets this field to this value."""
        return self.values is not None and name in self.values and self.values[name] == value


READ = Write({})
"""Writes nothing."""


@dataclass(eq=False)
class Task:
    """A task, as its only writer knows it."""

    id: int
    owner: str
    title: str
    values: dict[str, object]
    """The fields that change, as they were last seen."""
    updated_at: str
    version: int
    is_deleted: bool = False
    former_versions: list[int] = field(default_factory=list)
    unknown: list[Write] = field(default_factory=list)
    """Writes with an unknown outcome that may be stored, now or later."""

    @property
    def is_certain(self) -> bool:
        """Whether the task has exactly the state that was last seen."""
        return not self.unknown

    @property
    def may_be_deleted(self) -> bool:
        """Whether the task is deleted, or a deletion has an unknown outcome."""
        return self.is_deleted or any(write.values is None for write in self.unknown)

    def contradiction(self, shown: dict[str, Any], write: Write = READ) -> str | None:
        """Return what in a shown task is impossible, or None.

        Args:
            shown: the task in an answer, or in the database.
            write: the write that the answer acknowledges.
        """
        if (shown["id"], shown["user_id"], shown["title"]) != (self.id, self.owner, self.title):
            return f"task {self.id} has another id, owner or title"
        if self.is_deleted:
            return f"task {self.id} is visible after its deletion"
        before, now = ((self.updated_at, self.version), (shown["updated_at"], shown["version"]))
        if now[0] < before[0] or now[1] < before[1]:
            return f"task {self.id}: updated_at and version went back from {before} to {now}"
        if (now[0] == before[0]) != (now[1] == before[1]):
            return f"task {self.id}: only one of updated_at and version changed, {before} to {now}"
        wrong = self._wrong_field(shown, write)
        self._see(shown)
        return wrong

    def _wrong_field(self, shown: dict[str, Any], write: Write) -> str | None:
        """Return which field has an impossible value, and forget the writes that explain one."""
        overtaken = shown["version"] != self.version and write.version is None
        possible = self.unknown if overtaken else []
        written = write.values or {}
        for name in self.values:
            value = shown[name]
            if name in written:
                is_right = value == written[name]
            else:
                is_right = value == self.values[name] or self._is_explained(name, value, possible)
            if not is_right:
                expected = written.get(name, self.values[name])
                return f"task {self.id}: {name} is {value!r}, not {expected!r}"
        return None

    def _is_explained(self, name: str, value: object, possible: list[Write]) -> bool:
        """Return whether one of these writes may have set the field to this value."""
        found = [write for write in possible if write.explains(name, value)]
        if found and all(write.version is None for write in found):
            self.values |= found[0].values or {}
            self.unknown.remove(found[0])  # a write happens only once
        return bool(found)

    def _see(self, shown: dict[str, Any]) -> None:
        """Take over the state of a shown task."""
        if shown["version"] != self.version:
            self.former_versions.append(self.version)
        self.updated_at, self.version = shown["updated_at"], shown["version"]
        self.values = {name: shown[name] for name in self.values}
        self.unknown = [
            write for write in self.unknown if write.version in {None, shown["version"]}
        ]


@dataclass(frozen=True)
class Text:
    """An attempt to write a description that no other request writes."""

    task_id: int
    fate: Fate


@dataclass
class Ledger:
    """All operations, and all broken promises."""

    titles: dict[str, Fate] = field(default_factory=dict)
    """The outcome of each attempt to create a task, by title."""
    keyed: set[str] = field(default_factory=set)
    """The titles of creations with an idempotency key."""
    texts: dict[str, Text] = field(default_factory=dict)
    """The outcome of each attempt to write a description, by description."""
    batches: list[list[str]] = field(default_factory=list)
    """The titles of the tasks that each batch was to create."""
    tasks: dict[str, Task] = field(default_factory=dict)
    """Tasks whose creation was acknowledged, by title."""
    lists: dict[str, bytes] = field(default_factory=dict)
    """A digest of the list that each tag stands for."""
    fates: Counter[Fate] = field(default_factory=Counter)
    events: Counter[str] = field(default_factory=Counter)
    """How often something happened that a run should contain."""
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
