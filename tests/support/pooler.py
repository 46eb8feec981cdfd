"""A real PgBouncer in transaction mode."""

import asyncio
import os
import pwd
import re
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import quote

import psycopg
from psycopg import conninfo

from support.network import Network
from support.waiting import until

PREPARES_FROM = (1, 21)
"""The first version that follows prepared statements in transaction mode."""


def missing() -> str | None:
    """Say in one sentence what is missing to run the pooler, or None."""
    if _program() is None:
        return "The program `pgbouncer` is not on the PATH."
    return None


def version() -> tuple[int, ...]:
    """Return the version that is installed."""
    said = subprocess.run([_program() or "", "--version"], capture_output=True, check=True).stdout
    found = re.search(r"PgBouncer (\d+)\.(\d+)", said.decode())
    assert found is not None
    return tuple(map(int, found.groups()))


@asynccontextmanager
async def pooled(
    url: str,
    folder: Path,
    *,
    size: int,
    prepared_statements: int = 0,
    query_wait_timeout: int = 120,
) -> AsyncIterator[str]:
    """Run the pooler in front of the database at `url`, with so many sessions; give its address."""
    account = ["-u", "nobody"] if os.geteuid() == 0 else []
    async with Network(url) as network:
        configuration = folder / "pgbouncer.ini"
        text = _configuration(network.port, folder, size, prepared_statements)
        configuration.write_text(f"{text}query_wait_timeout = {query_wait_timeout}\n")
        if account:
            os.chown(folder, pwd.getpwnam("nobody").pw_uid, -1)
        with (folder / "log").open("w") as log:
            process = await asyncio.create_subprocess_exec(
                _program() or "", *account, configuration, stdout=log, stderr=log
            )
        try:
            await until((folder / ".s.PGSQL.5432").exists)
            yield url.replace(url.partition("host=")[2], quote(str(folder), safe=""))
        finally:
            process.send_signal(signal.SIGTERM)
            await process.wait()


async def command(url: str, words: str) -> None:
    """Tell the pooler at `url` something, as its administrator."""
    console = conninfo.make_conninfo(url, dbname="pgbouncer", user="postgres")
    async with await psycopg.AsyncConnection.connect(console, autocommit=True) as administrator:
        await administrator.execute(words.encode())


def _configuration(port: int, folder: Path, size: int, prepared_statements: int) -> str:
    prepared = f"max_prepared_statements = {prepared_statements}"
    return f"""
[databases]
* = host=127.0.0.1 port={port} user=postgres
[pgbouncer]
pool_mode = transaction
default_pool_size = {size}
max_client_conn = 200
listen_port = 5432
unix_socket_dir = {folder}
auth_type = any
admin_users = postgres
server_login_retry = 1
{prepared if version() >= PREPARES_FROM else ""}
"""


def _program() -> str | None:
    # Debian puts it where only root's PATH leads.
    return shutil.which("pgbouncer") or shutil.which("pgbouncer", path="/usr/sbin")
