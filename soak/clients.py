"""Clients that act like users, at random, and compare every answer with what they know."""

import asyncio
import random
import time
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from http import HTTPStatus
from itertools import count
from typing import Any
from urllib.parse import quote

import httpx2

from soak.ledger import Fate, Ledger, Register, Task
from support.service import token
from todo_api.tasks.fields import BY_NAME

SHAPE = "every answer has the shape of the contract"
DEADLINE = "every request gets an answer in time"
OWN = "users see only their own tasks"
KEPT = "every answer agrees with earlier acknowledgements"

UNKNOWN = {HTTPStatus.INTERNAL_SERVER_ERROR, HTTPStatus.SERVICE_UNAVAILABLE}
TASKS_AT_MOST = 40
"""The most tasks of one client, so that lists stay short."""

TOKEN_USES = 20
"""A client uses a token for this many requests."""


class Connections:
    """HTTP connections to the running copy of the program."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._clients: list[httpx2.AsyncClient] = []

    def lead_to(self, address: str) -> None:
        """Send all later requests to this address."""
        limits = httpx2.Limits(max_connections=None, keepalive_expiry=1)
        client = httpx2.AsyncClient(
            base_url=address, timeout=self._seconds, trust_env=False, limits=limits
        )
        self._clients.append(client)

    @property
    def client(self) -> httpx2.AsyncClient:
        """The client for the newest address."""
        return self._clients[-1]

    async def close(self) -> None:
        """Close all clients."""
        for client in self._clients:
            await client.aclose()


class Client:
    """One of a user's clients. Only this client writes to the tasks that it created."""

    def __init__(
        self, name: str, user: str, connections: Connections, ledger: Ledger, seed: str
    ) -> None:
        self._name = name
        self._user = user
        self._connections = connections
        self._ledger = ledger
        self._random = random.Random(seed)  # noqa: S311  no secret
        self._numbers = count()
        self._tasks: list[Task] = []
        self._gone: set[int] = set()
        self._uses = 0
        self.successes = 0

    async def run(self, stopped: Callable[[], bool]) -> None:
        """Send random requests, one after another."""
        weights = {
            self._create: 25,
            self._read: 20,
            self._list: 10,
            self._change: 20,
            self._complete: 10,
            self._delete: 10,
            self._trespass: 3,
            self._be_refused: 2,
        }
        while not stopped():
            operation = self._random.choices(list(weights), list(weights.values()))[0]
            await operation()
            await asyncio.sleep(self._random.uniform(0, 0.05))

    async def _create(self) -> None:
        if len(self._tasks) >= TASKS_AT_MOST:
            return
        title = f"{self._name} {next(self._numbers)}"
        fate, answer = await self._ask("POST", "", {201}, json={"title": title})
        self._ledger.titles[title] = fate
        if answer is None:
            return
        made = answer.json()
        task = Task(
            id=made["id"],
            owner=self._user,
            title=title,
            description=Register(None),
            completed=Register(known=False),
            updated_at=made["updated_at"],
            version=made["version"],
        )
        self._ledger.tasks[title] = task
        self._tasks.append(task)
        self._compare(task, made)

    async def _read(self) -> None:
        if task := self._some_task():
            _, answer = await self._ask("GET", f"/{task.id}", self._statuses(task, 200))
            self._take(task, answer)

    async def _list(self) -> None:
        _, answer = await self._ask("GET", "", {200})
        if answer is None:
            return
        shown = {task["id"]: task for task in answer.json()}
        if len(shown) != len(answer.json()):
            self._ledger.violated(KEPT, "a list contains a task twice")
        for number in self._gone & shown.keys():
            self._ledger.violated(KEPT, f"task {number} is in a list after its deletion")
        for task in self._tasks:
            if task.id in shown:
                self._compare(task, shown[task.id])
            elif task.deleted is Fate.REFUSED:
                self._ledger.violated(KEPT, f"task {task.id} is missing from a list")

    async def _change(self) -> None:
        if task := self._some_task():
            text = f"{self._name} wrote {next(self._numbers)}"
            fate, answer = await self._ask(
                "PUT", f"/{task.id}", self._statuses(task, 200), json={"description": text}
            )
            task.description.write(text, fate)
            self._take(task, answer)

    async def _complete(self) -> None:
        if task := self._some_task():
            completed = self._random.random() < 0.5  # noqa: PLR2004  as often as not
            fate, answer = await self._ask(
                "PATCH",
                f"/{task.id}/complete",
                self._statuses(task, 200),
                json={"completed": completed},
            )
            task.completed.write(completed, fate)
            self._take(task, answer)

    async def _delete(self) -> None:
        if task := self._some_task():
            fate, answer = await self._ask("DELETE", f"/{task.id}", self._statuses(task, 204))
            if fate is Fate.UNKNOWN:
                task.deleted = fate
            elif answer is not None:
                self._forget(task)

    async def _trespass(self) -> None:
        """Request another user's task, by its id or by its path."""
        others = [task for task in self._ledger.tasks.values() if task.owner != self._user]
        if not others:
            return
        task = self._random.choice(others)
        verb = self._random.choice(("GET", "PUT", "DELETE"))
        body = {"json": {"title": "not mine"}} if verb == "PUT" else {}
        if self._random.random() < 0.5:  # noqa: PLR2004  as often as not
            await self._ask(verb, f"/api/tasks/{task.id}", {404}, **body)
        else:
            await self._ask(
                verb, f"/api/{quote(task.owner, safe='')}/tasks/{task.id}", {403}, **body
            )

    async def _be_refused(self) -> None:
        """Send a creation that the service must refuse."""
        title = f"{self._name} {next(self._numbers)}"
        status, options = self._random.choice(
            [
                (401, {"headers": {"Authorization": "Bearer nobody"}}),
                (401, {"headers": self._bearer(exp=int(time.time()) - 3600)}),
                (400, {"json": {"title": title, "priority": "none"}}),
            ]
        )
        fate, _ = await self._ask("POST", "", {status}, **{"json": {"title": title}, **options})
        self._ledger.titles[title] = fate

    def _some_task(self) -> Task | None:
        return self._random.choice(self._tasks) if self._tasks else None

    def _statuses(self, task: Task, status: int) -> AbstractSet[int]:
        """Return the statuses that agree with the known state of a task."""
        return {status} if task.deleted is Fate.REFUSED else {status, 404}

    def _take(self, task: Task, answer: httpx2.Response | None) -> None:
        """Update the ledger from an answer about a task."""
        if answer is None:
            return
        if answer.status_code == HTTPStatus.NOT_FOUND:
            self._forget(task)
        else:
            self._compare(task, answer.json())

    def _forget(self, task: Task) -> None:
        task.deleted = Fate.DONE
        self._gone.add(task.id)
        self._tasks.remove(task)

    def _compare(self, task: Task, shown: dict[str, Any]) -> None:
        if wrong := task.contradiction(shown):
            self._ledger.violated(KEPT, wrong)

    async def _ask(
        self, verb: str, path: str, statuses: AbstractSet[int], **options: Any
    ) -> tuple[Fate, httpx2.Response | None]:
        """Send a request. Returns the answer only if its status is one of `statuses`.

        Args:
            verb: the method.
            path: the part after the path of the list, or a whole path.
            statuses: the allowed statuses besides 500 and 503.
            options: the body, and headers that replace the defaults.
        """
        options = {"headers": self._bearer(), **options}
        family = self._random.choice(("/api/tasks", f"/api/{quote(self._user, safe='')}/tasks"))
        target = path if path.startswith("/api/") else family + path
        started = time.monotonic()
        fate, answer = await self._fate(verb, target, statuses, options)
        self._ledger.slowest = max(self._ledger.slowest, time.monotonic() - started)
        self._ledger.count(fate)
        return fate, answer

    async def _fate(
        self, verb: str, target: str, statuses: AbstractSet[int], options: dict[str, Any]
    ) -> tuple[Fate, httpx2.Response | None]:
        try:
            answer = await self._connections.client.request(verb, target, **options)
        except httpx2.ConnectError:
            return Fate.NOT_SENT, None
        except httpx2.TimeoutException:
            self._ledger.violated(DEADLINE, f"{verb} {target}: no answer")
            return Fate.UNKNOWN, None
        except httpx2.TransportError:
            return Fate.UNKNOWN, None
        if wrong := misshapen(answer, self._user):
            self._ledger.violated(OWN if wrong == OWN else SHAPE, f"{verb} {target}: {wrong}")
        if answer.status_code in UNKNOWN:
            return Fate.UNKNOWN, None
        if answer.status_code not in statuses:
            self._ledger.violated(KEPT, f"{verb} {target}: {answer.status_code} {answer.text:.200}")
            return Fate.UNKNOWN, None
        self.successes += 1
        return Fate.DONE if answer.is_success else Fate.REFUSED, answer

    def _bearer(self, **claims: Any) -> dict[str, str]:
        """Return the authorization header, with a new token from time to time."""
        self._uses += 1
        number = f"{self._name} {self._uses // TOKEN_USES}"
        return {"Authorization": f"Bearer {token(self._user, jti=number, **claims)}"}


def misshapen(answer: httpx2.Response, user: str) -> str | None:
    """Return what is wrong with the shape or the owner of an answer, or None."""
    if not answer.headers.get("x-request-id"):
        return "X-Request-ID is missing"
    if answer.status_code == HTTPStatus.NO_CONTENT:
        return "a 204 has a body" if answer.content else None
    if answer.headers.get("content-type") != "application/json":
        return f"{answer.status_code} is not JSON"
    body = answer.json()
    if answer.is_error:
        return _misshapen_error(answer, body)
    tasks = body if isinstance(body, list) else [body]
    if any(task["user_id"] != user for task in tasks):
        return OWN
    return None if all(set(task) == set(BY_NAME) for task in tasks) else "a task has other fields"


def _misshapen_error(answer: httpx2.Response, body: dict[str, Any]) -> str | None:
    if not body.get("error") or not {"detail", "code"} <= set(body):
        return f"{answer.status_code} says {answer.text:.200}"
    if answer.status_code in UNKNOWN and answer.headers.get("retry-after") != "1":
        return f"{answer.status_code} without Retry-After"
    return None
