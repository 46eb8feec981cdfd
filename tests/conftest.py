"""A real PostgreSQL for every test: one server a run, one migrated copy a test."""

import gc
import os
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import psycopg
import pytest

from support.program import find_unused_port
from support.service import Service, running_service
from todo_api.database import migrations, temporary
from todo_api.database.embedded import EmbeddedPostgres

numbers = count(1)

ROOM = 3e9
"""Bytes for the temporary files of a run. With four processes they take up to 1.7 GB (measured)."""


def quickest_place() -> Path:
    """Return the memory, if it has room, where a database is made in 6 ms and not in 40.

    A container may have only 64 MB of it.
    """
    memory = Path("/dev/shm")  # noqa: S108 - mkdtemp makes the folder in it
    has_room = memory.is_dir() and shutil.disk_usage(memory).free > ROOM
    return memory if has_room else Path("/tmp")  # noqa: S108 - likewise


# Servers of tests have their data in temporary folders. On a disk, they wait for it.
tempfile.tempdir = os.environ["TMPDIR"] = str(quickest_place())

# A shell lets its background jobs ignore Ctrl-C, and what tests start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

SLOW_FOLDERS = {"contract", "faults"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with the files that take longest, so that no process ends long after the others."""
    items.sort(key=lambda item: item.path.parent.name not in SLOW_FOLDERS)


def pytest_collection_finish() -> None:
    """Let the collector skip what lives until the end: a tenth less CPU for a test (measured)."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000)


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def _no_settings_from_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The developer's environment and `.env` have no say in a test."""
    for name in list(os.environ):
        if name.startswith(("BETTER_AUTH", "NEON_", "DATABASE_", "PG")):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def run_folder() -> Iterator[Path]:
    """A folder of this run, with a short path, which every account can enter."""
    place, prefix = quickest_place(), "todo-api-tests-"
    temporary.remove_abandoned(place, prefix)  # runs that were killed
    folder, lock = temporary.make_locked(place, prefix)
    yield folder
    shutil.rmtree(folder)
    os.close(lock)


@pytest.fixture(scope="session")
def postgres(run_folder: Path) -> Iterator[str]:
    """The address of the server's own database."""
    with EmbeddedPostgres.start(run_folder / "postgres", durable=False) as server:
        yield server.url


@pytest.fixture(scope="session")
def template(postgres: str) -> str:
    """The name of a migrated database to copy from."""
    _execute(postgres, "CREATE DATABASE migrated")
    migrations.migrate(at_database(postgres, "migrated"))
    return "migrated"


@pytest.fixture
def database_url(postgres: str, template: str) -> Iterator[str]:
    """The address of a migrated database of the test's own."""
    with database(postgres, template) as url:
        yield url


@pytest.fixture(scope="module")
def database_url_of_module(postgres: str, template: str) -> Iterator[str]:
    """The address of a migrated database that a module's tests share."""
    with database(postgres, template) as url:
        yield url


@pytest.fixture
def empty_database_url(postgres: str) -> Iterator[str]:
    """The address of an empty database of the test's own."""
    with database(postgres, "template1") as url:
        yield url


@pytest.fixture(scope="module")
def empty_database_url_of_module(postgres: str) -> Iterator[str]:
    """The address of a database that is empty at first, and that a module's tests share."""
    with database(postgres, "template1") as url:
        yield url


@pytest.fixture
def sql(database_url: str) -> Iterator[psycopg.Connection]:
    """A connection of the administrator, to look at what is stored."""
    with psycopg.connect(database_url, autocommit=True) as connection:
        yield connection


@pytest.fixture
async def service(database_url: str, short_folder: Path) -> AsyncIterator[Service]:
    """The application, running."""
    async with running_service(database_url, short_folder) as running:
        yield running


@pytest.fixture
def short_folder(run_folder: Path) -> Iterator[Path]:
    """A folder whose path leaves room for a socket's name (107 bytes)."""
    with tempfile.TemporaryDirectory(dir=run_folder) as folder:
        yield Path(folder)


@pytest.fixture
def unused_port() -> int:
    """A port where nobody listens, and that the kernel gives to no client meanwhile."""
    return find_unused_port()


@contextmanager
def database(postgres: str, template: str) -> Iterator[str]:
    """Make a database for a while."""
    name = f"test_{next(numbers)}"
    # The other strategy writes all of it to the WAL: 25 to 120 ms in place of 15 (measured).
    _execute(postgres, f"CREATE DATABASE {name} TEMPLATE {template} STRATEGY FILE_COPY")
    yield at_database(postgres, name)
    _execute(postgres, f"DROP DATABASE {name} WITH (FORCE)")


def at_database(url: str, name: str) -> str:
    """Return the address of another database of the same server."""
    return url.replace("/postgres?", f"/{name}?")


def _execute(url: str, statement: str) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(statement)
