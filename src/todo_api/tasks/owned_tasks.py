"""The collection of one owner's tasks: all that a request can reach."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from hashlib import sha256
from time import time

from todo_api.auth.owner import Owner
from todo_api.auth.tokens import shown_time
from todo_api.database.database import Database, StreamedRows
from todo_api.database.statement import Rows, Statement
from todo_api.errors import AccountErased, TaskNotFound
from todo_api.tasks import statements
from todo_api.tasks.fields import DEFAULTS
from todo_api.tasks.model import EMAIL_LENGTH
from todo_api.tasks.schemas import TaskQuery

WRITES_PER_CLEANING = 16
"""Each write falls into a millisecond; one in so many of these removes expired tombstones."""

_STATUSES: Mapping[str, statements.Status | None] = {
    "all": None,
    "incomplete": "incomplete",
    "pending": "incomplete",
    "complete": "complete",
    "completed": "complete",
}
MAXIMUM_OWNERS = 100_000


class KnownOwners:
    """Owners who had a row when this process last wrote for them, at most `MAXIMUM_OWNERS`.

    Only a hint: it spares the creation of a task the look whether its owner is new.
    """

    def __init__(self) -> None:
        self._ids: dict[str, None] = {}

    def __contains__(self, owner_id: str) -> bool:
        return owner_id in self._ids

    def add(self, owner_id: str) -> None:
        """Remember an owner, in the place of the one known for longest if there is no room."""
        if owner_id not in self._ids and len(self._ids) >= MAXIMUM_OWNERS:
            del self._ids[next(iter(self._ids))]
        self._ids[owner_id] = None

    def discard(self, owner_id: str) -> None:
        """Forget an owner, if they are known."""
        self._ids.pop(owner_id, None)


class OwnedTasks:
    """An owner's tasks. Each operation is one statement; a task is its JSON text.

    Operations on one task raise `TaskNotFound` where this owner has none of that id.
    """

    def __init__(
        self,
        owner: Owner,
        database: Database,
        known_owners: KnownOwners,
        issuer_ahead: Callable[[], float],
    ) -> None:
        self.owner = owner
        self._database = database
        self._known_owners = known_owners
        self._issuer_ahead = issuer_ahead

    async def list(self, query: TaskQuery) -> tuple[Rows, StreamedRows | None]:
        """Return the tasks, or the first of very many and the rest."""
        statement = statements.list_tasks(_STATUSES[query.status], query.sort, query.order)
        return await self._database.stream(self.owner.id, statement)

    async def get(self, task_id: int) -> bytes:
        """Return one task."""
        rows = await self._database.run(self.owner.id, statements.get_task(), {"task_id": task_id})
        if not rows:
            raise TaskNotFound
        return rows[0]

    async def add(self, values: Mapping[str, object]) -> bytes:
        """Store a new task, and with the first one its owner; return the task."""
        new = statements.bind_new({**DEFAULTS, **values}.items())
        rows: Rows = []
        is_known = self.owner.id in self._known_owners
        if is_known:
            rows = await self._write(statements.add_task(), new)
        if not rows:  # a new owner, one who was erased meanwhile, or a void token
            try:
                rows = await self._write(statements.add_first_task(), new, continues=is_known)
            except AccountErased as error:
                raise await self._void_token() or error from None
            self._known_owners.add(self.owner.id)
        return rows[0]

    async def change(self, task_id: int, values: Mapping[str, object]) -> bytes:
        """Set the given columns and return the task."""
        statement = statements.change_task(frozenset(values))
        return await self._write_to(task_id, statement, statements.bind_new(values.items()))

    async def complete(self, task_id: int, *, completed: bool) -> bytes:
        """Set the task complete or incomplete, and return it."""
        return await self.change(task_id, {"status": "complete" if completed else "incomplete"})

    async def toggle(self, task_id: int) -> bytes:
        """Turn complete into incomplete and the other way round, and return the task."""
        return await self._write_to(task_id, statements.toggle_task(), {})

    async def remove(self, task_id: int) -> None:
        """Delete the task."""
        await self._write_to(task_id, statements.remove_task(), {})

    async def erase_owner(self) -> None:
        """Delete the owner and all their tasks. Again, with the same token: nothing happens.

        Tokens that were issued before can no longer write. Their time of issue is by the issuer's
        clock, so the least good time of issue is later than now by what that clock can be ahead.
        The token that erases is void too. Another token of its second may be as old.
        """
        self._known_owners.discard(self.owner.id)
        ahead = self._issuer_ahead()
        values = {
            "owner_hash": self._hash(),
            "issuer_ahead": ahead,
            "tokens_from": max(time() + ahead, (self.owner.issued_at or 0) + 1),
        }
        with suppress(AccountErased):
            await self._write(statements.erase_owner(), values)

    async def _write_to(
        self, task_id: int, statement: Statement, values: Mapping[str, object]
    ) -> bytes:
        """Write to a task and return it. Only a write that finds nothing asks once more, why."""
        rows = await self._write(statement, {"task_id": task_id, **values})
        if rows:
            return rows[0]
        raise await self._void_token() or TaskNotFound

    async def _void_token(self) -> AccountErased | None:
        """Return the refusal of a token from before the owner's erasure, if it is one."""
        issued_at = self.owner.issued_at
        token = {"owner_hash": self._hash(), "issued_at": issued_at}
        void_token = statements.void_token()
        rows = await self._database.run(self.owner.id, void_token, token, continues=True)
        if not rows:
            return None
        received = "none" if issued_at is None else shown_time(issued_at)
        return AccountErased(
            f"iat: expected at least {rows[0].decode()}, because the account was erased, "
            f"received {received}"
        )

    async def _write(
        self, statement: Statement, values: Mapping[str, object], *, continues: bool = False
    ) -> Rows:
        now = int(time() * 1000)
        if now % WRITES_PER_CLEANING == 0:
            statement = statement.after(*statement.first, statements.forget_tombstones())
        given = {
            "now": now,
            "issued_at": self.owner.issued_at,
            "email": _storable_email(self.owner.email),
            **values,
        }
        return await self._database.run(self.owner.id, statement, given, continues=continues)

    def _hash(self) -> bytes:
        """Return what remains of the owner after an erasure."""
        return sha256(self.owner.id.encode()).digest()


def _storable_email(email: str | None) -> str | None:
    """Return the address, or None where it cannot be stored: it is for display alone."""
    if email is None or "\0" in email or not 1 <= len(email) <= EMAIL_LENGTH:
        return None
    return email
