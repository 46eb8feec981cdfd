"""Retries after real faults: with an idempotency key, a write happens once."""

import asyncio
import threading
import uuid
from pathlib import Path
from typing import Any

import httpx2
import psycopg
import pytest

from support.http import LOCAL
from support.program import Program, serving
from support.service import SECRET, Service, bearer
from support.waiting import until

WRITES: list[tuple[str, dict[str, Any]]] = [
    ("/api/tasks", {"title": "once"}),
    ("/api/tasks/batch", {"operations": [{"op": "create", "task": {"title": "once"}}]}),
]
KILLS = 2


def titles(sql: psycopg.Connection) -> list[str]:
    return [title for (title,) in sql.execute("SELECT title FROM tasks ORDER BY id").fetchall()]


@pytest.mark.parametrize(("path", "body"), WRITES)
async def test_retry_after_a_cut_between_commit_and_answer_writes_once(
    service: Service, sql: psycopg.Connection, path: str, body: dict[str, Any]
) -> None:
    """The connection to PostgreSQL breaks when the write is stored and its answer is not read."""
    headers = {**bearer("alice"), "Idempotency-Key": str(uuid.uuid4())}
    await service.client.get("/api/tasks", headers=headers)  # connects
    service.wire.cut_answers = True
    first = await service.client.post(path, json=body, headers=headers)
    await until(lambda: service.wire.answers_cut > 0)
    service.wire.cut_answers = False
    assert (first.status_code, first.json()["code"]) == (500, "database_unreachable")
    assert titles(sql) == ["once"]
    again = await service.client.post(path, json=body, headers=headers)
    assert again.status_code in {200, 201}
    assert again.headers["idempotency-replayed"] == "true"
    assert '"title":"once"' in again.text
    assert titles(sql) == ["once"]


async def test_batch_whose_session_is_ended_is_answered_at_once(
    service: Service, sql: psycopg.Connection
) -> None:
    """And not only when the deadline for the database's answer has passed."""
    operations = [{"op": "create", "task": {"title": "x" * 200, "description": "y" * 4000}}] * 100
    ended = asyncio.Event()

    async def end_sessions() -> None:
        while not ended.is_set():
            sql.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE state = 'active'"
                " AND datname = current_database() AND pid <> pg_backend_pid()"
            )
            await asyncio.sleep(0.002)

    ending = asyncio.create_task(end_sessions())
    answers = [
        await service.client.post(
            "/api/tasks/batch", json={"operations": operations}, headers=bearer(f"user-{number}")
        )
        for number in range(12)
    ]
    ended.set()
    await ending
    codes = {answer.json()["code"] for answer in answers if answer.status_code != 200}
    assert codes == {"database_unreachable"}
    stored = sql.execute("SELECT count(*) FROM tasks GROUP BY user_id").fetchall()
    assert {count for (count,) in stored} <= {100}
    assert len(stored) >= sum(answer.status_code == 200 for answer in answers)


class Writer:
    """A client that sends keyed writes until the program is gone."""

    def __init__(self, program: Program, number: int) -> None:
        self.sent: dict[str, tuple[str, dict[str, Any]]] = {}
        """The writes by their keys."""
        self._program, self._number = program, number
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            for step in range(10_000):
                title = f"{self._number}-{step}"
                path = WRITES[step % 2][0]
                task = {"title": title}
                body = {"operations": [{"op": "create", "task": task}]} if step % 2 else task
                self.sent[title] = path, body
                assert send(self._program, title, path, body).status_code in {200, 201}
        except httpx2.TransportError:
            return

    def join(self) -> None:
        """Wait until the program is gone."""
        self._thread.join()


def send(program: Program, key: str, path: str, body: dict[str, Any]) -> httpx2.Response:
    headers = {**bearer(f"user-{key[0]}"), "Idempotency-Key": key}
    return httpx2.post(program.address + path, json=body, headers=headers, **LOCAL)


def test_retry_after_kill_9_writes_once(
    tmp_path: Path, database_url: str, sql: psycopg.Connection
) -> None:
    """Clients repeat all writes, also the acknowledged ones, after each kill of the program."""
    variables = {
        "DATABASE_URL": database_url,
        "BETTER_AUTH_SECRET": SECRET,
        "LOG_LEVEL": "error",
    }
    sent: dict[str, tuple[str, dict[str, Any]]] = {}
    for number in range(KILLS):
        folder = tmp_path / str(number)
        folder.mkdir()
        with serving(folder, **variables) as program:
            for key, (path, body) in sent.items():
                assert send(program, key, path, body).status_code in {200, 201}
            writers = [Writer(program, 3 * number + each) for each in range(3)]
            wait_for_writes(writers)
            program.process.kill()
            program.process.wait()
            for writer in writers:
                writer.join()
                sent |= writer.sent
    with serving(tmp_path, **variables) as program:
        for key, (path, body) in sent.items():
            answer = send(program, key, path, body)
            assert answer.status_code in {200, 201}
            assert f'"title":"{key}"' in answer.text
    assert sorted(titles(sql)) == sorted(sent)


def wait_for_writes(writers: list[Writer]) -> None:
    """Wait until each writer has some answers."""
    for writer in writers:
        while len(writer.sent) < 10:
            assert writer._thread.is_alive()
            writer._thread.join(0.01)
