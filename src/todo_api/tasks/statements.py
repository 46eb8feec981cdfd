"""All statements on tasks, built from the model. Each is compiled once.

Each statement is atomic and has the parameter `owner`. It returns rows of one text column, usually
a task as JSON. PostgreSQL makes this text, and the service passes it on unchanged.

A write begins with `_writer`. In the same statement, `_writer` locks the user's row, gives the
write its version and refuses a void token (ADR 12).

Citus does not run every statement (ADR 13). So RETURNING names only plain columns, and an UPDATE or
DELETE calls no volatile function. It calls a stable one, such as now(), only outside a CASE and
without a column as its argument.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple

from sqlalchemy import (
    ARRAY,
    CTE,
    BigInteger,
    Boolean,
    ColumnElement,
    DateTime,
    Float,
    Integer,
    LargeBinary,
    Text,
    and_,
    any_,
    bindparam,
    cast,
    false,
    literal_column,
    not_,
    or_,
    tuple_,
    union_all,
)
from sqlalchemy.dialects.postgresql import insert
from sqlmodel import case, col, delete, func, select, update

from todo_api.database.statement import Statement
from todo_api.tasks.fields import (
    DERIVED,
    FIELDS,
    MAXIMUM_ID,
    PRIORITIES,
    TITLE_LENGTH,
    WRITABLE,
    Status,
)
from todo_api.tasks.model import (
    ANSWER_HOURS,
    TOMBSTONE_DAYS,
    Answer,
    Erasure,
    Task,
    Tombstone,
    User,
)
from todo_api.tasks.schemas import Order, Sort
from todo_api.tasks.search import TESTED_RUNS

EXPIRED_AT_ONCE = 250
"""The most expired tombstones, and the most expired answers, that one write removes.
More than a batch can add, so that they do not pile up."""

RUNS = [f"runs_{number}" for number in range(1, TESTED_RUNS + 1)]
"""Parameters of a search. Each has a run of letters of every word, see `run_numbers`."""

_OWNER = bindparam("owner", type_=Text())
_OWNER_HASH: Any = bindparam("owner_hash", type_=LargeBinary())
_ISSUED_AT = bindparam("issued_at", type_=Float())
"""The token's time of issue, in seconds since 1970."""
_ISSUED = func.to_timestamp(_ISSUED_AT)
_NOW: Any = bindparam("now", type_=BigInteger())
"""The program's clock, in milliseconds since 1970."""
_TASK_ID = bindparam("task_id", type_=BigInteger())
_IF_MATCH = bindparam("if_match", type_=ARRAY(BigInteger))
_KNOWN_VERSION: Any = bindparam("known_version", type_=BigInteger())
_ITS_OWN = col(Task.user_id) == _OWNER
_KEY: Any = bindparam("idempotency_key", type_=Text())
_REQUEST_HASH: Any = bindparam("request_hash", type_=LargeBinary())
_OF_KEY = (col(Answer.user_id) == _OWNER, col(Answer.key) == _KEY)
_REQUEST: ColumnElement[int] = literal_column("0")
"""The number of a request's own answer, among those of its operations."""
_NONE: ColumnElement[int] = literal_column("0")
_ONE: ColumnElement[int] = literal_column("1")
_COMPLETE: ColumnElement[str] = literal_column("'complete'")
_INCOMPLETE: ColumnElement[str] = literal_column("'incomplete'")

_UTC: ColumnElement[str] = literal_column("'UTC'")
_CLOCK = select(func.now().label("moment")).cte("clock")
# `moment` is the start of the transaction, which may be before the previous write. So one
# microsecond is added to the old value, and `updated_at` always grows, even if the clock steps
# back. The sum is in UTC, because it must not depend on the session's time zone.
_NEXT_UPDATE = func.greatest(
    _CLOCK.c.moment,
    func.timezone(
        _UTC,
        func.timezone(_UTC, col(Task.updated_at)) + literal_column("interval '1 microsecond'"),
    ),
)


@dataclass(frozen=True, slots=True)
class Terms:
    """The terms of a write. A plain write does not pay for them: it has a statement of its own."""

    if_match: bool = False
    """Whether the task must have one of the versions `if_match`."""
    keyed: bool = False
    """Whether the write must be the first one with `idempotency_key`, and stores its answer."""
    batched: bool = False
    """Whether the write is an operation of a batch, after `take_versions`."""

    def named(self, name: str) -> str:
        """Return the name of a statement on these terms."""
        parts = name, "if_match" * self.if_match, "keyed" * self.keyed, "batched" * self.batched
        return "_".join(filter(None, parts))

    @property
    def operation(self) -> Any:
        """The number of the answer that the write stores, if it is keyed."""
        return bindparam("operation", type_=Integer()) if self.batched else _REQUEST

    @property
    def same_key(self) -> list[Any]:
        """The conditions for the stored answer."""
        return [*_OF_KEY, col(Answer.operation) == self.operation]


PLAIN = Terms()
_MAY_WRITE = or_(col(User.tokens_from).is_(None), col(User.tokens_from) <= _ISSUED)
_NEXT_VERSION: Any = func.greatest(col(User.version) + _ONE, _NOW)


def _writer(terms: Terms = PLAIN) -> CTE:
    """Lock the owner's row and take their next version, or select the one taken for an operation.

    The CTE is empty if the user has no row or the token is too old. The version is a hybrid logical
    clock, so it only grows, even if the clocks of processes differ. `begin_owner` starts it above
    earlier versions (migration 0001).
    """
    unanswered = (
        [not_(select(col(Answer.key)).where(*terms.same_key).exists())] if terms.keyed else []
    )
    if terms.batched:
        later: Any = bindparam("later_operations", type_=BigInteger())
        taken: Any = select((col(User.version) - later).label("version"))
        mine: CTE = taken.where(col(User.id) == _OWNER, *unanswered).cte("writer")
        return mine
    locked = update(User).where(col(User.id) == _OWNER, _MAY_WRITE, *unanswered)
    return locked.values(version=_NEXT_VERSION).returning(col(User.version)).cte("writer")


_DAY: ColumnElement[str] = literal_column("'YYYY-MM-DD'")
_INSTANT: ColumnElement[str] = literal_column("""'YYYY-MM-DD"T"HH24:MI:SS.US"Z"'""")


def _utc(timestamp: Any, form: Any = _INSTANT) -> Any:
    """Show a timestamp as `2026-11-21T12:34:56.123456Z`."""
    return func.to_char(func.timezone(_UTC, timestamp), form)


def _shown(task: Any) -> list[Any]:
    """Return the columns of a task in a response."""
    return [_shown_field(task, field.name) for field in FIELDS]


def _shown_field(task: Any, name: str) -> Any:
    if name == "completed":
        return (task.status == _COMPLETE).label(name)
    column = task[name]
    if name == "due_date":
        form = case((task.due_is_day, _DAY), else_=_INSTANT)
        return _utc(column, form).label(name)
    return _utc(column).label(name) if isinstance(column.type, DateTime) else column


_TASK: Any = Task.__table__  # type: ignore[attr-defined]  # SQLModel does not declare it
_NEW: dict[str, Any] = {
    name: bindparam(f"new_{name}", type_=_TASK.c[name].type) for name in WRITABLE
}

_PRIORITY = func.array_position(
    literal_column(f"ARRAY{list(PRIORITIES)}"), col(Task.priority), type_=Integer()
)


class _SortKey(NamedTuple):
    """What a sort compares. Each pair has the value for an ascending and for a descending order."""

    columns: list[Any]
    before: tuple[list[Any], list[Any]]
    """Values that come before those of every task."""
    missing: tuple[str, str] | None = None
    """SQL of what stands for null in the first column, so that null comes last."""


_INSTANTS: tuple[list[Any], list[Any]] = (["-infinity"], ["infinity"])
_SORT_KEYS: dict[Sort, _SortKey] = {
    "created": _SortKey([col(Task.created_at)], _INSTANTS),
    "updated": _SortKey([col(Task.updated_at)], _INSTANTS),
    # No title is longer than this, or has a later character.
    "title": _SortKey(
        [col(Task.title_key).collate("C")], ([""], ["\U0010ffff" * (TITLE_LENGTH + 1)])
    ),
    # A day comes before its first instant.
    "due_date": _SortKey(
        [col(Task.due_date), not_(col(Task.due_is_day))],
        (["-infinity", False], ["infinity", True]),
        missing=("timestamptz 'infinity'", "timestamptz '-infinity'"),
    ),
    "priority": _SortKey(
        [_PRIORITY], ([-1], [len(PRIORITIES) + 2]), missing=(str(len(PRIORITIES) + 1), "0")
    ),
}


def _as_json(rows: Any) -> Any:
    """Select each row of a subquery or CTE as JSON text."""
    return select(func.row_to_json(rows.table_valued()))


@cache
def list_tasks(status: Status | None, sort: Sort, order: Order) -> Statement:
    """Select the owner's tasks of one status or of any. The id breaks ties in the same order."""
    key = _SORT_KEYS[sort]
    first, *others = (getattr(each, order)() for each in (*key.columns, col(Task.id)))
    if key.missing:
        first = first.nulls_last()
    tasks = select(*_shown(_TASK.c)).where(_ITS_OWN).order_by(first, *others)
    if status:
        tasks = tasks.where(col(Task.status) == literal_column(f"'{status}'"))
    name = f"list_{status or 'all'}_by_{sort}_{order}"
    return Statement.compiled(name, _after_version(tasks), streamed=True)


@cache
def find_tasks(sort: Sort, order: Order) -> Statement:
    """Select the owner's tasks that match the filters and come after a position.

    One statement serves all combinations of filters, and a null filter selects everything. Fewer
    prepared statements save memory on every connection.
    """
    keys = [*_keys_without_null(sort, order), col(Task.id)]
    after: list[Any] = [
        bindparam(f"after_{number}", type_=key.type) for number, key in enumerate(keys, 1)
    ]
    here, there = tuple_(*keys), tuple_(*after)
    is_after = here > there if order == "asc" else here < there
    directed = [getattr(key, order)() for key in keys]
    tasks = select(*_shown(_TASK.c)).where(_ITS_OWN, *_filters(), is_after).order_by(*directed)
    tasks = tasks.limit(bindparam("limit", type_=BigInteger()))
    return Statement.compiled(
        f"find_by_{sort}_{order}", _after_version(tasks, counts=True), streamed=True
    )


def _keys_without_null(sort: Sort, order: Order) -> list[Any]:
    """Return the columns of a sort, with a last value in place of null."""
    first, *others = _SORT_KEYS[sort].columns
    missing = _SORT_KEYS[sort].missing
    if missing:
        first = func.coalesce(first, literal_column(missing[order == "desc"]), type_=first.type)
    return [first, *others]


def _filters() -> list[Any]:
    """Return the conditions of a search. A filter with the value null selects every task."""
    wanted = bindparam("status", type_=Text())
    priority = bindparam("priority", type_=Text())
    due_from: Any = bindparam("due_from", type_=DateTime(timezone=True))
    due_before: Any = bindparam("due_before", type_=DateTime(timezone=True))
    without_due_date = bindparam("without_due_date", type_=Boolean())
    words: Any = func.unnest(
        bindparam("words", type_=ARRAY(Text())),
        *(bindparam(name, type_=ARRAY(BigInteger())) for name in RUNS),
    )
    each = words.table_valued("word", *RUNS, name="words").render_derived().c
    description = func.coalesce(col(Task.description_key), literal_column("''"))
    is_missing = and_(
        func.strpos(col(Task.title_key), each.word) == _NONE,
        or_(
            *(_filter_lacks(each[name]) for name in RUNS),
            func.strpos(description, each.word) == _NONE,
        ),
    )
    return [
        or_(wanted.is_(None), col(Task.status) == wanted),
        or_(
            priority.is_(None),
            func.coalesce(col(Task.priority), literal_column("'none'")) == priority,
        ),
        or_(due_from.is_(None), col(Task.due_date) >= due_from),
        or_(due_before.is_(None), col(Task.due_date) < due_before),
        or_(not_(without_due_date), col(Task.due_date).is_(None)),
        not_(select(each.word).where(is_missing).exists()),
    ]


def _filter_lacks(run: Any) -> Any:
    """Whether no word of a description has a run of letters, by its filter. Null without one."""
    bloom_filter = col(Task.description_filter)
    bits: Any = literal_column("8") * func.octet_length(bloom_filter)
    places = run % bits, run % (bits - _ONE)
    return or_(*(func.get_bit(bloom_filter, place) == _NONE for place in places))


def first_position(sort: Sort, order: Order) -> list[Any]:
    """Return a position before every task of an order."""
    down = order == "desc"
    return [*_SORT_KEYS[sort].before[down], MAXIMUM_ID if down else 0]


def _current_version() -> CTE:
    """Return the version of the owner's last write, or 0 if they never wrote."""
    version = func.coalesce(func.max(col(User.version)), _NONE)
    return select(version.label("version")).where(col(User.id) == _OWNER).cte("current")


def _after_version(tasks: Any, *, counts: bool = False) -> Any:
    """Select the version first, and the tasks only if the client sent another version.

    If the versions are equal, PostgreSQL reads no task, because the comparison is the same for all
    of them. With `counts`, the number of matches comes before the tasks if the client asks for it.
    """
    current = _current_version()
    is_new = select(current.c.version).scalar_subquery().is_distinct_from(_KNOWN_VERSION)
    parts: list[Any] = [_as_json(tasks.where(is_new).subquery("task"))]
    if counts:
        is_wanted = bindparam("count", type_=Boolean())
        number: Any = select(func.to_json(func.count())).select_from(Task)
        number = number.where(_ITS_OWN, *_filters(), is_new, is_wanted)
        parts.insert(0, number.having(and_(is_wanted, is_new)))
    head: Any = select(func.to_json(current.c.version))
    return head.union_all(*parts)


@cache
def find_changes() -> Statement:
    """Select what has changed since a version: tasks in their latest state, and deletions.

    The first row is an array of the owner's version, and of the version from which copies can be
    brought up to date. If the first is `since`, PostgreSQL reads no task.
    """
    limit = bindparam("limit", type_=BigInteger())
    since: Any = bindparam("since", type_=BigInteger())
    users = _both_versions()
    is_newer = select(users.c.version).scalar_subquery() > since
    changed = _after(select(*_TASK.c), Task, since, is_newer, limit).subquery("changed")
    task = select(*_shown(changed.c)).subquery("task")
    buried = _after(select(Tombstone), Tombstone, since, is_newer, limit).subquery("buried")
    deleted = select(buried.c.task_id.label("deleted"), buried.c.version).subquery("deletion")
    changes = union_all(
        select(task.c.version, _row(task)), select(deleted.c.version, _row(deleted))
    ).subquery("change")
    version, change = changes.c
    page = select(change).order_by(version).limit(limit).subquery("page")
    head: Any = select(func.json_build_array(*users.c))
    found = Statement.compiled("find_changes", head.union_all(select(*page.c)))
    return replace(found, planned_once=True)


@cache
def get_versions() -> Statement:
    """Select an array of the owner's version and `changes_from`."""
    versions: Any = select(func.json_build_array(*_both_versions().c))
    return Statement.compiled("get_versions", versions)


def _both_versions() -> CTE:
    """Select the owner's version and `changes_from`, or 0 and 0 if they never wrote."""
    columns = [
        func.coalesce(func.max(each), _NONE).label(name)
        for name, each in (("version", User.version), ("changes_from", User.changes_from))
    ]
    return select(*columns).where(col(User.id) == _OWNER).cte("users_versions")


def _after(rows: Any, table: Any, since: Any, is_newer: Any, limit: Any) -> Any:
    """Select the first of the owner's rows that are later than a version."""
    mine = rows.where(col(table.user_id) == _OWNER, col(table.version) > since, is_newer)
    return mine.order_by(col(table.version)).limit(limit)


def _row(rows: Any) -> Any:
    return func.row_to_json(rows.table_valued()).label("json")


@cache
def get_task() -> Statement:
    """Select one task."""
    task = select(*_shown(_TASK.c)).where(_ITS_OWN, col(Task.id) == _TASK_ID).subquery("task")
    return Statement.compiled("get_task", _as_json(task))


def _new_columns() -> dict[str, Any]:
    """Return the columns of a new task, with their values."""
    completed_at = case((_NEW["status"] == _COMPLETE, func.now()))
    return {"user_id": _OWNER, **_NEW, "completed_at": completed_at}


@cache
def add_task(terms: Terms = PLAIN) -> Statement:
    """Insert a task for a user who has a row."""
    values = _new_columns()
    row: Any = select(*values.values(), _writer(terms).c.version)  # type: ignore[call-overload]  # SQLModel types four columns
    added = insert(Task).from_select([*values, "version"], row)
    return _write("add_task", _written(added), terms, lock=begin_owner)


@cache
def import_task() -> Statement:
    """Insert a task of an import, after `take_versions`, unless it was imported before.

    Nor is it inserted if the user has the very task that it was exported from: the same id, created
    at the same moment.
    """
    source: Any = bindparam("source", type_=LargeBinary())
    exported_id = bindparam("exported_id", type_=BigInteger())
    exported_at = bindparam("exported_at", type_=DateTime(timezone=True))
    original = select(col(Task.id)).where(
        _ITS_OWN, col(Task.id) == exported_id, col(Task.created_at) == exported_at
    )
    writer = _writer(Terms(batched=True))
    row: Any = select(*_new_columns().values(), source, writer.c.version)  # type: ignore[call-overload]  # SQLModel types four columns
    added = insert(Task).from_select(
        [*_new_columns(), "source", "version"], row.where(not_(original.exists()))
    )
    once = added.on_conflict_do_nothing(
        index_elements=[col(Task.user_id), col(Task.source)],
        index_where=col(Task.source).is_not(None),
    ).returning(col(Task.id))
    return Statement.compiled("import_task", once, writes=True)


@cache
def add_first_task() -> Statement:
    """Insert a task for a user who may not have a row yet."""
    return add_task().after(begin_owner())


def change_task(fields: frozenset[str], terms: Terms = PLAIN) -> Statement:
    """Set these columns and keep the others. If no value differs, `updated_at` stays.

    On other terms than the plain ones there is a single statement for all columns, because each
    prepared statement costs memory on every connection.
    """
    return _change_columns(fields) if terms == PLAIN else change_any(terms)


@cache
def _change_columns(fields: frozenset[str]) -> Statement:
    names = [name for name in WRITABLE if name in fields]
    new = {name: _NEW[name] for name in names}
    return _change("change_" + "_".join(names), _changed(new, PLAIN), PLAIN)


@cache
def change_any(terms: Terms) -> Statement:
    """Set the columns for which `sets_<column>` is true."""
    new = {
        name: case((bindparam(f"sets_{name}", type_=Boolean()), _NEW[name]), else_=_TASK.c[name])
        for name in WRITABLE
    }
    return _change("change_any", _changed(new, terms), terms)


def _changed(new: dict[str, Any], terms: Terms) -> dict[str, Any]:
    """Return the values of an UPDATE that sets these columns."""
    differs = or_(
        false(),
        *(_TASK.c[name].is_distinct_from(new[name]) for name in new if name not in DERIVED),
    )
    values = dict(new)
    if "status" in new:
        values["completed_at"] = case(
            (new["status"] != _COMPLETE, None),
            (col(Task.status) == _COMPLETE, col(Task.completed_at)),
            else_=_NEXT_UPDATE,
        )
    values["updated_at"] = case((differs, _NEXT_UPDATE), else_=col(Task.updated_at))
    values["version"] = case((differs, _writer(terms).c.version), else_=col(Task.version))
    return values


@cache
def toggle_task(terms: Terms = PLAIN) -> Statement:
    """Complete an incomplete task, or reopen a complete one."""
    is_complete = col(Task.status) == _COMPLETE
    values = {
        "status": case((is_complete, _INCOMPLETE), else_=_COMPLETE),
        "completed_at": case((is_complete, None), else_=_NEXT_UPDATE),
        "updated_at": _NEXT_UPDATE,
        "version": _writer(terms).c.version,
    }
    return _change("toggle_task", values, terms)


@cache
def remove_task(terms: Terms = PLAIN) -> Statement:
    """Delete one task and leave a tombstone. Returns a row if the task existed."""
    version = _writer(terms).c.version
    removed = (
        delete(Task)
        .where(*_one_task(terms), version.is_not(None))
        .returning(col(Task.user_id), version, col(Task.id))
        .cte("removed")
    )
    buried = insert(Tombstone).from_select(
        ["user_id", "version", "task_id"],
        select(removed.c.user_id, removed.c.version, removed.c.id),
    )
    tombstone = buried.returning(col(Tombstone.task_id)).cte("tombstone")
    return _write("remove_task", select(func.to_json(tombstone.c.task_id)), terms)


@cache
def forget_answer() -> Statement:
    """Remove what is stored under this idempotency key if it has expired."""
    expired = delete(Answer).where(*_OF_KEY, col(Answer.created_at) <= _expiry())
    return Statement.compiled("forget_answer", expired, writes=True)


@cache
def forget_answers() -> Statement:
    """Remove some of the owner's expired answers, the oldest first.

    Those of a batch go together, because they have one key and one time.
    """
    some = (
        select(col(Answer.key))
        .where(col(Answer.user_id) == _OWNER, col(Answer.created_at) <= _expiry())
        .order_by(col(Answer.created_at))
        .limit(literal_column(str(EXPIRED_AT_ONCE)))
    )
    forgotten = delete(Answer).where(
        col(Answer.user_id) == _OWNER,
        col(Answer.key).in_(some),
        col(Answer.created_at) <= _expiry(),
    )
    return Statement.compiled("forget_answers", forgotten, writes=True)


@cache
def check_key() -> Statement:
    """Fail with `NOTHING_WRITTEN` if the idempotency key belongs to another request."""
    same: Any = func.count().filter(col(Answer.request_hash) == _REQUEST_HASH)
    checked: Any = select(func.to_json(_ONE.op("/")(same))).where(*PLAIN.same_key)
    return Statement.compiled("check_key", checked.having(func.count() > _NONE))


@cache
def take_versions(terms: Terms) -> Statement:
    """Take as many versions as a batch has operations, unless it is answered already."""
    more: Any = bindparam("more_operations", type_=BigInteger())
    taken = update(User).where(col(User.id) == _OWNER)
    if terms.keyed:
        taken = taken.where(not_(select(col(Answer.key)).where(*PLAIN.same_key).exists()))
    taken = taken.values(version=_NEXT_VERSION + more)
    return Statement.compiled(terms.named("take_versions"), taken, writes=True)


@cache
def claim_key() -> Statement:
    """Store the hash of a batch's request under its idempotency key, if the key is new."""
    row: list[Any] = [_OWNER, _KEY, _REQUEST, _REQUEST_HASH, literal_column("''")]
    columns = ["user_id", "key", "operation", "request_hash", "body"]
    claimed = insert(Answer).from_select(columns, select(*row)).on_conflict_do_nothing()
    return Statement.compiled("claim_key", claimed, writes=True)


def _expiry() -> Any:
    return func.now() - literal_column(f"interval '{ANSWER_HOURS} hours'")


@cache
def forget_tombstones() -> Statement:
    """Lock the owner's row, then remove some of their expired tombstones."""
    owner = select(col(User.id)).where(col(User.id) == _OWNER).with_for_update(key_share=True)
    locked = owner.cte("owner")
    expired: Any = literal_column(str(TOMBSTONE_DAYS * 86_400_000))
    some = (
        select(col(Tombstone.version))
        .where(col(Tombstone.user_id) == _OWNER, col(Tombstone.version) < _NOW - expired)
        .order_by(col(Tombstone.version))
        .limit(literal_column(str(EXPIRED_AT_ONCE)))
    )
    forgotten = (
        delete(Tombstone)
        .where(
            col(Tombstone.user_id) == _OWNER,
            locked.c.id == _OWNER,
            col(Tombstone.version).in_(some),
        )
        .returning(col(Tombstone.version))
        .cte("forgotten")
    )
    latest = select(func.max(forgotten.c.version)).scalar_subquery()
    raised = (
        update(User)
        .where(col(User.id) == _OWNER, latest.is_not(None))
        .values(changes_from=func.greatest(col(User.changes_from), latest))
    )
    return Statement.compiled("forget_tombstones", raised, writes=True)


@cache
def why_not_written() -> Statement:
    """Select why a write found nothing: the time from which tokens can write, or a version.

    A string is the time, if the token is older than that. A number is the task's version.
    """
    is_void = func.coalesce(col(Erasure.tokens_from) > _ISSUED, literal_column("true"))
    mark: Any = select(func.to_json(_utc(col(Erasure.tokens_from))))
    void = mark.where(col(Erasure.user_hash) == _OWNER_HASH, is_void)
    task: Any = select(func.to_json(col(Task.version)))
    version = task.where(_ITS_OWN, col(Task.id) == _TASK_ID)
    return Statement.compiled("why_not_written", void.union_all(version))


@cache
def begin_owner() -> Statement:
    """Lock the owner's row, and create it if it is missing (migration 0001)."""
    email = bindparam("email", type_=Text())
    begun = select(func.begin_owner(_OWNER, email, _ISSUED_AT, _NOW))
    return Statement.compiled("begin_owner", begun, writes=True)


@cache
def lock_owner() -> Statement:
    """Lock the owner's row if there is one."""
    owner = select(func.to_json(_ONE)).select_from(User).where(col(User.id) == _OWNER)
    return Statement.compiled("lock_owner", owner.with_for_update(key_share=True), writes=True)


@cache
def erase_owner() -> Statement:
    """Delete the owner's row and all their tasks (by cascade), and void the tokens from before.

    `tokens_from` is the least time of issue of a token that can write again. The database's clock
    counts too, because it goes on while the statement waits for a connection and a lock.

    PostgreSQL gives each statement a new snapshot, so each one sees what others committed while
    `begin_owner` waited.
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
            # A void token must stay void, even if the clock was set back.
            "tokens_from": func.greatest(col(Erasure.tokens_from), mark.excluded.tokens_from),
        },
    ).returning(col(Erasure.version))
    buried = delete(Tombstone).where(col(Tombstone.user_id) == _OWNER)
    answers = delete(Answer).where(col(Answer.user_id) == _OWNER)
    erased = delete(User).where(col(User.id) == _OWNER).returning(col(User.id))
    return Statement.compiled("erase_owner", erased, writes=True).after(
        begin_owner(),
        Statement.compiled("remember_erasure", marked, writes=True),
        Statement.compiled("erase_tombstones", buried, writes=True),
        Statement.compiled("erase_answers", answers, writes=True),
    )


def _one_task(terms: Terms) -> list[Any]:
    """Return the conditions for one task, if need be for one of these versions of it."""
    conditions: list[Any] = [_ITS_OWN, col(Task.id) == _TASK_ID]
    if terms.if_match:
        conditions.append(col(Task.version) == any_(_IF_MATCH))
    return conditions


def _change(name: str, values: dict[str, Any], terms: Terms) -> Statement:
    change = update(Task).where(*_one_task(terms)).values(**values)
    return _write(name, _written(change), terms)


def _write(
    name: str, answer: Any, terms: Terms, lock: Callable[[], Statement] | None = None
) -> Statement:
    """Compile a write, whose answer is one row with JSON or no row.

    A keyed write stores its answer in the same statement. If there is a stored answer already, it
    changes nothing and returns an array of the first request's hash and its answer. It has locked
    the owner's row before, so it sees the answer of a request with the same key.
    """
    rows = _stored(answer, terms) if terms.keyed else answer
    if terms.batched:
        return Statement.compiled(terms.named(name), _or_failure(rows), writes=True)
    first = ((lock or lock_owner)(), forget_answer()) if terms.keyed else ()
    return Statement.compiled(terms.named(name), rows, writes=True).after(*first)


def _stored(answer: Any, terms: Terms) -> Any:
    """Store an answer and select it, or select the stored one."""
    given = answer.cte("given")
    (answered,) = given.c
    body = cast(answered, Text())
    row: list[Any] = [_OWNER, _KEY, terms.operation, _REQUEST_HASH, body]
    columns = ["user_id", "key", "operation", "request_hash", "body"]
    stored = insert(Answer).from_select(columns, select(*row).select_from(given))
    first: Any = select(
        func.json_build_array(
            func.encode(col(Answer.request_hash), literal_column("'hex'")), col(Answer.body)
        )
    )
    replay = first.where(*terms.same_key)
    if not terms.batched:
        writer = select(col(User.id)).where(col(User.id) == _OWNER, _MAY_WRITE)
        replay = replay.where(writer.exists())
    return select(answered).add_cte(stored.cte("stored")).union_all(replay)


def _or_failure(rows: Any) -> Any:
    """Select the rows, or fail with `NOTHING_WRITTEN` if there are none.

    This rolls the batch back, without a function that Citus would have to run on another node.
    """
    found = rows.cte("found")
    failure: Any = select(func.to_json(_ONE.op("/")(func.count()))).select_from(found)
    chosen: Any = select(*found.c)
    return chosen.union_all(failure.having(func.count() == _NONE))


def _written(change: Any) -> Any:
    """Select the task that an INSERT or UPDATE wrote, as JSON."""
    task = change.returning(*_TASK.c).cte("task")
    return _as_json(select(*_shown(task.c)).subquery("shown"))


def bind_new(values: Mapping[str, object]) -> dict[str, object]:
    """Add the prefix that the statements use for new values."""
    return {f"new_{name}": value for name, value in values.items()}


def bind_any(values: Mapping[str, object]) -> dict[str, object]:
    """Return the parameters of `change_any` that set these columns."""
    sets = {f"sets_{name}": name in values for name in WRITABLE}
    return sets | bind_new({**dict.fromkeys(WRITABLE), **values})
