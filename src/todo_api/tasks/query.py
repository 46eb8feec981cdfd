"""The parameters of a list: read strictly, and the cursors that lead from page to page."""

import json
import re
from base64 import b64decode, urlsafe_b64encode
from collections.abc import Callable, Mapping
from hashlib import blake2b
from typing import Annotated, Any, get_args
from urllib.parse import parse_qsl, quote, urlencode
from zlib import compress, decompressobj, error

import jiter
from pydantic import AfterValidator, Field, StringConstraints, TypeAdapter
from starlette.requests import Request

from todo_api.errors import InvalidParameter
from todo_api.tasks.fields import MAXIMUM_ID, PRIORITIES, Status, read_due_date
from todo_api.tasks.schemas import (
    MAXIMUM_LIMIT,
    SEARCH_LENGTH,
    SHOWN_NAME_LENGTH,
    Order,
    Sort,
    TaskQuery,
)
from todo_api.tasks.search import fold, words

_DIGEST_BYTES = 12
_CURSOR_BYTES = 65_536
"""The most bytes of a cursor's content."""

_DEFAULT_ORDER: Mapping[Sort, Order] = {
    "created": "desc",
    "updated": "desc",
    "title": "asc",
    "due_date": "asc",
    "priority": "desc",
}
_STATUSES: Mapping[str, Status] = {
    "incomplete": "incomplete",
    "pending": "incomplete",
    "complete": "complete",
    "completed": "complete",
}

Position = list[Any]
"""The place of a task in an order: the values of its sort keys, and its id."""


def direction(query: TaskQuery) -> Order:
    """Return the direction of a list."""
    return query.order or _DEFAULT_ORDER[query.sort]


def status(query: TaskQuery) -> Status | None:
    """Return the status that a list shows, or None for every status."""
    return _STATUSES.get(query.status)


def position(task: bytes, query: TaskQuery) -> Position:
    """Return the place of a task, given as its JSON text, in the order of a list.

    Tasks without a value come last in both directions.
    """
    shown = jiter.from_json(task)
    down = direction(query) == "desc"
    match query.sort:
        case "created" | "updated":
            keys = [shown[f"{query.sort}_at"]]
        case "title":
            keys = [fold(shown["title"])]
        case "due_date":
            due = shown["due_date"]
            is_day = due is not None and "T" not in due
            none = "-infinity" if down else "infinity"
            keys = [f"{due}T00:00:00Z" if is_day else due or none, not is_day]
        case "priority":
            missing = 0 if down else len(PRIORITIES) + 1
            value = shown["priority"]
            keys = [PRIORITIES.index(value) + 1 if value else missing]
    return [*keys, shown["id"]]


def cursor_after(task: bytes, query: TaskQuery, user_id: str) -> str:
    """Return the cursor of the page after a task.

    Compressed, because a folded title can have eighteen times the characters of the title.
    """
    content = compress(json.dumps(position(task, query), ensure_ascii=False).encode())
    return urlsafe_b64encode(_digest(content, query, user_id) + content).decode().rstrip("=")


def read_cursor(query: TaskQuery, user_id: str) -> Position | None:
    """Return the place that a list continues after. Raises `InvalidParameter`.

    The digest binds a cursor to its list. It is no secret, because a forged cursor could only show
    its user their own tasks. So the content has to be checked too.
    """
    if query.cursor is None:
        return None
    try:
        raw = b64decode(query.cursor + "=" * (-len(query.cursor) % 4), b"-_", validate=True)
        digest, content = raw[:_DIGEST_BYTES], raw[_DIGEST_BYTES:]
        raw_place = decompressobj().decompress(content, _CURSOR_BYTES)
        place = _POSITIONS[query.sort].validate_json(raw_place, strict=True)
    except (ValueError, error):
        digest, content, place = b"", b"", ()
    shown = urlsafe_b64encode(digest + content).decode().rstrip("=")
    if shown != query.cursor or digest != _digest(content, query, user_id):
        raise InvalidParameter(
            "Invalid cursor. It must come from a Link of the same list, with the same parameters"
        )
    return list(place)


def _moment_in_cursor(text: str) -> str:
    """Return the moment in UTC, because PostgreSQL refuses offsets of 16 hours."""
    if text in {"infinity", "-infinity"}:
        return text
    return str(read_due_date(text).at)


_Id = Annotated[int, Field(ge=1, le=MAXIMUM_ID)]
_Moment = Annotated[str, AfterValidator(_moment_in_cursor)]
_Title = Annotated[str, StringConstraints(pattern=r"^[^\x00]*$")]
_POSITIONS: Mapping[Sort, TypeAdapter[Any]] = {
    "created": TypeAdapter(tuple[_Moment, _Id]),
    "updated": TypeAdapter(tuple[_Moment, _Id]),
    "title": TypeAdapter(tuple[_Title, _Id]),
    "due_date": TypeAdapter(tuple[_Moment, bool, _Id]),
    "priority": TypeAdapter(tuple[Annotated[int, Field(ge=0, le=len(PRIORITIES) + 1)], _Id]),
}
"""What a cursor has in each order."""


def _digest(content: bytes, query: TaskQuery, user_id: str) -> bytes:
    filters = query.model_dump(exclude={"limit", "cursor", "count", "order"})
    bound = [user_id, direction(query), *filters.items()]
    return blake2b(content + json.dumps(bound).encode(), digest_size=_DIGEST_BYTES).digest()


def next_link(request: Request, cursor: str) -> str:
    """Return the value of `Link` for the next page: this path with the other parameters kept."""
    given = parse_qsl(request.scope["query_string"].decode("latin-1"), keep_blank_values=True)
    kept = [(name, value) for name, value in given if name != "cursor"]
    query = urlencode([*kept, ("cursor", cursor)], quote_via=quote)
    return f'<{request.scope["raw_path"].decode("latin-1")}?{query}>; rel="next"'


_EVERYTHING = TaskQuery()


async def read_task_query(request: Request) -> TaskQuery:
    """Read the parameters of a list: each at most once, and only values that are allowed."""
    if not request.scope["query_string"]:
        return _EVERYTHING
    given = read_parameters(request, _READERS)
    if "cursor" in given:
        given.setdefault("limit", MAXIMUM_LIMIT)
    return TaskQuery.model_construct(**given)


Readers = Mapping[str, Callable[[str, str], Any]]
"""How the value of each parameter is read. A wrong one raises `InvalidParameter`."""


def read_parameters(request: Request, readers: Readers) -> dict[str, Any]:
    """Read the parameters that a request has. Raises `InvalidParameter`."""
    given: dict[str, Any] = {}
    query = request.scope["query_string"].decode("latin-1")
    # Bytes that are not UTF-8 become surrogates, which no valid value has.
    for name, text in parse_qsl(query, keep_blank_values=True, errors="surrogateescape"):
        if name not in readers:
            shown = ascii(name[:SHOWN_NAME_LENGTH])
            raise InvalidParameter(f"Unknown query parameter {shown}. Allowed are {_and(readers)}")
        if name in given:
            raise InvalidParameter(f"The query parameter {name} must be given at most once")
        given[name] = readers[name](name, text)
    return given


def _one_of(*allowed: str) -> Callable[[str, str], str]:
    def read(name: str, text: str) -> str:
        if text not in allowed:
            raise _invalid(name, _or(allowed))
        return text

    return read


def number_to(maximum: int) -> Callable[[str, str], int]:
    """Return a reader of whole numbers from 1 to at most 999."""

    def read(name: str, text: str) -> int:
        if not re.fullmatch("[1-9][0-9]{0,2}", text) or int(text) > maximum:
            raise _invalid(name, f"a number from 1 to {maximum}")
        return int(text)

    return read


def _count(name: str, text: str) -> bool:
    return _one_of("true", "false")(name, text) == "true"


_NO_TEXT = re.compile("[\0\ud800-\udfff]")


def _search(name: str, text: str) -> str:
    if len(text) > SEARCH_LENGTH or _NO_TEXT.search(text) or not words(text):
        raise _invalid(name, f"at least one word, and at most {SEARCH_LENGTH} characters")
    return text


def _moment(name: str, text: str) -> str:
    try:
        instant = read_due_date(text).at
    except ValueError:
        raise _invalid(
            name, "a day as YYYY-MM-DD or an RFC 3339 timestamp with an offset, + sent as %2B"
        ) from None
    return instant.isoformat() if instant else ""


def any_text(_: str, text: str) -> str:
    """Read what is checked later."""
    return text


def _allowed(name: str) -> tuple[str, ...]:
    return get_args(TaskQuery.model_fields[name].annotation)


_READERS: Readers = {
    "status": _one_of(*_allowed("status")),
    "sort": _one_of(*_allowed("sort")),
    "order": _one_of("asc", "desc"),
    "limit": number_to(MAXIMUM_LIMIT),
    "cursor": any_text,
    "count": _count,
    "q": _search,
    "priority": _one_of(*PRIORITIES, "none"),
    "due": _one_of("none"),
    "due_from": _moment,
    "due_before": _moment,
}


def _invalid(name: str, allowed: str) -> InvalidParameter:
    return InvalidParameter(f"Invalid {name} value. Must be {allowed}")


def _or(values: tuple[str, ...]) -> str:
    return f"{', '.join(values[:-1])} or {values[-1]}" if len(values) > 1 else values[0]


def _and(values: Mapping[str, object]) -> str:
    *first, last = values
    return f"{', '.join(first)} and {last}"
