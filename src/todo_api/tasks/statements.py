"""Every statement there is, built from the model, each compiled once.

Each is atomic by itself, names the owner (`owner`, one value), and answers with rows of one
column: a task as JSON text, made by PostgreSQL, which the service passes on as it came.
"""

from collections.abc import Iterable
from functools import cache
from typing import Any, Literal

from sqlalchemy import (
    CTE,
    BigInteger,
    ColumnElement,
    DateTime,
    Text,
    bindparam,
    literal_column,
    or_,
)
from sqlalchemy.dialects.postgresql import insert
from sqlmodel import case, col, delete, func, select, update

from todo_api.database.statement import Statement
from todo_api.tasks.model import WRITABLE, Erasure, Task, User

Status = Literal["incomplete", "complete"]
Sort = Literal["created", "updated", "title", "due_date", "priority"]
Order = Literal["asc", "desc"]

_OWNER = bindparam("owner", type_=Text())
_TASK_ID = bindparam("task_id", type_=BigInteger())
_NEW: dict[str, Any] = {
    name: bindparam(f"new_{name}", type_=DateTime(timezone=True) if name == "due_date" else Text())
    for name in WRITABLE
}
_ITS_OWN = col(Task.user_id) == _OWNER
_COMPLETE: ColumnElement[str] = literal_column("'complete'")
_INCOMPLETE: ColumnElement[str] = literal_column("'incomplete'")

# Strictly later than the version it replaces, whatever the clock does. now() would be the
# transaction's start, which may lie before the write that this one overwrites.
_NEXT_UPDATE = func.greatest(
    func.clock_timestamp(), col(Task.updated_at) + literal_column("interval '1 microsecond'")
)


def _utc(timestamp: Any) -> Any:
    """Show a timestamp as `2026-11-21T12:34:56.123456Z`."""
    form: ColumnElement[str] = literal_column("""'YYYY-MM-DD"T"HH24:MI:SS.US"Z"'""")
    return func.to_char(func.timezone(literal_column("'UTC'"), timestamp), form).label(
        timestamp.key
    )


_SHOWN: tuple[Any, ...] = (
    col(Task.id),
    col(Task.user_id),
    col(Task.title),
    col(Task.description),
    col(Task.status),
    (col(Task.status) == _COMPLETE).label("completed"),
    col(Task.priority),
    _utc(col(Task.due_date)),
    _utc(col(Task.created_at)),
    _utc(col(Task.updated_at)),
)
"""The columns of an answer, in the order of the contract."""

_SORT_KEYS: dict[Sort, tuple[Any, Order]] = {
    "created": (col(Task.created_at), "desc"),
    "updated": (col(Task.updated_at), "desc"),
    "title": (func.lower(col(Task.title)), "asc"),
    "due_date": (col(Task.due_date), "asc"),
    "priority": (
        func.array_position(literal_column("ARRAY['low', 'medium', 'high']"), col(Task.priority)),
        "desc",
    ),
}
"""What each sort compares, and its direction where none is asked for."""

_MAY_BE_NULL = {"due_date", "priority"}


def _as_json(rows: Any) -> Any:
    """Select each row of a subquery or CTE as JSON text."""
    return select(func.row_to_json(rows.table_valued()))


@cache
def list_tasks(status: Status | None, sort: Sort, order: Order | None) -> Statement:
    """All the owner's tasks, of one status or of any. Ties go by id, in the same direction."""
    key, default = _SORT_KEYS[sort]
    direction = order or default
    by_key, by_id = (getattr(each, direction)() for each in (key, col(Task.id)))
    if sort in _MAY_BE_NULL:
        by_key = by_key.nulls_last()
    tasks = select(*_SHOWN).where(_ITS_OWN).order_by(by_key, by_id)
    if status:
        tasks = tasks.where(col(Task.status) == literal_column(f"'{status}'"))
    name = f"list_{status or 'all'}_by_{sort}_{direction}"
    return Statement.compiled(name, _as_json(tasks.subquery("task")), many=True)


@cache
def get_task() -> Statement:
    """One task."""
    task = select(*_SHOWN).where(_ITS_OWN, col(Task.id) == _TASK_ID).subquery("task")
    return Statement.compiled("get_task", _as_json(task))


@cache
def add_task() -> Statement:
    """A new task, and with the first one its owner."""
    user = insert(User).values(id=_OWNER, email=bindparam("email", type_=Text()))
    task = insert(Task).values(user_id=_OWNER, **_NEW).returning(*_SHOWN).cte("task")
    added = _as_json(task).add_cte(user.on_conflict_do_nothing().cte("owner"))
    return Statement.compiled("add_task", added, writes=True)


@cache
def change_task(fields: frozenset[str]) -> Statement:
    """Set these fields and keep the others. Where nothing differs, `updated_at` stays."""
    names = [name for name in WRITABLE if name in fields]
    differs = or_(*(_column(name).is_distinct_from(_NEW[name]) for name in names))
    values = {name: _NEW[name] for name in names}
    values["updated_at"] = case((differs, _NEXT_UPDATE), else_=col(Task.updated_at))
    return Statement.compiled("change_" + "_".join(names), _as_json(_update(values)), writes=True)


@cache
def toggle_task() -> Statement:
    """Complete an incomplete task, and the other way round."""
    toggled = case((col(Task.status) == _COMPLETE, _INCOMPLETE), else_=_COMPLETE)
    changed = _update({"status": toggled, "updated_at": _NEXT_UPDATE})
    return Statement.compiled("toggle_task", _as_json(changed), writes=True)


@cache
def remove_task() -> Statement:
    """Delete one task; a row comes back when there was one."""
    removed = delete(Task).where(_ITS_OWN, col(Task.id) == _TASK_ID).returning(col(Task.id))
    return Statement.compiled("remove_task", removed, writes=True)


@cache
def erase_owner() -> Statement:
    """Delete the owner's row, and with it every task (a cascade); remember when."""
    user_hash = func.sha256(func.convert_to(_OWNER, literal_column("'UTF8'")))
    erasure = insert(Erasure).values(user_hash=user_hash)
    remembered = erasure.on_conflict_do_update(
        index_elements=[col(Erasure.user_hash)], set_={"erased_at": func.clock_timestamp()}
    )
    erased = delete(User).where(col(User.id) == _OWNER).returning(col(User.id))
    return Statement.compiled(
        "erase_owner", erased.add_cte(remembered.cte("erasure")), writes=True, erases=True
    )


def _update(values: dict[str, Any]) -> CTE:
    changed = update(Task).where(_ITS_OWN, col(Task.id) == _TASK_ID).values(**values)
    return changed.returning(*_SHOWN).cte("task")


def _column(name: str) -> Any:
    return col(getattr(Task, name))


def bind_new(values: Iterable[tuple[str, object]]) -> dict[str, object]:
    """Name new values as the statements bind them."""
    return {f"new_{name}": value for name, value in values}
