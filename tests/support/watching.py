"""What PostgreSQL itself says about the service's connections."""

import asyncio

import psycopg

from support.listening import Listening
from support.waiting import until

_MINE = "datname = current_database() AND application_name = 'todo-api'"


def backends(sql: psycopg.Connection, state: str = "%") -> set[int]:
    """Return the process ids of the service's sessions in such a state."""
    query = f"SELECT pid FROM pg_stat_activity WHERE {_MINE} AND state LIKE %s"  # noqa: S608
    return {row[0] for row in sql.execute(query, [state])}


def waiting(sql: psycopg.Connection) -> int:
    """Count the service's sessions that wait for a lock."""
    query = f"SELECT FROM pg_stat_activity WHERE {_MINE} AND wait_event_type = 'Lock'"
    return len(sql.execute(query).fetchall())


def terminate(sql: psycopg.Connection, wait: float = 0) -> int:
    """End every session of the service, and wait at most so many seconds until each is gone."""
    # The only part that is not written here is a constant of ours.
    query = f"SELECT pg_terminate_backend(pid, %s) FROM pg_stat_activity WHERE {_MINE}"  # noqa: S608
    return len(sql.execute(query, [int(wait * 1000)]).fetchall())


async def assert_pool_is_whole(service: Listening, sql: psycopg.Connection, size: int) -> None:
    """Check that exactly `size` requests find a connection: none is stuck, none too many."""
    await until(lambda: not backends(sql, "active") and not backends(sql, "idle in%"))
    tasks = [await service.create("the pool's own") for _ in range(3 * size)]
    with psycopg.connect(sql.info.dsn) as holder:
        holder.execute("SELECT FROM tasks WHERE user_id = 'the pool''s own' FOR UPDATE")
        changes = [
            asyncio.create_task(
                service.request(
                    "PUT", f"/api/tasks/{task['id']}", "the pool's own", json={"title": "y"}
                )
            )
            for task in tasks
        ]
        await until(lambda: waiting(sql) == size)
        holder.rollback()
    answers = await asyncio.gather(*changes)
    assert {answer.status_code for answer in answers} == {200}
    assert len(backends(sql)) == size
