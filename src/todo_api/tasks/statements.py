"""Every statement there is, built from the model, each compiled once.

Each is atomic by itself, names the owner (`owner`, one value), and answers with rows of one
column: a task as JSON text, made by PostgreSQL, which the service passes on as it came.

A write begins with `_writer`: it takes the lock on the user's row, gives the write its version
and refuses a void token, all in the one statement (ADR 12). Citus has a say in the form: RETURNING
names plain columns, and no volatile function stands in a write, nor a stable one in a CASE or
beside a column (ADR 13).
"""

from collections.abc import Iterable
from functools import cache
from typing import Any, Literal

from sqlalchemy import (
    CTE,
    BigInteger,
    ColumnElement,
    DateTime,
    Float,
    LargeBinary,
    Text,
    bindparam,
    literal_column,
    or_,
)
from sqlalchemy.dialects.postgresql import insert
from sqlmodel import case, col, delete, func, select, update

from todo_api.database.statement import Statement
from todo_api.tasks.fields import FIELDS, PRIORITIES, WRITABLE
from todo_api.tasks.model import TOMBSTONE_DAYS, Erasure, Task, Tombstone, User

Status = Literal["incomplete", "complete"]
Sort = Literal["created", "updated", "title", "due_date", "priority"]
Order = Literal["asc", "desc"]

TOMBSTONES_AT_ONCE = 100
"""How many expired tombstones one write removes at most."""

_OWNER = bindparam("owner", type_=Text())
_OWNER_HASH: Any = bindparam("owner_hash", type_=LargeBinary())
_ISSUED_AT = func.to_timestamp(bindparam("issued_at", type_=Float()))
_NOW: Any = bindparam("now", type_=BigInteger())
"""The program's clock, in milliseconds since 1970."""
_TASK_ID = bindparam("task_id", type_=BigInteger())
_ITS_OWN = col(Task.user_id) == _OWNER
_COMPLETE: ColumnElement[str] = literal_column("'complete'")
_INCOMPLETE: ColumnElement[str] = literal_column("'incomplete'")

_UTC: ColumnElement[str] = literal_column("'UTC'")
_CLOCK = select(func.now().label("moment")).cte("clock")
# The moment is the transaction's start, which may lie before the write that this one replaces: so
# the microsecond makes it strictly later, whatever the clock does. The sum is made in UTC, where it
# does not depend on the session's time zone.
_NEXT_UPDATE = func.greatest(
    _CLOCK.c.moment,
    func.timezone(
        _UTC,
        func.timezone(_UTC, col(Task.updated_at)) + literal_column("interval '1 microsecond'"),
    ),
)


def _writer() -> CTE:
    """Lock the owner's row and take their next version; no row where the token may not write.

    The version is a hybrid logical clock: it only grows, whatever the clocks of several processes
    say, and starts above the versions that an erased account or a restored backup has forgotten.
    """
    may_write = or_(col(User.tokens_from).is_(None), col(User.tokens_from) <= _ISSUED_AT)
    locked = update(User).where(col(User.id) == _OWNER, may_write)
    version = func.greatest(col(User.version) + literal_column("1"), _NOW)
    return locked.values(version=version).returning(col(User.version)).cte("writer")


def _utc(timestamp: Any) -> Any:
    """Show a timestamp as `2026-11-21T12:34:56.123456Z`."""
    form: ColumnElement[str] = literal_column("""'YYYY-MM-DD"T"HH24:MI:SS.US"Z"'""")
    return func.to_char(func.timezone(_UTC, timestamp), form).label(timestamp.key)


def _shown(task: Any) -> list[Any]:
    """Return the columns of an answer."""
    return [_shown_field(task, field.name) for field in FIELDS]


def _shown_field(task: Any, name: str) -> Any:
    if name == "completed":
        return (task.status == _COMPLETE).label(name)
    column = task[name]
    return _utc(column) if isinstance(column.type, DateTime) else column


_TASK: Any = Task.__table__  # type: ignore[attr-defined]  # SQLModel does not declare it
_NEW: dict[str, Any] = {
    name: bindparam(f"new_{name}", type_=_TASK.c[name].type) for name in WRITABLE
}

_SORT_KEYS: dict[Sort, tuple[Any, Order]] = {
    "created": (col(Task.created_at), "desc"),
    "updated": (col(Task.updated_at), "desc"),
    "title": (func.lower(col(Task.title)), "asc"),
    "due_date": (col(Task.due_date), "asc"),
    "priority": (
        func.array_position(literal_column(f"ARRAY{list(PRIORITIES)}"), col(Task.priority)),
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
    tasks = select(*_shown(_TASK.c)).where(_ITS_OWN).order_by(by_key, by_id)
    if status:
        tasks = tasks.where(col(Task.status) == literal_column(f"'{status}'"))
    name = f"list_{status or 'all'}_by_{sort}_{direction}"
    return Statement.compiled(name, _as_json(tasks.subquery("task")), streamed=True)


@cache
def get_task() -> Statement:
    """One task."""
    task = select(*_shown(_TASK.c)).where(_ITS_OWN, col(Task.id) == _TASK_ID).subquery("task")
    return Statement.compiled("get_task", _as_json(task))


@cache
def add_task() -> Statement:
    """A new task, of a user who has a row."""
    completed_at = case((_NEW["status"] == _COMPLETE, func.now()))
    values = {"user_id": _OWNER, **_NEW, "completed_at": completed_at}
    row: Any = select(*values.values(), _writer().c.version)  # type: ignore[call-overload]  # SQLModel types four columns
    added = insert(Task).from_select([*values, "version"], row)
    return Statement.compiled("add_task", _written(added), writes=True)


@cache
def add_first_task() -> Statement:
    """A new task, of a user who may not have a row yet."""
    return add_task().after(begin_owner())


@cache
def change_task(fields: frozenset[str]) -> Statement:
    """Set these fields and keep the others. Where nothing differs, `updated_at` stays."""
    names = [name for name in WRITABLE if name in fields]
    differs = or_(*(_column(name).is_distinct_from(_NEW[name]) for name in names))
    values = {name: _NEW[name] for name in names}
    if "status" in fields:
        values["completed_at"] = case(
            (_NEW["status"] != _COMPLETE, None),
            (col(Task.status) == _COMPLETE, col(Task.completed_at)),
            else_=_NEXT_UPDATE,
        )
    values["updated_at"] = case((differs, _NEXT_UPDATE), else_=col(Task.updated_at))
    values["version"] = case((differs, _writer().c.version), else_=col(Task.version))
    return Statement.compiled("change_" + "_".join(names), _written(_update(values)), writes=True)


@cache
def toggle_task() -> Statement:
    """Complete an incomplete task, and the other way round."""
    is_complete = col(Task.status) == _COMPLETE
    values = {
        "status": case((is_complete, _INCOMPLETE), else_=_COMPLETE),
        "completed_at": case((is_complete, None), else_=_NEXT_UPDATE),
        "updated_at": _NEXT_UPDATE,
        "version": _writer().c.version,
    }
    return Statement.compiled("toggle_task", _written(_update(values)), writes=True)


@cache
def remove_task() -> Statement:
    """Delete one task and leave a tombstone; a row comes back when there was one."""
    version = _writer().c.version
    removed = (
        delete(Task)
        .where(_ITS_OWN, col(Task.id) == _TASK_ID, version.is_not(None))
        .returning(col(Task.user_id), version, col(Task.id))
        .cte("removed")
    )
    buried = insert(Tombstone).from_select(
        ["user_id", "version", "task_id"],
        select(removed.c.user_id, removed.c.version, removed.c.id),
    )
    tombstone = buried.returning(col(Tombstone.task_id)).cte("tombstone")
    return Statement.compiled("remove_task", select(tombstone.c.task_id), writes=True)


@cache
def forget_tombstones() -> Statement:
    """Remove some of the owner's expired tombstones, once their row is locked."""
    owner = select(col(User.id)).where(col(User.id) == _OWNER).with_for_update(key_share=True)
    locked = owner.cte("owner")
    expired: Any = literal_column(str(TOMBSTONE_DAYS * 86_400_000))
    some = (
        select(col(Tombstone.version))
        .where(col(Tombstone.user_id) == _OWNER, col(Tombstone.version) < _NOW - expired)
        .order_by(col(Tombstone.version))
        .limit(literal_column(str(TOMBSTONES_AT_ONCE)))
    )
    forgotten = delete(Tombstone).where(
        col(Tombstone.user_id) == _OWNER,
        locked.c.id == _OWNER,
        col(Tombstone.version).in_(some),
    )
    return Statement.compiled("forget_tombstones", forgotten, writes=True)


@cache
def void_token() -> Statement:
    """The time from which tokens can write, if this one is older. Says why a write failed."""
    is_void = func.coalesce(col(Erasure.tokens_from) > _ISSUED_AT, literal_column("true"))
    tokens_from = select(_utc(col(Erasure.tokens_from)))
    mark = tokens_from.where(col(Erasure.user_hash) == _OWNER_HASH, is_void)
    return Statement.compiled("void_token", mark)


@cache
def begin_owner() -> Statement:
    """Lock the owner's row, made anew where it is missing (migration 0001)."""
    email = bindparam("email", type_=Text())
    issued_at = bindparam("issued_at", type_=Float())
    begun = select(func.begin_owner(_OWNER, email, issued_at, _NOW))
    return Statement.compiled("begin_owner", begun, writes=True)


@cache
def erase_owner() -> Statement:
    """Delete the owner's row, and with it every task (a cascade); void the tokens from before.

    `tokens_from` is the least time of issue of a token that can write again. The database's clock
    counts too, because it goes on while the statement waits for a connection and a lock.

    Statements of their own, because each must see what was committed while `begin_owner` waited.
    """
    given = func.to_timestamp(bindparam("tokens_from", type_=Float()))
    ahead: Any = bindparam("issuer_ahead", type_=Float())
    by_database = func.statement_timestamp() + ahead * literal_column("interval '1 second'")
    tokens_from = func.greatest(given, by_database)
    row: Any = select(_OWNER_HASH, col(User.version), tokens_from).where(col(User.id) == _OWNER)
    mark = insert(Erasure).from_select(["user_hash", "version", "tokens_from"], row)
    marked = mark.on_conflict_do_update(
        index_elements=[col(Erasure.user_hash)],
        set_={
            "version": mark.excluded.version,
            # A clock that was set back must not make tokens good that were void.
            "tokens_from": func.greatest(col(Erasure.tokens_from), mark.excluded.tokens_from),
        },
    ).returning(col(Erasure.version))
    buried = delete(Tombstone).where(col(Tombstone.user_id) == _OWNER)
    erased = delete(User).where(col(User.id) == _OWNER).returning(col(User.id))
    return Statement.compiled("erase_owner", erased, writes=True).after(
        begin_owner(),
        Statement.compiled("remember_erasure", marked, writes=True),
        Statement.compiled("erase_tombstones", buried, writes=True),
    )


def _update(values: dict[str, Any]) -> Any:
    return update(Task).where(_ITS_OWN, col(Task.id) == _TASK_ID).values(**values)


def _written(change: Any) -> Any:
    """Return the task that an INSERT or UPDATE leaves, as JSON."""
    task = change.returning(*_TASK.c).cte("task")
    return _as_json(select(*_shown(task.c)).subquery("shown"))


def _column(name: str) -> Any:
    return col(getattr(Task, name))


def bind_new(values: Iterable[tuple[str, object]]) -> dict[str, object]:
    """Name new values as the statements bind them."""
    return {f"new_{name}": value for name, value in values}
