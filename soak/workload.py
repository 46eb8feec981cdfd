"""The requests of `make load`, encoded in advance. About two reads come with each write."""

import json
import random
import time
from collections.abc import Iterator
from itertools import cycle

import psycopg

from support.service import token

USERS = 100
TASKS = 20
"""Tasks per user at the start."""

MESSAGES = 20_000
SHARES = {"get": 40, "list": 20, "create": 20, "update": 10, "complete": 10}
"""The share of each operation, in percent."""


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


def messages() -> Iterator[bytes]:
    """Repeat the encoded requests forever, in a random order that is the same in each run."""
    chosen = random.Random(1)  # noqa: S311  no secret
    tokens = [token(f"user{n}", exp=int(time.time()) + 86_400) for n in range(USERS)]
    kinds = chosen.choices(list(SHARES), list(SHARES.values()), k=MESSAGES)
    return cycle([_message(kind, number, chosen, tokens) for number, kind in enumerate(kinds)])


def _message(kind: str, number: int, chosen: random.Random, tokens: list[str]) -> bytes:
    """Encode one request. Users who create tasks never list them, so lists stay the same size."""
    user = chosen.randrange(USERS // 2)
    task = f"/api/tasks/{1 + user + USERS * chosen.randrange(TASKS)}"
    if kind == "list":
        return _encode("GET", "/api/tasks", tokens[user])
    if kind == "create":
        return _encode("POST", "/api/tasks", tokens[user + USERS // 2], {"title": f"new {number}"})
    if kind == "update":
        return _encode("PUT", task, tokens[user], {"description": f"changed {number}"})
    if kind == "complete":
        return _encode("PATCH", f"{task}/complete", tokens[user])
    return _encode("GET", task, tokens[user])


def _encode(verb: str, path: str, bearer: str, body: dict[str, str] | None = None) -> bytes:
    head = f"{verb} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {bearer}\r\n"
    if body is None:
        return f"{head}\r\n".encode()
    text = json.dumps(body)
    head += f"Content-Type: application/json\r\nContent-Length: {len(text)}\r\n"
    return f"{head}\r\n{text}".encode()
