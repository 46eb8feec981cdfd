"""Clients that act like users, at random, and compare every answer with what they know."""

import asyncio
import time
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from hashlib import blake2b
from http import HTTPStatus
from itertools import count
from typing import Any
from urllib.parse import quote

import httpx2

from soak.calls import KEPT, Caller, Connections
from soak.ledger import Fate, Ledger, Task, Text, Write
from todo_api.tasks.fields import MAXIMUM_ID

TASKS_AT_MOST = 40
"""The most tasks of one client, so that lists stay short."""

Statuses = AbstractSet[int]
Fields = dict[str, object]


@dataclass(frozen=True)
class Step:
    """One operation of a batch, and what it does if the batch succeeds."""

    operation: dict[str, Any]
    title: str | None = None
    """The title of the task that it creates."""
    task: Task | None = None
    """The task that it writes to."""
    write: Write | None = None
    status: int | None = None
    """The error with which it fails on purpose."""

    @property
    def may_miss(self) -> bool:
        """Whether the task may have another version than the operation demands."""
        if self.task is None or self.write is None or self.write.version is None:
            return False
        return not self.task.is_certain


class Client(Caller):
    """One of a user's clients. Only this client writes to the tasks that it created."""

    def __init__(
        self, name: str, user: str, connections: Connections, ledger: Ledger, seed: str
    ) -> None:
        super().__init__(name, user, connections, ledger, seed)
        self._numbers = count()
        self._tasks: list[Task] = []
        self._gone: set[int] = set()
        self._list_seen: tuple[str, list[dict[str, Any]]] | None = None

    async def run(self, stopped: Callable[[], bool]) -> None:
        """Send random requests, one after another."""
        self._stopped = stopped
        weights = {
            self._create: 20,
            self._read: 15,
            self._list: 12,
            self._change: 30,
            self._delete: 8,
            self._send_batch: 12,
            self._repeat_earlier: 8,
            self._trespass: 3,
            self._be_refused: 4,
        }
        while not stopped():
            operation = self._random.choices(list(weights), list(weights.values()))[0]
            await operation()
            await asyncio.sleep(self._random.uniform(0, 0.05))

    async def _create(self) -> None:
        if len(self._tasks) >= TASKS_AT_MOST:
            return
        title, headers = self._new_name(), self._maybe_key()
        fate, answer = await self._ask("POST", "", {201}, headers, json={"title": title})
        self._record_creation(title, fate, is_keyed="Idempotency-Key" in headers)
        if answer is not None:
            self._add(title, answer.json())

    def _record_creation(self, title: str, fate: Fate, *, is_keyed: bool) -> None:
        self._ledger.titles[title] = fate
        if is_keyed:
            self._ledger.keyed.add(title)

    def _add(self, title: str, made: dict[str, Any]) -> None:
        """Take over a task whose creation was acknowledged."""
        task = Task(
            id=made["id"],
            owner=self._user,
            title=title,
            values={"description": None, "completed": False},
            updated_at=made["updated_at"],
            version=made["version"],
        )
        self._ledger.tasks[title] = task
        self._tasks.append(task)
        self._compare(task, made)

    async def _read(self) -> None:
        """Read a task, sometimes with the tag of its last or of an earlier version."""
        if not (task := self._some_task()):
            return
        statuses, headers = {200}, {}
        if self._chance(0.3):
            headers, statuses = self._if_none_match(task.version), {200, 304}
        elif task.former_versions and self._chance(0.3):
            headers = self._if_none_match(self._random.choice(task.former_versions))
        fate, answer = await self._ask("GET", f"/{task.id}", self._or_gone(task, statuses), headers)
        if fate is Fate.REFUSED:
            self._forget(task)
        elif answer is not None and answer.status_code != HTTPStatus.NOT_MODIFIED:
            self._compare(task, answer.json())

    @staticmethod
    def _if_none_match(version: int) -> dict[str, str]:
        return {"If-None-Match": f'"{version}"'}

    async def _list(self) -> None:
        """Read the whole list, or ask whether the last one is still true."""
        known = self._list_seen if self._chance(0.6) else None
        headers = {"If-None-Match": known[0]} if known else {}
        _, answer = await self._ask("GET", "", {200, 304} if known else {200}, headers)
        if answer is None:
            return
        if known and answer.status_code == HTTPStatus.NOT_MODIFIED:
            self._compare_list(known[1])
            return
        self._check_tag(answer)
        self._list_seen = answer.headers["etag"], answer.json()
        self._compare_list(answer.json())

    def _check_tag(self, answer: httpx2.Response) -> None:
        """Check that the tag of a list never stands for another list."""
        tag, digest = answer.headers["etag"], blake2b(answer.content, digest_size=16).digest()
        if self._ledger.lists.setdefault(tag, digest) != digest:
            self._ledger.violated(KEPT, f"two lists have the tag {tag}")

    def _compare_list(self, tasks: list[dict[str, Any]]) -> None:
        """Compare the user's list, as it is now, with the tasks of this client."""
        shown = {task["id"]: task for task in tasks}
        if len(shown) != len(tasks):
            self._ledger.violated(KEPT, "a list contains a task twice")
        for number in self._gone & shown.keys():
            self._ledger.violated(KEPT, f"task {number} is in a list after its deletion")
        for task in list(self._tasks):
            if task.id in shown:
                self._compare(task, shown[task.id])
            elif task.may_be_deleted:
                self._forget(task)
            else:
                self._ledger.violated(KEPT, f"task {task.id} is missing from a list")

    async def _change(self) -> None:
        """Change one or two fields of a task, on one of the routes that can."""
        if not (task := self._some_task()):
            return
        text, completed = self._new_text(), self._chance(0.5)
        status = "complete" if completed else "incomplete"
        described: Fields = {"description": text}
        finished: Fields = {"completed": completed}
        whole: Fields = {"title": task.title, "description": text, "status": status}
        changes: list[tuple[str, str, Fields, Fields]] = [
            ("PUT", "", described, described),
            ("PATCH", "", described, described),
            ("PUT", "", whole, described | finished),
            ("PATCH", "/complete", finished, finished),
            ("PATCH", "/status", {"status": status}, finished),
        ]
        verb, path, body, values = self._random.choice(changes)
        await self._write(task, verb, path, Write(values), json=body)

    async def _delete(self) -> None:
        if task := self._some_task():
            await self._write(task, "DELETE", "", Write(None))

    async def _write(self, task: Task, verb: str, path: str, write: Write, **body: Any) -> None:
        """Send a write, often with a condition and a key, and record its outcome."""
        success = 204 if verb == "DELETE" else 200
        version, headers, statuses = self._maybe_condition(task, success)
        write.version = version
        headers |= self._maybe_key()
        fate, answer = await self._ask(
            verb, f"/{task.id}{path}", self._or_gone(task, statuses), headers, **body
        )
        self._record(task, write, fate)
        if answer is None:
            return
        if answer.status_code == HTTPStatus.NOT_FOUND:
            self._forget(task)
        elif answer.status_code == HTTPStatus.PRECONDITION_FAILED:
            self._check_refusal(task, version, answer)
        elif fate is Fate.DONE and write.values is not None:
            self._compare(task, answer.json(), write)

    def _maybe_condition(
        self, task: Task, success: int
    ) -> tuple[int | None, dict[str, str], Statuses]:
        """Choose an `If-Match` or none. Return its version, the header and the statuses."""
        chosen = self._random.random()
        if chosen < 0.4:  # noqa: PLR2004  a share
            statuses = {success} if task.is_certain else {success, 412}
            return task.version, {"If-Match": f'"{task.version}"'}, statuses
        if chosen < 0.6 and task.former_versions:  # noqa: PLR2004  a share
            stale = self._random.choice(task.former_versions)
            return stale, {"If-Match": f'"{stale}"'}, {412}
        return None, {"If-Match": "*"} if chosen > 0.95 else {}, {success}  # noqa: PLR2004  a share

    def _maybe_key(self) -> dict[str, str]:
        if self._chance(0.5):
            return {}
        return {"Idempotency-Key": f"{self._name.encode().hex()}-{next(self._numbers)}"}

    def _record(self, task: Task, write: Write, fate: Fate) -> None:
        """Record the outcome of a write to a task."""
        if write.values is None:
            if fate is Fate.DONE:
                self._forget(task)
        elif text := write.values.get("description"):
            self._ledger.texts[str(text)] = Text(task.id, fate)
        if fate is Fate.UNKNOWN and write.version in {None, task.version}:
            task.unknown.append(write)

    def _check_refusal(self, task: Task, version: int | None, answer: httpx2.Response) -> None:
        """Check the version that a 412 names: not the demanded one, and none from the past."""
        current = int(answer.headers["etag"].strip('"'))
        if current == version:
            self._ledger.violated(KEPT, f"task {task.id}: 412 for its own version {version}")
        if current < task.version or (task.is_certain and current != task.version):
            self._ledger.violated(
                KEPT, f"task {task.id}: 412 names version {current}, not {task.version}"
            )

    async def _send_batch(self) -> None:
        """Send some operations at once, sometimes with one that must fail."""
        steps = self._planned()
        failing = [number for number, step in enumerate(steps) if step.status]
        statuses: set[int] = {steps[number].status or 0 for number in failing} or {200}
        if any(step.task and step.task.may_be_deleted for step in steps):
            statuses.add(404)
        if any(step.may_miss for step in steps):
            statuses.add(412)
        headers = self._maybe_key()
        body = {"operations": [step.operation for step in steps]}
        fate, answer = await self._ask("POST", "/batch", statuses, headers, json=body)
        self._record_batch(steps, fate, is_keyed="Idempotency-Key" in headers)
        if answer is None:
            return
        if fate is Fate.DONE:
            self._take_results(steps, answer.json()["results"])
        else:
            self._take_refusal(steps, failing, answer)

    def _planned(self) -> list[Step]:
        """Choose the operations of a batch."""
        room = TASKS_AT_MOST - len(self._tasks)
        steps = [self._creation() for _ in range(min(room, self._random.randint(0, 3)))]
        some = self._random.sample(self._tasks, min(len(self._tasks), self._random.randint(0, 3)))
        steps += [self._operation_on(task) for task in some]
        self._random.shuffle(steps)
        if not steps or self._chance(0.2):
            steps.insert(self._random.randint(0, len(steps)), self._failure(some))
        return steps

    def _creation(self) -> Step:
        title = self._new_name()
        return Step({"op": "create", "task": {"title": title}}, title=title)

    def _operation_on(self, task: Task) -> Step:
        text = self._new_text()
        operations: list[tuple[Fields, Fields | None]] = [
            ({"op": "update", "task": {"description": text}}, {"description": text}),
            ({"op": "complete"}, {"completed": True}),
            ({"op": "reopen"}, {"completed": False}),
            ({"op": "delete"}, None),
        ]
        operation, values = self._random.choice(operations)
        write = Write(values)
        condition = {}
        if self._chance(0.4):
            write.version = task.version
            condition = {"if_match": task.version}
        return Step({"id": task.id, **operation, **condition}, task=task, write=write)

    def _failure(self, used: list[Task]) -> Step:
        """Choose an operation that the service must refuse, and with it the whole batch.

        It is not on a task that the batch uses, because the batch may delete that first.
        """
        choices = [
            Step({"op": "create", "task": {"title": " "}}, status=400),
            Step({"op": "complete", "id": MAXIMUM_ID}, status=404),
        ]
        stale = [
            task
            for task in self._tasks
            if task.former_versions and not task.may_be_deleted and task not in used
        ]
        if stale:
            task = self._random.choice(stale)
            version = self._random.choice(task.former_versions)
            choices.append(Step({"op": "complete", "id": task.id, "if_match": version}, status=412))
        return self._random.choice(choices)

    def _record_batch(self, steps: list[Step], fate: Fate, *, is_keyed: bool) -> None:
        """Record what a batch may have written."""
        titles = [step.title for step in steps if step.title]
        self._ledger.batches.append(titles)
        for title in titles:
            self._record_creation(title, fate, is_keyed=is_keyed)
        for step in steps:
            if step.task and step.write:
                self._record(step.task, step.write, fate)

    def _take_results(self, steps: list[Step], results: list[dict[str, Any]]) -> None:
        """Compare the results of a batch with its operations."""
        if len(results) != len(steps):
            self._ledger.violated(KEPT, f"{len(results)} results for {len(steps)} operations")
            return
        for step, result in zip(steps, results, strict=True):
            if step.title:
                self._add(step.title, result["task"])
            elif step.task and step.write and step.write.values is not None:
                self._compare(step.task, result["task"], step.write)
            elif step.task and result != {"deleted": step.task.id}:
                self._ledger.violated(KEPT, f"the result of a deletion is {result}")

    def _take_refusal(self, steps: list[Step], failing: list[int], answer: httpx2.Response) -> None:
        """Check which operation failed: the one that must, or one with an unknown outcome."""
        number = answer.json().get("operation")
        if number in failing and steps[number].status == answer.status_code:
            was_begun = answer.status_code != HTTPStatus.BAD_REQUEST
            if was_begun and any(step.title for step in steps[:number]):
                self._ledger.events["batches undone"] += 1
            return
        step = steps[number] if number in range(len(steps)) else None
        if step and step.task and step.write and not step.task.is_certain:
            if answer.status_code == HTTPStatus.NOT_FOUND:
                self._forget(step.task)
            return
        self._ledger.violated(KEPT, f"a batch failed at operation {number}: {answer.text:.200}")

    async def _trespass(self) -> None:
        """Request another user's task, by its id or by its path."""
        others = [task for task in self._ledger.tasks.values() if task.owner != self._user]
        if not others:
            return
        task = self._random.choice(others)
        verb = self._random.choice(("GET", "PUT", "DELETE"))
        body = {"json": {"title": "not mine"}} if verb == "PUT" else {}
        headers = {} if verb == "GET" else self._random.choice(({}, {"If-Match": "*"}))
        if self._chance(0.5):
            await self._ask(verb, f"/api/tasks/{task.id}", {404}, headers, **body)
        else:
            path = f"/api/{quote(task.owner, safe='')}/tasks/{task.id}"
            await self._ask(verb, path, {403}, headers, **body)

    async def _be_refused(self) -> None:
        """Send a creation that the service must refuse."""
        title = self._new_name()
        body: dict[str, Any] = {"title": title}
        expired = self._bearer(exp=int(time.time()) - 3600)
        status, headers, more = self._random.choice(
            [
                (401, {"Authorization": "Bearer nobody"}, {}),
                (401, expired, {}),
                (400, {}, {"priority": "none"}),
                (400, {"Idempotency-Key": ""}, {}),
                (422, self._used_key(), {}),
            ]
        )
        if status == HTTPStatus.UNPROCESSABLE_ENTITY and not headers:
            return
        fate, _ = await self._ask("POST", "", {status}, headers, json=body | more)
        self._ledger.titles[title] = fate

    def _used_key(self) -> dict[str, str]:
        """Return the key of another write, if there is one."""
        if not self._answered:
            return {}
        request, _ = self._random.choice(self._answered)
        return {"Idempotency-Key": request.headers["Idempotency-Key"]}

    def _new_name(self) -> str:
        return f"{self._name} {next(self._numbers)}"

    def _new_text(self) -> str:
        return f"{self._name} wrote {next(self._numbers)}"

    def _some_task(self) -> Task | None:
        return self._random.choice(self._tasks) if self._tasks else None

    @staticmethod
    def _or_gone(task: Task, statuses: Statuses) -> Statuses:
        """Return these statuses, and 404 if the task may be deleted."""
        return {*statuses, 404} if task.may_be_deleted else statuses

    def _forget(self, task: Task) -> None:
        if not task.is_deleted:
            task.is_deleted = True
            self._gone.add(task.id)
            self._tasks.remove(task)

    def _compare(self, task: Task, shown: dict[str, Any], write: Write | None = None) -> None:
        if wrong := task.contradiction(shown, *([write] if write else [])):
            self._ledger.violated(KEPT, wrong)
