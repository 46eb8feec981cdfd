"""`todo-api export` and `todo-api import`: one user's tasks, out of the database and into it.

Both run as the user under row security, like the user's requests. An import checks each task as a
request that creates it would, and makes it in the same way: the service sets the id, the times and
the version. So an import shows in lists, tags and the feed of changes.

An import makes each task once, however often it is repeated. A task of an export is known by its
user, its id and the time of its creation; any other task by all that its line says. The hash of
this is stored with the task (`Task.source`). An import never changes a task.
"""

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from itertools import islice
from typing import Any, BinaryIO, NamedTuple

from todo_api.auth.owner import Owner
from todo_api.database.long_transaction import OwnersTransaction
from todo_api.errors import ApiError, InvalidJson, StartupError
from todo_api.settings import Settings
from todo_api.tasks import files, statements
from todo_api.tasks.fields import DEFAULTS, MAXIMUM_ID
from todo_api.tasks.files import Format
from todo_api.tasks.schemas import NOT_STORABLE, NewTask, read

TASKS_PER_ROUND_TRIP = 200

_DIGITS = re.compile(r"\d{1,19}", re.ASCII)

Advance = Callable[[int], None]
"""Called with the number of tasks that were done since the last call."""


class Source(NamedTuple):
    """A file of tasks."""

    file: BinaryIO
    """It can be read again from its beginning."""
    form: Format
    user: str | None = None
    """The user whose tasks it has, if that is not the one who gets them."""


class Imported(NamedTuple):
    """How many tasks an import made, and how many of the file were there already."""

    made: int
    known: int


class Transfer:
    """Moves the tasks of one owner between the database and files."""

    def __init__(self, owner: Owner, url: str, settings: Settings) -> None:
        self._owner = owner
        self._url = url
        self._settings = settings

    def export_tasks(self, file: BinaryIO, form: Format, advance: Advance) -> int:
        """Write all tasks as they are at one moment, the oldest first. Return their number.

        Raises `StartupError`, or the `OSError` of the file.
        """
        number = 0
        with self._begin("nothing was exported", read_only=True) as transaction:
            listing = statements.list_tasks(None, "created", "asc")
            rows = transaction.stream(listing, {"known_version": None})
            next(rows)  # the version of the list
            for number, _ in enumerate(files.write(rows, file, form), 1):  # noqa: B007  the last number
                advance(1)
        return number

    def check_tasks(self, source: Source, advance: Advance) -> int:
        """Return the number of tasks of a file. Raises `StartupError` with the line of an error.

        The import reads the file twice, because the user's other writes wait while it writes.
        """
        count = 0
        for count, _ in enumerate(self._new_tasks(source), 1):  # noqa: B007  the last number
            advance(1)
        return count

    def import_tasks(self, source: Source, count: int, advance: Advance) -> Imported:
        """Make the `count` tasks of a file that `check_tasks` has read, all of them or none.

        Raises `StartupError`.
        """
        if count == 0:
            return Imported(0, 0)
        with self._begin("nothing was imported") as transaction:
            made = self._make(transaction, self._new_tasks(source), count, advance)
        return Imported(made, count - made)

    def _begin(
        self, outcome: str, *, read_only: bool = False
    ) -> AbstractContextManager[OwnersTransaction]:
        return OwnersTransaction.begin(
            self._url, self._settings, self._owner.id, outcome, read_only=read_only
        )

    def _make(
        self,
        transaction: OwnersTransaction,
        tasks: Iterator[dict[str, object]],
        count: int,
        advance: Advance,
    ) -> int:
        """Make those of the `count` tasks that are new, and return their number."""
        common = {
            "now": int(time.time() * 1000),
            "issued_at": self._owner.issued_at,
            "email": self._owner.email,
            "more_operations": count - 1,
        }
        transaction.run(statements.begin_owner(), common)
        transaction.run(statements.take_versions(statements.Terms(batched=True)), common)
        made, later = 0, count
        while some := list(islice(tasks, TASKS_PER_ROUND_TRIP)):
            for task in some:
                later -= 1
                task["later_operations"] = later
            made += transaction.run_many(statements.import_task(), some)
            advance(len(some))
        if later != 0:
            raise StartupError("FILE: changed while it was read; nothing was imported")
        return made

    def _new_tasks(self, source: Source) -> Iterator[dict[str, object]]:
        """Yield the values of each task for `import_task`. Raises `StartupError`."""
        theirs = source.user or self._owner.id
        for number, members in files.read(source.file, source.form):
            if members.get("user_id") not in (theirs, None):
                raise files.refusal(number, "is a task of another user; name them with --from")
            try:
                values = read(NewTask, members).values()
            except InvalidJson:
                raise files.refusal(number, f"has {NOT_STORABLE}") from None
            except ApiError as error:
                raise files.refusal(number, error.message) from None
            new = statements.bind_new({**DEFAULTS, **values})
            yield {**new, **self._identity(members)}

    def _identity(self, members: dict[str, Any]) -> dict[str, object]:
        """Return what tells whether a task was imported, or is there already."""
        user, task_id = members.get("user_id"), _task_id(members.get("id"))
        created_at = _moment(members.get("created_at"))
        if not user or task_id is None or created_at is None:
            return {"source": _hash(members), "exported_id": None, "exported_at": None}
        is_own = user == self._owner.id
        return {
            "source": _hash([user, task_id, created_at.isoformat()]),
            "exported_id": task_id if is_own else None,
            "exported_at": created_at if is_own else None,
        }


def _hash(value: object) -> bytes:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).digest()


def _task_id(value: object) -> int | None:
    """Return the id of an exported task. The cells of CSV are text."""
    if isinstance(value, str) and _DIGITS.fullmatch(value):
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAXIMUM_ID:
        return value
    return None


def _moment(value: object) -> datetime | None:
    """Return the time of an exported task, in UTC."""
    try:
        moment = datetime.fromisoformat(value) if isinstance(value, str) else None
        return moment.astimezone(UTC) if moment and moment.tzinfo else None
    except (ValueError, OverflowError):
        return None
