"""The collection of one owner's tasks: all that a request can reach."""

from collections.abc import Mapping
from contextlib import suppress

from todo_api.auth.owner import Owner
from todo_api.database.database import Database, Rest
from todo_api.database.statement import Rows, Statement
from todo_api.errors import AccountErased, TaskNotFound
from todo_api.tasks import statements
from todo_api.tasks.model import EMAIL_LENGTH
from todo_api.tasks.schemas import TaskQuery

_STATUSES: Mapping[str, statements.Status | None] = {
    "all": None,
    "incomplete": "incomplete",
    "pending": "incomplete",
    "complete": "complete",
    "completed": "complete",
}
_ABSENT: Mapping[str, object] = {
    "description": None,
    "status": "incomplete",
    "priority": None,
    "due_date": None,
}


class OwnedTasks:
    """An owner's tasks. Each operation is one statement; a task is its JSON text.

    Operations on one task raise `TaskNotFound` where this owner has none of that id.
    """

    def __init__(self, owner: Owner, database: Database) -> None:
        self.owner = owner
        self._database = database

    async def list(self, query: TaskQuery) -> tuple[Rows, Rest | None]:
        """Return the tasks, or the first of very many and the rest."""
        statement = statements.list_tasks(_STATUSES[query.status], query.sort, query.order)
        return await self._database.read(self.owner.id, statement)

    async def get(self, task_id: int) -> bytes:
        """Return one task."""
        return await self._run_on(task_id, statements.get_task(), {})

    async def add(self, values: Mapping[str, object]) -> bytes:
        """Store a new task, and with the first one its owner; return the task."""
        new = statements.bind_new({**_ABSENT, **values}.items())
        email = _storable_email(self.owner.email)
        (task,) = await self._run(statements.add_task(), {"email": email, **new})
        return task

    async def change(self, task_id: int, values: Mapping[str, object]) -> bytes:
        """Set the given columns and return the task."""
        statement = statements.change_task(frozenset(values))
        return await self._run_on(task_id, statement, statements.bind_new(values.items()))

    async def complete(self, task_id: int, *, completed: bool) -> bytes:
        """Set the task complete or incomplete, and return it."""
        return await self.change(task_id, {"status": "complete" if completed else "incomplete"})

    async def toggle(self, task_id: int) -> bytes:
        """Turn complete into incomplete and the other way round, and return the task."""
        return await self._run_on(task_id, statements.toggle_task(), {})

    async def remove(self, task_id: int) -> None:
        """Delete the task."""
        await self._run_on(task_id, statements.remove_task(), {})

    async def erase_owner(self) -> None:
        """Delete the owner and all his tasks. Again, with the same token: nothing happens."""
        with suppress(AccountErased):
            await self._run(statements.erase_owner(), {})

    async def _run_on(
        self, task_id: int, statement: Statement, values: Mapping[str, object]
    ) -> bytes:
        rows = await self._run(statement, {"task_id": task_id, **values})
        if not rows:
            raise TaskNotFound
        return rows[0]

    async def _run(self, statement: Statement, values: Mapping[str, object]) -> Rows:
        return await self._database.run(self.owner.id, statement, values, self.owner.issued_at)


def _storable_email(email: str | None) -> str | None:
    """Return the address, or None where it cannot be stored: it is for display alone."""
    if email is None or "\0" in email or not 1 <= len(email) <= EMAIL_LENGTH:
        return None
    return email
