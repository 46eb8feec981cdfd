"""Random requests of five users: the service must answer like a dictionary."""

from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime, timedelta, timezone
from itertools import count
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import httpx2
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    multiple,
    rule,
    run_state_machine_as_test,
)

from support.problems import problem
from support.program import Program, serving
from support.service import SECRET, token
from todo_api.tasks.fields import BODY_FIELDS
from todo_api.tasks.search import fold

Task = dict[str, Any]
runs = count(1)

USERS = ("ada", "tasks", "a/b", "é ü", "%41")
MISSING = (404, problem("task_not_found", "Task not found"))

CHANGED = (412, problem("task_changed", "The task has changed"))

MEMBERS = [field.name for field in BODY_FIELDS if field.name != "completed"]
DEFAULT_ORDER = {
    "created": "desc",
    "updated": "desc",
    "title": "asc",
    "due_date": "asc",
    "priority": "desc",
}
SORT_KEYS: dict[str, Callable[[Task], Any]] = {
    "created": lambda task: task["created_at"],
    "updated": lambda task: task["updated_at"],
    "title": lambda task: fold(task["title"]),
    "due_date": lambda task: task["due_date"],
    "priority": lambda task: (
        task["priority"] and ("low", "medium", "high").index(task["priority"]) + 1
    ),
}
SPELLINGS = {"pending": "incomplete", "completed": "complete"}


def shown(moment: datetime) -> str:
    """Return a time in the format of the answers. It sorts as text."""
    return moment.astimezone(UTC).replace(tzinfo=None).isoformat(timespec="microseconds") + "Z"


def stored(fields: Task) -> Task:
    """Return what a body says of a task, in the words of an answer."""
    values = {name: fields[name] for name in MEMBERS if name in fields}
    if "title" in values:
        values["title"] = values["title"].strip()
    if "completed" in fields:
        values["status"] = "complete" if fields["completed"] else "incomplete"
    if values.get("due_date"):
        moment = datetime.fromisoformat(values["due_date"])
        values["due_date"] = shown(moment) if moment.tzinfo else values["due_date"]
    if "status" in values:
        values["completed"] = values["status"] == "complete"
    return values


def completed_at(known: Task, values: Task, now: str) -> str | None:
    """Return when the status last became complete, after a write at `now`."""
    if values.get("status", known["status"]) == "incomplete":
        return None
    return now if known["status"] == "incomplete" else known["completed_at"]


def arranged(tasks: list[Task], status: str, sort: str, order: str) -> list[Task]:
    """Filter and sort. Nulls come last in both directions, and the id breaks ties."""
    status = SPELLINGS.get(status, status)
    key, down = SORT_KEYS[sort], order == "desc"
    chosen = sorted(
        (task for task in tasks if status in {"all", task["status"]}),
        key=lambda task: int(task["id"]),
        reverse=down,
    )
    some = [task for task in chosen if key(task) is not None]
    none = [task for task in chosen if key(task) is None]
    return sorted(some, key=key, reverse=down) + none


FEW_DATES = ("2026-05-01", "2026-05-01T02:00:00+02:00", "2026-05-01T00:00:00.000001Z")
MARGIN = timedelta(days=1)
times = st.datetimes(
    datetime.min + MARGIN,  # noqa: DTZ901  with an offset, the year must stay valid
    datetime.max - MARGIN,  # noqa: DTZ901
    timezones=st.integers(-1439, 1439).map(lambda minutes: timezone(timedelta(minutes=minutes))),
).map(datetime.isoformat)
spaces = st.sampled_from(["", " ", "\u2003\n"])
words = st.sampled_from(["a", "A", "b", "ä", "Ä", "_", "é", "É"]) | st.text(
    "abABzZäÄéÉ09 _-😀", min_size=1, max_size=255
).filter(str.strip)
descriptions = st.none() | st.text(
    st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20
)
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    # These values are for a field without a strategy of its own below.
    **{field.name: st.sampled_from([None, field.example]) for field in BODY_FIELDS},
    "title": st.tuples(spaces, words, spaces).map("".join),
    "description": descriptions,
    "status": st.sampled_from(["incomplete", "complete"]),
    "completed": st.booleans(),
    "priority": st.sampled_from([None, "low", "medium", "high"]),
    "due_date": st.none() | st.sampled_from(FEW_DATES) | st.dates().map(date.isoformat) | times,
}
ignored = st.sampled_from(
    [{}, {"id": 1, "user_id": "mallory"}, {"created_at": None, "updated_at": "1999-01-01"}]
)


def agreeing(fields: Task) -> Task:
    """Make `completed` agree with `status` if both are present."""
    if "status" in fields and "completed" in fields:
        return {**fields, "completed": fields["status"] == "complete"}
    return fields


def bodies(*required: str) -> st.SearchStrategy[Task]:
    """Return bodies with these fields, any other fields, and ignored fields."""
    optional = {name: each for name, each in FIELDS.items() if name not in required}
    known = st.fixed_dictionaries({name: FIELDS[name] for name in required}, optional=optional)
    return st.builds(lambda more, fields: {**more, **agreeing(fields)}, ignored, known)


families = st.sampled_from(["token", "user"])
users = st.integers(0, len(USERS) - 1)
strangers = st.sampled_from([0, 0, 0, 1, 2, 3, 4])
"""The distance from the owner to the sender, in the list of users. Usually the owner sends."""


class Tasks(RuleBasedStateMachine):
    """Each rule does the same to the service and the dictionary, and compares the answers."""

    made = Bundle[tuple[int, int]]("made")
    """The owner and the id of every task so far, deleted ones too."""

    program: Program
    """The running service."""

    def __init__(self) -> None:
        super().__init__()
        run = next(runs)
        self.users = [USERS[0] + str(run), *(f"{name} {run}" for name in USERS[1:])]
        self.clients = [self.program.client(token(user)) for user in self.users]
        self.tasks: list[dict[int, Task]] = [{} for _ in self.users]
        self.versions = [0 for _ in self.users]
        self.copies: list[dict[int, Task]] = [{} for _ in self.users]
        """What followers of the feed have."""
        self.cursors = ["" for _ in self.users]

    def teardown(self) -> None:
        """At the end, check every list."""
        for user, client in enumerate(self.clients):
            self.check_list(user, "token", {})
            client.close()

    def path(self, user: int, family: str, rest: str = "") -> str:
        """Return the path of a user's tasks, or of one of them."""
        scope = f"/{quote(self.users[user], safe='')}" if family == "user" else ""
        return f"/api{scope}/tasks{rest}"

    def ask(self, user: int, verb: str, path: str, body: object = None) -> httpx2.Response:
        """Send a request, without a body if it is None."""
        return self.clients[user].request(verb, path, json=body)

    def check_changed(self, user: int, task_id: int, values: Task, answer: httpx2.Response) -> None:
        """Change the task in the dictionary, and check that the answer shows the same task."""
        known = self.tasks[user].get(task_id)
        if known is None:
            assert (answer.status_code, answer.json()) == MISSING
            return
        assert answer.status_code == 200, answer.text
        task = answer.json()
        if {**known, **values} == known:
            assert task == known
            return
        assert task["updated_at"] > known["updated_at"]
        self.check_version(user, task)
        given = {name: task[name] for name in ("updated_at", "completed_at", "version")}
        assert given["completed_at"] == completed_at(known, values, task["updated_at"])
        self.tasks[user][task_id] = {**known, **values, **given}
        assert task == self.tasks[user][task_id]

    def check_version(self, user: int, task: Task) -> None:
        """Check that a write's version is higher than all earlier versions of the user."""
        assert task["version"] > self.versions[user]
        self.versions[user] = task["version"]

    def check_list(self, user: int, family: str, query: dict[str, str]) -> None:
        """Check that a list has the right tasks in the right order."""
        answer = self.clients[user].get(self.path(user, family), params=query)
        sort = query.get("sort", "created")
        order = query.get("order", DEFAULT_ORDER[sort])
        tasks = list(self.tasks[user].values())
        expected = arranged(tasks, query.get("status", "all"), sort, order)
        assert (answer.status_code, answer.json()) == (200, expected)

    @rule(target=made, user=users, family=families, body=bodies("title"))
    def create(self, user: int, family: str, body: Task) -> tuple[int, int]:
        """POST a task."""
        answer = self.ask(user, "POST", self.path(user, family), body)
        assert answer.status_code == 201, answer.text
        task = answer.json()
        given = ("id", "created_at", "updated_at", "version")
        set_here = {name: task[name] for name in given}
        expected = {
            **dict.fromkeys(MEMBERS),
            "status": "incomplete",
            "completed": False,
            "user_id": self.users[user],
            "completed_at": task["created_at"] if task["completed"] else None,
            **stored(body),
            **set_here,
        }
        assert task == expected
        assert answer.headers["location"] == self.path(user, family, f"/{task['id']}")
        assert not any(task["id"] in tasks for tasks in self.tasks)
        self.check_version(user, task)
        self.tasks[user][task["id"]] = task
        return user, task["id"]

    @rule(target=made, user=users, body=bodies("title", "priority", "due_date"))
    def create_alike(self, user: int, body: Task) -> Any:
        """POST the same task twice, so that sorting has a tie to break."""
        return multiple(self.create(user, "token", body), self.create(user, "user", body))

    @rule(task=made, stranger=strangers, family=families)
    def show(self, task: tuple[int, int], stranger: int, family: str) -> None:
        """GET one task."""
        user, task_id = (task[0] + stranger) % len(USERS), task[1]
        answer = self.ask(user, "GET", self.path(user, family, f"/{task_id}"))
        known = self.tasks[user].get(task_id)
        expected = MISSING if known is None else (200, known)
        assert (answer.status_code, answer.json()) == expected

    @rule(
        user=users,
        family=families,
        query=st.fixed_dictionaries(
            {},
            optional={
                "status": st.sampled_from(["all", "incomplete", "complete", *SPELLINGS]),
                "sort": st.sampled_from([*SORT_KEYS]),
                "order": st.sampled_from(["asc", "desc"]),
            },
        ),
    )
    def show_all(self, user: int, family: str, query: dict[str, str]) -> None:
        """GET all tasks, filtered and sorted."""
        self.check_list(user, family, query)

    @rule(
        task=made,
        stranger=strangers,
        family=families,
        verb=st.sampled_from(["PUT", "PATCH"]),
        body=st.sampled_from([*FIELDS]).flatmap(bodies),
    )
    def change(
        self, task: tuple[int, int], stranger: int, family: str, verb: str, body: Task
    ) -> None:
        """PUT or PATCH some fields."""
        user, task_id = (task[0] + stranger) % len(USERS), task[1]
        answer = self.ask(user, verb, self.path(user, family, f"/{task_id}"), body)
        self.check_changed(user, task_id, stored(body), answer)

    @rule(task=made, family=families)
    def send_back(self, task: tuple[int, int], family: str) -> None:
        """PUT the task as it is, so that nothing changes."""
        user, task_id = task
        body = self.tasks[user].get(task_id, {"title": "gone"})
        answer = self.ask(user, "PUT", self.path(user, family, f"/{task_id}"), body)
        self.check_changed(user, task_id, {}, answer)

    @rule(
        task=made,
        stranger=strangers,
        family=families,
        body=st.sampled_from([None, {}, {"completed": True}, {"completed": False}]),
    )
    def complete(
        self, task: tuple[int, int], stranger: int, family: str, body: Task | None
    ) -> None:
        """PATCH. Without a body, the token-scoped path toggles and the other completes the task."""
        user, task_id = (task[0] + stranger) % len(USERS), task[1]
        path = self.path(user, family, f"/{task_id}/complete")
        answer = self.ask(user, "PATCH", path, body)
        was = self.tasks[user].get(task_id, {}).get("completed")
        completed = body["completed"] if body else family == "user" or not was
        self.check_changed(user, task_id, stored({"completed": completed}), answer)

    @rule(task=made, family=families, status=FIELDS["status"])
    def set_status(self, task: tuple[int, int], family: str, status: str) -> None:
        """PATCH the status."""
        user, task_id = task
        path = self.path(user, family, f"/{task_id}/status")
        answer = self.ask(user, "PATCH", path, {"status": status})
        self.check_changed(user, task_id, stored({"status": status}), answer)

    @rule(task=made, tag=st.sampled_from(["*", "{}", '"1", {}', "W/{}", '"1"']), title=words)
    def change_if_match(self, task: tuple[int, int], tag: str, title: str) -> None:
        """PUT a title if the task has one of these tags."""
        user, task_id = task
        known = self.tasks[user].get(task_id)
        current = f'"{known["version"] if known else 2}"'
        headers = {"If-Match": tag.format(current)}
        path = self.path(user, "token", f"/{task_id}")
        answer = self.clients[user].put(path, json={"title": title}, headers=headers)
        if known and tag in {"W/{}", '"1"'}:
            assert (answer.status_code, answer.json()) == CHANGED
            assert answer.headers["etag"] == current
        else:
            self.check_changed(user, task_id, stored({"title": title}), answer)

    @rule(task=made, family=families)
    def refresh(self, task: tuple[int, int], family: str) -> None:
        """GET a task and a list again, with the tags that they have."""
        user, task_id = task
        for path in (self.path(user, family), self.path(user, family, f"/{task_id}")):
            first = self.ask(user, "GET", path)
            if first.status_code == 200:
                headers = {"If-None-Match": first.headers["etag"]}
                again = self.clients[user].get(path, headers=headers)
                assert (again.status_code, again.content) == (304, b"")

    @rule(target=made, user=users, family=families, body=bodies("title"))
    def create_with_key(self, user: int, family: str, body: Task) -> tuple[int, int]:
        """POST a task twice with one key, and another one with the same key."""
        path = self.path(user, family)
        headers = {"Idempotency-Key": f"key-{self.versions[user]}-{len(self.tasks[user])}"}
        first, again = (self.clients[user].post(path, json=body, headers=headers) for _ in range(2))
        assert first.status_code == 201, first.text
        assert (again.status_code, again.content) == (201, first.content)
        other = self.clients[user].post(path, json={**body, "title": "other"}, headers=headers)
        assert body["title"] == "other" or other.status_code == 422
        task: Task = first.json()
        self.check_version(user, task)
        self.tasks[user][task["id"]] = task
        return user, task["id"]

    @rule(task=made, stranger=strangers, family=families, title=words)
    def run_batch(self, task: tuple[int, int], stranger: int, family: str, title: str) -> None:
        """Change, complete and delete a task in one batch, after creating another one."""
        user, task_id = (task[0] + stranger) % len(USERS), task[1]
        operations = [
            {"op": "create", "task": {"title": title}},
            {"op": "update", "id": task_id, "task": {"title": title}},
            {"op": "complete", "id": task_id},
            {"op": "delete", "id": task_id},
        ]
        body = {"operations": operations}
        answer = self.ask(user, "POST", self.path(user, family, "/batch"), body)
        if self.tasks[user].pop(task_id, None) is None:
            status, expected = MISSING
            assert (answer.status_code, answer.json()) == (status, {**expected, "operation": 1})
            return
        assert answer.status_code == 200, answer.text
        created, changed, completed, deleted = answer.json()["results"]
        assert deleted == {"deleted": task_id}
        assert changed["task"]["title"] == title.strip()
        assert completed["task"]["status"] == "complete"
        self.check_version(user, created["task"])
        self.versions[user] = max(self.versions[user], completed["task"]["version"])
        self.tasks[user][created["task"]["id"]] = created["task"]

    @rule(
        task=made,
        family=families,
        limit=st.integers(1, 3),
        sort=st.sampled_from([*SORT_KEYS]),
        order=st.sampled_from(["asc", "desc"]),
        status=st.sampled_from(["all", "incomplete"]),
        filters=st.fixed_dictionaries(
            {}, optional={"priority": st.sampled_from(["high", "none"]), "due": st.just("none")}
        ),
    )
    def walk(
        self,
        task: tuple[int, int],
        family: str,
        limit: int,
        sort: str,
        order: str,
        status: str,
        filters: dict[str, str],
    ) -> None:
        """GET all pages of a list of somebody who has made tasks."""
        user = task[0]
        query = {"sort": sort, "order": order, "status": status, "limit": limit, "count": "true"}
        path: str | None = f"{self.path(user, family)}?{urlencode(query | filters)}"
        wanted = [
            each
            for each in self.tasks[user].values()
            if filters.get("priority") in {None, each["priority"] or "none"}
            and ("due" not in filters or each["due_date"] is None)
        ]
        expected = arranged(wanted, status, sort, order)
        seen: list[Task] = []
        while path:
            answer = self.ask(user, "GET", path)
            assert answer.headers["x-total-count"] == str(len(expected))
            seen += answer.json()
            assert len(seen) <= len(expected)
            link = answer.headers.get("link")
            path = link and link[1 : link.index(">")]
        assert seen == expected

    @rule(task=made, family=families, limit=st.integers(1, 5))
    def follow(self, task: tuple[int, int], family: str, limit: int) -> None:
        """Bring the copy of somebody who has made tasks up to date."""
        user = task[0]
        copy = self.copies[user]
        more = True
        while more:
            query = urlencode({"since": self.cursors[user], "limit": limit})
            path = self.path(user, family, f"/changes?{query}")
            body = self.ask(user, "GET", path.replace("since=&", "")).json()
            for change in body["changes"]:
                if "deleted" in change:
                    copy.pop(change["deleted"], None)
                else:
                    copy[change["task"]["id"]] = change["task"]
            self.cursors[user], more = body["cursor"], body["more"]
        assert copy == self.tasks[user]

    @rule(task=made, stranger=strangers, family=families)
    def delete(self, task: tuple[int, int], stranger: int, family: str) -> None:
        """DELETE one task. It stays in the bundle, so that later rules request it again."""
        user, task_id = (task[0] + stranger) % len(USERS), task[1]
        answer = self.ask(user, "DELETE", self.path(user, family, f"/{task_id}"))
        if self.tasks[user].pop(task_id, None) is None:
            assert (answer.status_code, answer.json()) == MISSING
        else:
            assert (answer.status_code, answer.content) == (204, b"")

    @rule(task=made, other=st.integers(1, len(USERS) - 1), verb=st.sampled_from(["GET", "DELETE"]))
    def trespass(self, task: tuple[int, int], other: int, verb: str) -> None:
        """Use the owner's path as another user."""
        owner, task_id = task
        path = self.path(owner, "user", f"/{task_id}")
        assert self.ask((owner + other) % len(USERS), verb, path).status_code == 403


@pytest.fixture
def program(tmp_path: Path, database_url: str) -> Iterator[Program]:
    """The running program, on a socket."""
    settings = {"BETTER_AUTH_SECRET": SECRET, "LOG_LEVEL": "warning"}
    with serving(tmp_path, DATABASE_URL=database_url, **settings) as running:
        yield running
        assert running.stop() == 0
    assert not (tmp_path / "log").read_text()


def test_service_behaves_like_a_dictionary(program: Program) -> None:
    """Random sequences of requests run on both."""

    class TasksThere(Tasks):
        pass

    TasksThere.program = program
    run_state_machine_as_test(
        TasksThere,
        settings=settings(
            max_examples=40,
            stateful_step_count=40,
            phases=[Phase.generate],  # Phase.shrink finds a shorter failure, but takes minutes
            derandomize=True,
            database=None,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )
