"""The todo-api program."""

import asyncio
import gc
import json
import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from todo_api import development
from todo_api.auth.tokens import is_subject
from todo_api.database import schema
from todo_api.errors import StartupError
from todo_api.settings import Settings

if TYPE_CHECKING:
    from socket import socket

    from todo_api.check import Finding

cli = typer.Typer(
    help="A multi-user to-do REST API.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Run a command. What cannot start says why in one line and exits with 1."""
    _open_what_is_closed()
    if sys.argv[1:2] == ["serve"]:  # to end it is no failure, however early; other commands it is
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: sys.exit(0))
        gc.disable()  # what is imported stays; looking for garbage in it is a sixth of the start
    try:
        cli()
    except StartupError as error:
        sys.exit(f"todo-api: {error}")


def _open_what_is_closed() -> None:
    """Lead closed standard files nowhere: a socket in their place would get what is printed."""
    standard_output, standard_error = 1, 2
    while (number := os.open(os.devnull, os.O_RDWR)) <= standard_error:
        os.set_inheritable(number, True)
    os.close(number)
    sys.stdout = sys.stdout or os.fdopen(standard_output, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(standard_error, "w", closefd=False)


@cli.command()
def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on.")] = None,
    workers: Annotated[int | None, typer.Option(help="Number of processes.")] = None,
) -> None:
    """Serve the API. Flags win over the environment."""
    from todo_api import server  # noqa: PLC0415  commands that do not serve start without it
    from todo_api.http.logs import configure_logging  # noqa: PLC0415

    settings = Settings.load(host=host, port=port, workers=workers)
    configure_logging(settings)
    with (
        server.listener(settings) as listener,
        server.metrics_served(settings),
        _database(settings) as url,
    ):
        if settings.auto_migrate:
            _migrate(url)
        with_keys = development.with_secret(settings)
        asyncio.run(server.check(with_keys, url))
        _greet(with_keys, listener, development_mode=settings.development)
        server.serve(with_keys, url, listener)


@cli.command()
def migrate(
    *,
    sql: Annotated[bool, typer.Option("--sql", help="Print the statements only.")] = False,
    on_citus: Annotated[
        bool, typer.Option("--citus", help="Also distribute the tables, on a Citus coordinator.")
    ] = False,
) -> None:
    """Bring the database to the newest schema."""
    from todo_api.database import citus, migrations  # noqa: PLC0415

    if sql:
        migrations.print_sql()
        if on_citus:
            print(";\n\n".join(citus.statements()) + ";")  # noqa: T201
        return
    with _database(Settings.load()) as url:
        migrations.migrate(url)
        if on_citus:
            citus.distribute(url)


@cli.command()
def restored() -> None:
    """Run this after a restored backup or a failover that lost commits, before serving again.

    It makes sure that no version is given out twice.
    """
    from todo_api.database.restored import lift_versions  # noqa: PLC0415

    with _database(Settings.load()) as url:
        users = lift_versions(url)
    print(f"Lifted the versions of {users} users above all that were given out before.")  # noqa: T201


@cli.command()
def token(
    user: Annotated[str, typer.Argument(help="The user's id: the token's `sub`.")],
    email: Annotated[str | None, typer.Option(help="The user's e-mail address.")] = None,
    expires_in: Annotated[str, typer.Option(help="Lifetime: 90s, 15m, 1h or 7d.")] = "1h",
) -> None:
    """Print a token for a user, signed with the shared secret."""
    settings = development.with_secret(Settings.load())
    lifetime = _seconds(expires_in)
    if not is_subject(user):
        raise typer.BadParameter("the user's id must be 1 to 255 characters, none of them control")
    print(development.token(settings, user, lifetime=lifetime, email=email))  # noqa: T201


@cli.command()
def check(
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what is configured and whether it works; exit with 1 where something does not."""
    found = asyncio.run(_findings())
    well = all(finding.status != "failure" for finding in found)
    if as_json:
        print(json.dumps({"ok": well, "checks": [asdict(each) for each in found]}, indent=2))  # noqa: T201
    else:
        for each in found:
            print(f"{each.status:8} {each.subject}: {each.detail}")  # noqa: T201
    sys.exit(0 if well else 1)


async def _findings() -> "list[Finding]":
    from todo_api import check  # noqa: PLC0415

    try:
        settings = Settings.load()
        with _database(settings) as url:
            with_keys = development.with_secret(settings)
            return [finding async for finding in check.findings(with_keys, url)]
    except StartupError as error:
        return [check.Finding("settings", "failure", str(error))]


@cli.command()
def openapi() -> None:
    """Print the OpenAPI document."""
    from todo_api.app import create_app  # noqa: PLC0415

    app = create_app(Settings.model_construct(), "postgresql://")
    print(json.dumps(app.openapi(), indent=2))  # noqa: T201


@contextmanager
def _database(settings: Settings) -> Iterator[str]:
    """Give the address of the database: the configured one, or an embedded one of our own."""
    if settings.database_url is not None:
        yield settings.database_url.get_secret_value()
        return
    from todo_api.database.embedded import EmbeddedPostgres  # noqa: PLC0415

    with EmbeddedPostgres.start(settings.data_dir / "postgres") as server:
        yield server.url


def _migrate(url: str) -> None:
    if schema.current(url) != schema.newest():
        from todo_api.database import migrations  # noqa: PLC0415  Alembic, seldom needed

        migrations.migrate(url)


def _greet(settings: Settings, listener: "socket", *, development_mode: bool) -> None:
    """Say where the API is, and in development mode how to call it."""
    host, port = listener.getsockname()[:2]
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    print(f"todo-api is listening on {address} (documentation: {address}/docs)")  # noqa: T201
    if development_mode:
        print(  # noqa: T201
            f"\nDevelopment mode, data in {settings.data_dir}. Create a task:\n\n"
            f"  {development.example(settings, address)}\n",
        )
    sys.stdout.flush()


def _seconds(duration: str) -> float:
    """Read a duration such as 90s, 15m, 1h or 7d."""
    match = re.fullmatch(r"([1-9]\d{0,5})([smhd]?)", duration, re.ASCII)
    if match is None:
        raise typer.BadParameter("must be a number of seconds, or like 15m, 1h or 7d")
    return int(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400}[match[2]]
