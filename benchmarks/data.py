"""The data at the start of every measurement, and the tokens of its users."""

import time
from pathlib import Path

import jwt
import psycopg

SECRET = "a shared secret of more than thirty-two bytes"
USERS = 100
"""The users who send requests."""

ROWS_OF_USERS = 10_000
"""All rows in `users`. With only a hundred, PostgreSQL would scan the whole table."""

FIRST_ID = 1
OPERATIONS = ("list", "get", "create", "update", "complete", "delete")
TASKS_PER_USER = dict.fromkeys(OPERATIONS, 20) | {"delete": 2000}


def load(url: str, tasks_per_user: int, users: int = USERS) -> None:
    """Replace all data with the same rows each time. User n owns every `users`-th task."""
    with psycopg.connect(url, autocommit=True) as connection:
        # Wait for statements that a load generator left behind when its time was up.
        busy = "SELECT FROM pg_stat_activity WHERE state <> 'idle' AND pid <> pg_backend_pid()"
        while connection.execute(busy).fetchone() is not None:
            time.sleep(0.05)
        connection.execute("SET session_replication_role = replica")  # faster without foreign keys
        connection.execute("TRUNCATE users, tasks, tombstones, erasures, answers RESTART IDENTITY")
        connection.execute(
            "INSERT INTO users (id, version)"
            " SELECT 'user' || n, 1 FROM generate_series(0, %s) AS n",
            [ROWS_OF_USERS - 1],
        )
        connection.execute(
            "INSERT INTO tasks (user_id, id, title, description, created_at, version)"
            " OVERRIDING SYSTEM VALUE"
            " SELECT 'user' || n %% %s, %s + n, 'Buy groceries ' || n, 'Milk and bread',"
            " now() - n * interval '1 second', 1 FROM generate_series(0, %s) AS n",
            [users, FIRST_ID, users * tasks_per_user - 1],
        )
        highest = FIRST_ID + users * tasks_per_user
        connection.execute("SELECT setval('tasks_id_seq', %s)", [highest])
        connection.execute("VACUUM ANALYZE users, tasks, tombstones")


def write_tokens(file: Path) -> None:
    """Write one token per line, for user 0, 1, … They are valid longer than the benchmark runs."""
    now = int(time.time())
    claims = ({"sub": f"user{n}", "iat": now, "exp": now + 86_400} for n in range(USERS))
    file.write_text("".join(f"{jwt.encode(each, SECRET, 'HS256')}\n" for each in claims))
