"""Requests to the running program, each with its outcome, and with checks of every answer."""

import asyncio
import random
import time
from collections import deque
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, NamedTuple
from urllib.parse import quote

import httpx2

from soak.ledger import Fate, Ledger
from support.service import token
from todo_api.tasks.fields import BY_NAME

SHAPE = "every answer has the shape of the contract"
DEADLINE = "every request gets an answer in time"
OWN = "users see only their own tasks"
KEPT = "every answer agrees with earlier acknowledgements"
REPEATED = "a repeat with the same key gets the same answer"

UNKNOWN = {HTTPStatus.INTERNAL_SERVER_ERROR, HTTPStatus.SERVICE_UNAVAILABLE}
TOKEN_USES = 20
"""A client uses a token for this many requests."""

ANSWERS = 20
"""A client can repeat this many of its latest acknowledged writes."""


class Connections:
    """HTTP connections to the running copy of the program."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._clients: list[httpx2.AsyncClient] = []

    def lead_to(self, address: str) -> None:
        """Send all later requests to this address."""
        limits = httpx2.Limits(max_connections=None, keepalive_expiry=1)
        client = httpx2.AsyncClient(
            base_url=address, timeout=self.seconds, trust_env=False, limits=limits
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


@dataclass(frozen=True)
class Request:
    """A request, which can be sent several times."""

    verb: str
    target: str
    statuses: AbstractSet[int]
    """The allowed statuses besides 500 and 503."""
    headers: dict[str, str] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    """The body, and a timeout of its own."""

    def __str__(self) -> str:
        return f"{self.verb} {self.target}"


class Outcome(NamedTuple):
    """The outcome of a request, and its answer if that has an allowed status."""

    fate: Fate
    answer: httpx2.Response | None = None
    may_be_repeated: bool = False
    """Whether the answer is lost, so that a client with a key sends the request again."""


class Caller:
    """Sends requests of one user, one after another, and records their outcomes."""

    def __init__(
        self, name: str, user: str, connections: Connections, ledger: Ledger, seed: str
    ) -> None:
        self._name = name
        self._user = user
        self._connections = connections
        self._ledger = ledger
        self._random = random.Random(seed)  # noqa: S311  no secret
        self._answered: deque[tuple[Request, httpx2.Response]] = deque(maxlen=ANSWERS)
        self._uses = 0
        self._stopped: Callable[[], bool] = lambda: False
        self.successes = 0

    def _chance(self, probability: float) -> bool:
        return self._random.random() < probability

    async def _ask(
        self,
        verb: str,
        path: str,
        statuses: AbstractSet[int],
        headers: dict[str, str] | None = None,
        **options: Any,
    ) -> tuple[Fate, httpx2.Response | None]:
        """Send a request. Returns the answer only if its status is one of `statuses`.

        A request with an idempotency key is repeated until it has an answer.

        Args:
            verb: the method.
            path: the part after the path of the list, or a whole path.
            statuses: the allowed statuses besides 500 and 503.
            headers: more header fields, or others than the defaults.
            options: the body, and a timeout of its own.
        """
        family = self._random.choice(("/api/tasks", f"/api/{quote(self._user, safe='')}/tasks"))
        target = path if path.startswith("/api/") else family + path
        request = Request(verb, target, statuses, headers or {}, options)
        if "Idempotency-Key" in request.headers:
            return await self._until_answered(request)
        outcome = await self._send(request)
        return outcome.fate, outcome.answer

    async def _until_answered(self, request: Request) -> tuple[Fate, httpx2.Response | None]:
        """Repeat a request with a key while its answer is lost, and sometimes after it has come."""
        lost = None
        while True:
            outcome = await self._send_some(request, unsent=lost is not Fate.UNKNOWN)
            if not outcome.may_be_repeated:
                break
            if lost is not Fate.UNKNOWN:
                lost = outcome.fate
            if self._stopped():
                return lost, None
            self._ledger.events["repeats of lost answers"] += 1
            await asyncio.sleep(self._random.uniform(0, 0.1))
        if outcome.fate is Fate.DONE and outcome.answer is not None:
            self._answered.append((request, outcome.answer))
            if self._chance(0.2):
                await self._repeat(request, outcome.answer)
        return outcome.fate, outcome.answer

    async def _send_some(self, request: Request, *, unsent: bool) -> Outcome:
        """Send a request with a key, sometimes twice at once, sometimes without patience.

        `unsent` says that no earlier attempt can have been carried out.
        """
        if self._chance(0.1):
            return await self._hang_up(request)
        if self._chance(0.1):
            self._ledger.events["twins"] += 1
            both = await asyncio.gather(self._send(request), self._send(request))
            answers = [outcome.answer for outcome in both if outcome.answer is not None]
            if answers:
                self._compare_answers(request, answers[0], answers[-1])
            return min(both, key=lambda it: (it.answer is None, it.fate is not Fate.UNKNOWN))
        outcome = await self._send(request)
        if outcome.answer is not None and is_replayed(outcome.answer):
            self._ledger.events["lost answers found again"] += 1
            if unsent:
                self._ledger.violated(REPEATED, f"{request}: replayed at the first attempt")
        return outcome

    async def _hang_up(self, request: Request) -> Outcome:
        """Send a request, and close the connection soon, with or without an answer."""
        try:
            async with asyncio.timeout(self._random.uniform(0, 0.02)):
                return await self._send(request)
        except TimeoutError:
            self._ledger.events["hang-ups"] += 1
            return Outcome(Fate.UNKNOWN, may_be_repeated=True)

    async def _repeat_earlier(self) -> None:
        """Repeat an acknowledged write, whatever has happened since."""
        if self._answered:
            await self._repeat(*self._random.choice(self._answered))

    async def _repeat(self, request: Request, first: httpx2.Response) -> None:
        outcome = await self._send(request)
        if outcome.answer is None:
            return
        self._ledger.events["repeats of acknowledged writes"] += 1
        self._compare_answers(request, first, outcome.answer)
        if not is_replayed(outcome.answer):
            self._ledger.violated(REPEATED, f"{request}: a repeat was carried out")

    def _compare_answers(
        self, request: Request, one: httpx2.Response, other: httpx2.Response
    ) -> None:
        """Compare the answers to two requests with the same key."""
        if remembered(one) != remembered(other):
            self._ledger.violated(
                REPEATED, f"{request}: {remembered(one)!r:.200} and then {remembered(other)!r:.200}"
            )

    async def _send(self, request: Request) -> Outcome:
        started = time.monotonic()
        outcome = await self._outcome(request)
        self._ledger.slowest = max(self._ledger.slowest, time.monotonic() - started)
        self._ledger.count(outcome.fate)
        return outcome

    async def _outcome(self, request: Request) -> Outcome:
        headers = self._bearer() | request.headers
        try:
            answer = await self._connections.client.request(
                request.verb, request.target, headers=headers, **request.options
            )
        except httpx2.ConnectError:
            return Outcome(Fate.NOT_SENT, may_be_repeated=True)
        except httpx2.TimeoutException:
            self._ledger.violated(DEADLINE, f"{request}: no answer")
            return Outcome(Fate.UNKNOWN, may_be_repeated=True)
        except httpx2.TransportError:
            return Outcome(Fate.UNKNOWN, may_be_repeated=True)
        if wrong := misshapen(answer, self._user):
            self._ledger.violated(OWN if wrong == OWN else SHAPE, f"{request}: {wrong}")
        if wrong := wrong_tag(request, answer):
            self._ledger.violated(KEPT, f"{request}: {wrong}")
        if answer.status_code in UNKNOWN:
            return Outcome(Fate.UNKNOWN, may_be_repeated=True)
        if answer.status_code not in request.statuses:
            self._ledger.violated(KEPT, f"{request}: {answer.status_code} {answer.text:.200}")
            return Outcome(Fate.UNKNOWN)
        self.successes += 1
        self._ledger.events[f"{answer.status_code}"] += 1
        return Outcome(Fate.REFUSED if answer.is_error else Fate.DONE, answer)

    def _bearer(self, **claims: Any) -> dict[str, str]:
        """Return the authorization header, with a new token from time to time."""
        self._uses += 1
        number = f"{self._name} {self._uses // TOKEN_USES}"
        return {"Authorization": f"Bearer {token(self._user, jti=number, **claims)}"}


def is_replayed(answer: httpx2.Response) -> bool:
    """Return whether the answer is the stored one of an earlier request."""
    return answer.headers.get("idempotency-replayed") == "true"


def remembered(answer: httpx2.Response) -> tuple[object, ...]:
    """Return what the service remembers of the answer to a write: of a refusal, nothing."""
    if answer.is_error:
        return (answer.status_code,)
    headers = (answer.headers.get(name) for name in ("etag", "location"))
    return answer.status_code, answer.content, *headers


def wrong_tag(request: Request, answer: httpx2.Response) -> str | None:
    """Return what is wrong with the answer to a conditional request, or None."""
    sent, shown = request.headers.get("If-None-Match"), answer.headers.get("etag")
    if sent is None or answer.is_error:
        return None
    if (answer.status_code == HTTPStatus.NOT_MODIFIED) == (sent == shown):
        return None
    return f"{answer.status_code} with the tag {shown} for If-None-Match {sent}"


def misshapen(answer: httpx2.Response, user: str) -> str | None:
    """Return what is wrong with the shape or the owner of an answer, or None."""
    if not answer.headers.get("x-request-id"):
        return "X-Request-ID is missing"
    if answer.status_code in {HTTPStatus.NO_CONTENT, HTTPStatus.NOT_MODIFIED}:
        return f"a {answer.status_code} has a body" if answer.content else None
    if answer.headers.get("content-type") != "application/json":
        return f"{answer.status_code} is not JSON"
    body = answer.json()
    if answer.is_error:
        return _misshapen_error(answer, body)
    tasks = tasks_of(body)
    if any(task["user_id"] != user for task in tasks):
        return OWN
    return None if all(set(task) == set(BY_NAME) for task in tasks) else "a task has other fields"


def tasks_of(body: Any) -> list[dict[str, Any]]:
    """Return the tasks in an answer: a list, a batch's results, changes or one task."""
    if isinstance(body, list):
        return body
    entries = body.get("results", body.get("changes"))
    if entries is None:
        return [body]
    return [entry["task"] for entry in entries if "task" in entry]


def _misshapen_error(answer: httpx2.Response, body: dict[str, Any]) -> str | None:
    if not body.get("error") or not {"detail", "code"} <= set(body):
        return f"{answer.status_code} says {answer.text:.200}"
    if answer.status_code in UNKNOWN and answer.headers.get("retry-after") != "1":
        return f"{answer.status_code} without Retry-After"
    return None
