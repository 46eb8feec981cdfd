"""Fixtures for a Citus cluster. An environment variable gives the address of its coordinator.

The tests of `tests/api` run here unchanged. The fixtures below replace the usual ones, so each test
runs once through the coordinator and once through a worker.
"""

from collections.abc import Iterator

import psycopg
import pytest

from support.requirements import citus_coordinator
from todo_api.database import citus, migrations

TABLES = ("users", "tasks", "tombstones", "answers", "erasures", "rate_limits", "restorations")

pytest.register_assert_rewrite("api")


@pytest.fixture(scope="session")
def coordinator() -> str:
    """The address of a migrated and distributed database on the coordinator."""
    url = citus_coordinator()
    migrations.migrate(url)
    citus.distribute(url)
    return url


@pytest.fixture(scope="session")
def workers(coordinator: str) -> list[str]:
    """The addresses of the workers. They serve the same database."""
    with psycopg.connect(coordinator) as connection:
        nodes = connection.execute(
            "SELECT nodename, nodeport FROM pg_dist_node WHERE groupid > 0 ORDER BY nodeid"
        ).fetchall()
        login, database = connection.info.user, connection.info.dbname
    return [f"postgresql://{login}@{host}:{port}/{database}" for host, port in nodes]


@pytest.fixture
def sql(coordinator: str) -> Iterator[psycopg.Connection]:
    """A connection to the coordinator as the tables' owner. The tables are empty at first."""
    with psycopg.connect(coordinator, autocommit=True) as connection:
        for table in TABLES:
            connection.execute(f"DELETE FROM {table}")  # noqa: S608  names from this module
        yield connection
        # All tests share this database, so no test may leave a setting behind.
        connection.execute(f"ALTER DATABASE {connection.info.dbname} RESET ALL")


@pytest.fixture(params=["coordinator", "worker"])
def database_url(
    request: pytest.FixtureRequest,
    coordinator: str,
    workers: list[str],
    sql: psycopg.Connection,
) -> str:
    """The address of the node that the service uses."""
    assert sql
    return coordinator if request.param == "coordinator" else workers[0]
