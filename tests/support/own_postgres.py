"""A durable PostgreSQL of a test's own, to be stopped, killed and started again."""

import os
import signal
from pathlib import Path

import psycopg

from todo_api.database import migrations
from todo_api.database.embedded import EmbeddedPostgres


class OwnPostgres:
    """A server in a folder, with fsync as in production. Its address stays the same."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "postgres"
        self._server: EmbeddedPostgres | None = None
        self.start()
        with psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute("CREATE DATABASE migrated")
        migrations.migrate(self.at("migrated"))

    @property
    def url(self) -> str:
        """The address of the server's own database."""
        assert self._server is not None
        return self._server.url

    def at(self, name: str) -> str:
        """Return the address of another database."""
        return self.url.replace("/postgres?", f"/{name}?")

    def start(self) -> None:
        """Start it, unless it runs."""
        if self._server is None:
            self._server = EmbeddedPostgres.start(self._folder)

    def stop(self) -> None:
        """Stop it in order: a fast shutdown, which ends every session."""
        if self._server is not None:
            self._server.close()
            self._server = None

    def crash(self, number: signal.Signals) -> None:
        """Kill the postmaster, by SIGQUIT (an immediate shutdown) or by SIGKILL."""
        os.kill(self.postmaster, number)
        self.stop()

    @property
    def postmaster(self) -> int:
        """Its process id."""
        return int((self._folder / "data" / "postmaster.pid").read_text().split()[0])

    @property
    def access_rules(self) -> Path:
        """The file `pg_hba.conf`."""
        return self._folder / "data" / "pg_hba.conf"
