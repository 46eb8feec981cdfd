"""The tasks of one owner. A request cannot reach any others."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from hashlib import sha256
from time import time
from typing import NamedTuple

import jiter

from todo_api.auth.owner import Owner
from todo_api.auth.tokens import shown_time
from todo_api.database.database import Call, Database, StreamedRows
from todo_api.database.statement import Rows, Statement
from todo_api.errors import (
    AccountErased,
    ApiError,
    IdempotencyKeyReused,
    TaskChanged,
    TaskNotFound,
)
from todo_api.tasks import statements
from todo_api.tasks.changes import ChangesPage, Cursor
from todo_api.tasks.fields import DEFAULTS
from todo_api.tasks.model import EMAIL_LENGTH
from todo_api.tasks.query import Position, direction, read_cursor, status
from todo_api.tasks.schemas import TaskQuery
from todo_api.tasks.search import run_numbers, words
from todo_api.tasks.waiting import Waiters

WRITES_PER_CLEANING = 16
"""Writes in every 16th millisecond also remove expired tombstones."""

MAXIMUM_OWNERS = 100_000


class KnownOwners:
    """Owners who have a row, with the version that this process saw last: a hint, no more.

    With it, creating a task does not call `begin_owner` for a known owner, and a client that has
    the latest version costs one look at `users`. Another process may have written since, so the
    database decides. Keeps at most `MAXIMUM_OWNERS`.
    """

    def __init__(self) -> None:
        self._versions: dict[str, int | None] = {}

    def __contains__(self, owner_id: str) -> bool:
        return owner_id in self._versions

    def add(self, owner_id: str, version: int) -> None:
        """Remember an owner and their latest version. An earlier one that comes later is ignored.

        If there is no room, forget the owner known for longest.
        """
        if owner_id not in self._versions and len(self._versions) >= MAXIMUM_OWNERS:
            del self._versions[next(iter(self._versions))]
        self._versions[owner_id] = max(self._versions.get(owner_id) or 0, version)

    def has(self, owner_id: str, version: int) -> bool:
        """Return whether this is the version that this process saw last."""
        return self._versions.get(owner_id) == version

    def has_written(self, owner_id: str, version: int | None) -> None:
        """Remember the version of a write, or that it is unknown. A write may show none."""
        if version and version > (self._versions.get(owner_id) or 0):
            self.add(owner_id, version)
        elif owner_id in self._versions:
            self._versions[owner_id] = None

    def discard(self, owner_id: str) -> None:
        """Forget an owner, known or not."""
        self._versions.pop(owner_id, None)


class TaskList(NamedTuple):
    """The tasks of a list, the first of them if there are very many, and their version."""

    version: int
    first: Rows
    rest: StreamedRows | None
    total: int | None = None
    """How many tasks match, if the query asks for that."""


Versions = list[int] | None
"""The versions that a task may have for a write, or None if it may have any."""


@dataclass(slots=True)
class Retry:
    """A request with an idempotency key, which may be the repeat of an earlier one."""

    key: str
    request_hash: bytes
    """The SHA-256 of method, path and body."""
    is_replayed: bool = False
    """Whether the answer is the stored one of the first request."""

    def unpack(self, rows: Rows) -> Rows:
        """Return the rows of the first request. Raises `IdempotencyKeyReused`."""
        return [self._unpacked(row) for row in rows]

    def _unpacked(self, row: bytes) -> bytes:
        if not row.startswith(b"["):
            return row
        request_hash, body = jiter.from_json(row)
        if request_hash != self.request_hash.hex():
            raise IdempotencyKeyReused
        self.is_replayed = True
        answer: bytes = body.encode()
        return answer


class Condition(NamedTuple):
    """The conditions of a write: the version that a task must have, and at most one success."""

    if_match: Versions = None
    retry: Retry | None = None

    @property
    def terms(self) -> statements.Terms:
        """The terms of the statement."""
        return statements.Terms(self.if_match is not None, self.retry is not None)


ALWAYS = Condition()


class Operation(NamedTuple):
    """One write of a batch. Without a task it creates one, and without values it deletes it."""

    task_id: int | None
    values: Mapping[str, object] | None
    if_match: Versions = None


def version_of(task: bytes) -> int:
    """Return the version of a task from its JSON text, in which it is the last member."""
    return int(task[task.rindex(b":") + 1 : -1])


class OwnedTasks:
    """An owner's tasks. Each operation is one statement, and a task is its JSON text.

    Operations on one task raise `TaskNotFound` where this owner has none of that id, and
    `TaskChanged` where it has another version than the caller asks for.
    """

    def __init__(
        self,
        owner: Owner,
        database: Database,
        known_owners: KnownOwners,
        issuer_ahead: Callable[[], float],
        waiters: Waiters,
    ) -> None:
        self.owner = owner
        self._database = database
        self._known_owners = known_owners
        self._issuer_ahead = issuer_ahead
        self.waiters = waiters

    async def list(self, query: TaskQuery, known: int | None = None) -> TaskList:
        """Return the version of the list and its tasks. A `known` version has no tasks."""
        after = read_cursor(query, self.owner.id)
        is_latest = known is not None and self._known_owners.has(self.owner.id, known)
        if is_latest:
            version, _ = await self._versions()
            if version == known:
                return TaskList(version, [], None)
        found = await self._find(query, after, known, continues=is_latest)
        if found.version:
            self._known_owners.add(self.owner.id, found.version)
        return found

    async def _versions(self) -> tuple[int, int]:
        """Return the owner's version and `changes_from`, which costs less than anything else."""
        rows = await self._database.run(self.owner.id, statements.get_versions(), {})
        version, changes_from = jiter.from_json(rows[0])
        return version, changes_from

    async def _find(
        self, query: TaskQuery, after: Position | None, known: int | None, *, continues: bool
    ) -> TaskList:
        values: dict[str, object] = {"known_version": known}
        order = direction(query)
        if query.is_plain:
            statement = statements.list_tasks(status(query), query.sort, order)
        else:
            statement = statements.find_tasks(query.sort, order)
            after = after or statements.first_position(query.sort, order)
            values |= _filters(query) | {f"after_{n}": value for n, value in enumerate(after, 1)}
        rest = None
        if query.limit is None:
            rows, rest = await self._database.stream(
                self.owner.id, statement, values, continues=continues
            )
        else:
            page = replace(statement, streamed=False, planned_once=True)
            rows = await self._database.run(self.owner.id, page, values, continues=continues)
        version, *tasks = rows
        total = int(tasks.pop(0)) if query.count and tasks else None
        return TaskList(int(version), tasks, rest, total)

    async def changes(self, since: Cursor, limit: int, *, again: bool = False) -> ChangesPage:
        """Return what has changed since a cursor. Raises `CursorExpired`.

        With `again`, the request has asked before.
        """
        is_latest = not again and self._known_owners.has(self.owner.id, since.position)
        if is_latest:
            version, changes_from = await self._versions()
            since.check(version, changes_from)
            if version == since.position:
                return ChangesPage([], Cursor(version, version), has_more=False)
        values = {"since": since.position, "limit": limit + 1}
        head, *rows = await self._database.run(
            self.owner.id, statements.find_changes(), values, continues=again or is_latest
        )
        version, changes_from = jiter.from_json(head)
        since.check(version, changes_from)
        if version:
            self._known_owners.add(self.owner.id, version)
        has_more = len(rows) > limit
        shown = rows[:limit]
        if not has_more:
            return ChangesPage(shown, Cursor(version, version), has_more)
        begun = since.begun if since.position else version
        return ChangesPage(shown, Cursor(version_of(shown[-1]), begun), has_more)

    async def get(self, task_id: int) -> bytes:
        """Return one task."""
        rows = await self._database.run(self.owner.id, statements.get_task(), {"task_id": task_id})
        if not rows:
            raise TaskNotFound
        return rows[0]

    async def add(self, values: Mapping[str, object], retry: Retry | None = None) -> bytes:
        """Store a new task and return it. The first task also stores its owner."""
        new = statements.bind_new({**DEFAULTS, **values})
        condition = Condition(retry=retry)
        rows: Rows = []
        is_known = retry is not None or self.owner.id in self._known_owners
        if is_known:
            known = statements.add_task(condition.terms)
            rows = await self._explained(self._write(known, new, condition))
        if not rows:  # the owner is new or was just erased, or the token is void
            first = statements.add_first_task()
            write = self._write(first, new, condition, continues=is_known)
            rows = await self._explained(write)
        return rows[0]

    async def change(
        self, task_id: int, values: Mapping[str, object], condition: Condition = ALWAYS
    ) -> bytes:
        """Set the given columns and return the task."""
        statement = statements.change_task(frozenset(values), condition.terms)
        return await self._write_to(task_id, statement, statements.bind_any(values), condition)

    async def complete(
        self, task_id: int, *, completed: bool, condition: Condition = ALWAYS
    ) -> bytes:
        """Set the task complete or incomplete, and return it."""
        status = "complete" if completed else "incomplete"
        return await self.change(task_id, {"status": status}, condition)

    async def toggle(self, task_id: int, condition: Condition = ALWAYS) -> bytes:
        """Complete an incomplete task or reopen a complete one, and return it."""
        return await self._write_to(task_id, statements.toggle_task(condition.terms), {}, condition)

    async def remove(self, task_id: int, condition: Condition = ALWAYS) -> None:
        """Delete the task."""
        await self._write_to(task_id, statements.remove_task(condition.terms), {}, condition)

    async def run_batch(self, operations: Sequence[Operation], retry: Retry | None = None) -> Rows:
        """Carry out all operations in order, or none. Return each task, or a deleted task's id.

        The error of an operation has its number.
        """
        terms = statements.Terms(keyed=retry is not None, batched=True)
        now = int(time() * 1000)
        common = self._common(now, retry) | {"more_operations": len(operations) - 1}
        first = [statements.begin_owner(), *_CLEANING]
        if retry:
            first += [statements.forget_answer(), statements.check_key()]
        first += [statements.take_versions(terms), *([statements.claim_key()] if retry else [])]
        calls = [
            self._call(operation, terms, {**common, **_place(number, len(operations))})
            for number, operation in enumerate(operations)
        ]
        write = self._database.run_batch(self.owner.id, [(each, common) for each in first], calls)
        try:
            rows = await self._explained(write)
        except TaskNotFound as error:
            raise await self._why_refused(operations, error.operation or 0) from error
        return self._written(retry.unpack(rows) if retry else rows)

    @staticmethod
    def _call(operation: Operation, terms: statements.Terms, given: dict[str, object]) -> Call:
        """Return the statement of an operation, with its values."""
        terms = replace(terms, if_match=operation.if_match is not None)
        given |= {"task_id": operation.task_id, "if_match": operation.if_match}
        if operation.values is None:
            return statements.remove_task(terms), given
        if operation.task_id is None:
            new = statements.bind_new({**DEFAULTS, **operation.values})
            return statements.add_task(terms), given | new
        return statements.change_any(terms), given | statements.bind_any(operation.values)

    async def _why_refused(self, operations: Sequence[Operation], number: int) -> ApiError:
        """Return why a batch wrote nothing: its key is in use, or the reason of one operation.

        The failure has rolled back the count of the request, so the question counts it.
        """
        task_id, _, if_match = operations[max(number, 0)]
        reason = await self._why_not_written(task_id or 0, if_match, continues=False)
        if number < 0:
            return IdempotencyKeyReused()
        if task_id in {each.task_id for each in operations[:number] if each.values is None}:
            reason = TaskNotFound()
        reason.operation = number
        return reason

    async def erase_owner(self) -> None:
        """Delete the owner and all their tasks. A repeat with the same token does nothing.

        Tokens that were issued before can no longer write. The issuer's clock may be ahead of
        ours, and tokens have its time. So only a token from after now, plus the most that the clock
        can be ahead, can write again. The token that erases cannot, nor any other of its second.
        """
        self._known_owners.discard(self.owner.id)
        ahead = self._issuer_ahead()
        values = {
            "owner_hash": self._hash(),
            "issuer_ahead": ahead,
            "tokens_from": max(time() + ahead, (self.owner.issued_at or 0) + 1),
        }
        with suppress(AccountErased):
            await self._explained(self._write(statements.erase_owner(), values))

    async def _write_to(
        self,
        task_id: int,
        statement: Statement,
        values: Mapping[str, object],
        condition: Condition,
    ) -> bytes:
        """Write to a task and return it. A write that finds nothing asks for the reason."""
        write = self._write(statement, {"task_id": task_id, **values}, condition)
        rows = await self._explained(write)
        if not rows:
            raise await self._why_not_written(task_id, condition.if_match)
        return rows[0]

    async def _explained(self, write: Awaitable[Rows]) -> Rows:
        """Await a write. A refusal of its token says which tokens can write.

        The refusal has rolled back the count of the request, so the question counts it.
        """
        try:
            return await write
        except AccountErased as error:
            reason = await self._why_not_written(continues=False)
            raise (reason if isinstance(reason, AccountErased) else error) from None

    async def _why_not_written(
        self, task_id: int = 0, if_match: Versions = None, *, continues: bool = True
    ) -> ApiError:
        """Return the reason: a void token, another version of the task, or no task.

        This takes a statement of its own, because the write saw the rows as they were before it
        waited for another write.
        """
        issued_at = self.owner.issued_at
        given = {"owner_hash": self._hash(), "issued_at": issued_at, "task_id": task_id}
        reason = statements.why_not_written()
        rows = await self._database.run(self.owner.id, reason, given, continues=continues)
        for found in map(jiter.from_json, rows):
            if isinstance(found, str):
                received = "none" if issued_at is None else shown_time(issued_at)
                return AccountErased(
                    f"iat: expected at least {found}, because the account was erased, "
                    f"received {received}"
                )
            if if_match is not None:
                return TaskChanged(found)
        return TaskNotFound()

    async def _write(
        self,
        statement: Statement,
        values: Mapping[str, object],
        condition: Condition = ALWAYS,
        *,
        continues: bool = False,
    ) -> Rows:
        now = int(time() * 1000)
        retry = condition.retry
        given = {**self._common(now, retry), "if_match": condition.if_match, **values}
        if cleaning := _cleaning(now):
            statement = statement.after(*statement.first, *cleaning)
        rows = await self._database.run(self.owner.id, statement, given, continues=continues)
        return self._written(retry.unpack(rows) if retry else rows)

    def _written(self, rows: Rows) -> Rows:
        """Wake the waiting requests, and remember the version of the last row, if it is a task."""
        is_task = rows and rows[-1].startswith(b"{")
        self._known_owners.has_written(self.owner.id, version_of(rows[-1]) if is_task else None)
        self.waiters.wake(self.owner.id)
        return rows

    def _common(self, now: int, retry: Retry | None) -> dict[str, object]:
        """Return the values of every write."""
        return {
            "now": now,
            "issued_at": self.owner.issued_at,
            "email": _storable_email(self.owner.email),
            "idempotency_key": retry and retry.key,
            "request_hash": retry and retry.request_hash,
        }

    def _hash(self) -> bytes:
        """Return the SHA-256 of the owner's id. Only this remains of them after an erasure."""
        return sha256(self.owner.id.encode()).digest()


_CLEANING = (statements.forget_tombstones(), statements.forget_answers())


def _cleaning(now: int) -> tuple[Statement, ...]:
    """Return the statements that a write at this millisecond runs to remove what has expired."""
    return () if now % WRITES_PER_CLEANING else _CLEANING


def _filters(query: TaskQuery) -> dict[str, object]:
    """Return the values of `find_tasks`, except for the position."""
    wanted = words(query.q or "")
    runs = [run_numbers(word) for word in wanted]
    return {
        "status": status(query),
        "priority": query.priority,
        "due_from": query.due_from,
        "due_before": query.due_before,
        "without_due_date": query.due == "none",
        "words": wanted,
        **{name: [each[n] for each in runs] for n, name in enumerate(statements.RUNS)},
        "count": query.count,
        "limit": query.limit and query.limit + 1,
    }


def _place(number: int, count: int) -> dict[str, object]:
    """Return the values that place an operation in its batch."""
    return {"operation": number + 1, "later_operations": count - 1 - number}


def _storable_email(email: str | None) -> str | None:
    """Return the address, or None if it cannot be stored. It is only for display."""
    if email is None or "\0" in email or not 1 <= len(email) <= EMAIL_LENGTH:
        return None
    return email
