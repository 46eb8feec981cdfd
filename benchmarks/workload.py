"""The requests and the output of the load generators in Python. wrk uses load.lua instead.

Uses only the standard library, because locust runs in a separate environment.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

JSON = '{"title": "Buy groceries %d", "description": "Milk and bread", "priority": "high"}'


@dataclass(frozen=True)
class Request:
    """One request to send."""

    method: str
    path: str
    headers: dict[str, str]
    body: str = ""


def requests(operation: str, tokens: str, first: str, per_user: str) -> Iterator[Request]:
    """Give requests for each user's tasks in turn. A deleted task is not requested again.

    `tokens` is a file with one token per line. User n owns the tasks first + n, + n + users, …
    """
    users = [{"Authorization": f"Bearer {token}"} for token in Path(tokens).read_text().split()]
    for step in count():
        own, user = divmod(step, len(users))
        task = int(first) + user + own % int(per_user) * len(users)
        yield _request(operation, f"/api/tasks/{task}", users[user])


def _request(operation: str, path: str, headers: dict[str, str]) -> Request:
    if operation == "list":
        return Request("GET", "/api/tasks", headers)
    if operation == "complete":
        return Request("PATCH", f"{path}/complete", headers)
    if operation in {"get", "delete"}:
        return Request(operation.upper(), path, headers)
    headers = headers | {"Content-Type": "application/json"}
    body = JSON % random.randint(1, 1_000_000)
    if operation == "create":
        return Request("POST", "/api/tasks", headers, body)
    return Request("PUT", path, headers, body)


def print_result(latencies: Sequence[float], seconds: float, failures: int) -> None:
    """Print the result in the format of load.lua. Latencies are in seconds."""
    ordered = sorted(latencies)
    p50, p99 = (ordered[len(ordered) * percent // 100] * 1e6 for percent in (50, 99))
    print(f"RESULT {len(ordered)} {seconds * 1e6:.0f} {failures} {p50:.0f} {p99:.0f}")
