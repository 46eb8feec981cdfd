"""The requests of `make load`, encoded in advance. About two reads come with each write."""

import json
import random
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import psycopg

from support.service import token

USERS = 100
TASKS = 20
"""Tasks per user at the start."""

MESSAGES = 20_000
SHARES = {
    "get": 38,
    "list": 14,
    "list if changed": 6,
    "create": 15,
    "create with key": 4,
    "batch": 1,
    "update": 7,
    "update if unchanged": 5,
    "complete": 10,
}
"""The share of each operation, in percent."""

BATCH = 5
"""Creations in a batch."""


@dataclass(frozen=True, slots=True)
class Message:
    """A request, encoded except for the tag that it sends."""

    head: bytes
    body: bytes = b""
    about: str = ""
    """The task or the list whose tag the answer has."""
    condition: bytes = b""
    """The header field that sends the latest tag, if there is one."""
    creates: int = 0
    """The tasks that a success creates."""

    def encoded(self, tags: Mapping[str, bytes]) -> bytes:
        """Return the whole request. Before the first answer there is no tag to send."""
        tag = tags.get(self.about) if self.condition else None
        if tag is None:
            return b"%b\r\n%b" % (self.head, self.body)
        return b"%b%b: %b\r\n\r\n%b" % (self.head, self.condition, tag, self.body)


def seed(url: str) -> None:
    """Insert the users and tasks. User n owns every hundredth task, starting with n + 1."""
    with psycopg.connect(url, autocommit=True) as sql:
        sql.execute(
            "INSERT INTO users (id, version)"
            " SELECT 'user' || n, 1 FROM generate_series(0, %s) AS n",
            [USERS - 1],
        )
        sql.execute(
            "INSERT INTO tasks (user_id, title, version) SELECT 'user' || n %% %s, 'seed ' || n, 1"
            " FROM generate_series(0, %s) AS n ORDER BY n",
            [USERS, USERS * TASKS - 1],
        )
        sql.execute("VACUUM ANALYZE")


def messages() -> Iterator[Message]:
    """Repeat the encoded requests forever, in a random order that is the same in each run."""
    chosen = random.Random(1)  # noqa: S311  no secret
    tokens = [token(f"user{n}", exp=int(time.time()) + 86_400) for n in range(USERS)]
    kinds = chosen.choices(list(SHARES), list(SHARES.values()), k=MESSAGES)
    made = [_message(kind, number, chosen, tokens) for number, kind in enumerate(kinds)]
    keyed = [number for number, kind in enumerate(kinds) if kind == "create with key"]
    for first, repeat in zip(keyed[::2], keyed[1::2], strict=False):
        made[repeat] = made[first]
    return cycle(made)


def _message(kind: str, number: int, chosen: random.Random, tokens: list[str]) -> Message:
    """Encode one request. Users who create tasks never list them, so lists stay the same size."""
    user = chosen.randrange(USERS // 2)
    if kind in {"create", "create with key", "batch"}:
        return _creation(kind, number, tokens[user + USERS // 2])
    task = f"/api/tasks/{1 + user + USERS * chosen.randrange(TASKS)}"
    is_list = kind in {"list", "list if changed"}
    path, about = ("/api/tasks", f"list of {user}") if is_list else (task, task)
    changed = {"description": f"changed {number}"}
    verb, end, body, condition = {
        "get": ("GET", "", None, b""),
        "list": ("GET", "", None, b""),
        "list if changed": ("GET", "", None, b"If-None-Match"),
        "update": ("PUT", "", changed, b""),
        "update if unchanged": ("PUT", "", changed, b"If-Match"),
        "complete": ("PATCH", "/complete", None, b""),
    }[kind]
    return _request(verb, path + end, tokens[user], body, about=about, condition=condition)


def _creation(kind: str, number: int, bearer: str) -> Message:
    """Encode the creation of one task, or of several."""
    if kind == "batch":
        tasks = [{"title": f"new {number}.{each}"} for each in range(BATCH)]
        batch = {"operations": [{"op": "create", "task": task} for task in tasks]}
        return _request("POST", "/api/tasks/batch", bearer, batch, creates=BATCH)
    field = f"Idempotency-Key: {number}\r\n" if kind == "create with key" else ""
    body = {"title": f"new {number}"}
    return _request("POST", "/api/tasks", bearer, body, field=field, creates=1)


def _request(  # noqa: PLR0913  they come by name
    verb: str,
    path: str,
    bearer: str,
    body: dict[str, Any] | None = None,
    *,
    field: str = "",
    about: str = "",
    condition: bytes = b"",
    creates: int = 0,
) -> Message:
    head = f"{verb} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {bearer}\r\n{field}"
    text = "" if body is None else json.dumps(body)
    if text:
        head += f"Content-Type: application/json\r\nContent-Length: {len(text)}\r\n"
    return Message(head.encode(), text.encode(), about, condition, creates)
