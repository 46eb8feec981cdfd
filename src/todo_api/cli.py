"""The todo-api program.

A command imports what it alone needs, so that the others start quickly.
"""

import asyncio
import gc
import json
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from todo_api import console, development
from todo_api.auth.tokens import is_subject
from todo_api.database import schema
from todo_api.errors import StartupError
from todo_api.settings import Settings

if TYPE_CHECKING:
    from socket import socket

    from todo_api.auth.owner import Owner
    from todo_api.check import Finding

STANDARD_OUTPUT, STANDARD_ERROR = 1, 2

_User = Annotated[str, typer.Argument(metavar="USER", help="The user's id: the token's `sub`.")]
_COLORS = {"ok": "green", "warning": "yellow", "failure": "red"}


def _lines(title: str, *lines: str) -> str:
    """Return the end of a help page. Typer breaks it only at empty lines."""
    return "\n\n".join([title, *lines])


def _examples(*commands: str) -> str:
    return _lines("Examples:", *(f"$ todo-api {command}" for command in commands))


cli = typer.Typer(
    epilog=_lines(
        "Exit codes:",
        "0: done. 1: not done, and the standard error says why. 2: wrong usage.",
        "130: stopped by Ctrl-C. 143: stopped by SIGTERM. `serve` ends with 0 after both.",
    ),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        from importlib.metadata import version

        print(f"todo-api {version('todo-api')}")
        raise typer.Exit


@cli.callback()
def _options(
    *,
    _version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    """A multi-user to-do REST API."""


def main() -> None:
    """Run a command. If it cannot do what it should, print why in one line and exit with 1."""
    _open_standard_files()
    # Only an exception removes unfinished files.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    if sys.argv[1:2] == ["serve"]:
        for number in (signal.SIGTERM, signal.SIGINT):  # stopping the service is not an error
            signal.signal(number, lambda *_: sys.exit(0))
        gc.disable()  # imports leave no garbage, and looking for it is a sixth of the start
    try:
        cli(prog_name="todo-api")
    except StartupError as error:
        sys.exit(f"todo-api: {error}")


def _open_standard_files() -> None:
    """Open closed standard files on /dev/null.

    Otherwise a socket would get the number of one, and with it what is printed.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= STANDARD_ERROR:
        os.set_inheritable(number, True)
    os.close(number)
    sys.stdout = sys.stdout or os.fdopen(STANDARD_OUTPUT, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(STANDARD_ERROR, "w", closefd=False)


@cli.command(epilog=_examples("serve", "serve --host 0.0.0.0 --port 8000 --workers 2"))
def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on.")] = None,
    workers: Annotated[int | None, typer.Option(help="Number of processes.")] = None,
) -> None:
    """Serve the API. Flags win over the environment."""
    from todo_api import server
    from todo_api.http.logs import configure_logging

    settings = Settings.load(host=host, port=port, workers=workers)
    settings.require_keys()
    configure_logging(settings)
    server.warn(settings)
    with (
        server.listener(settings) as listener,
        server.metrics_served(settings),
        _database(settings) as url,
    ):
        if settings.auto_migrate:
            _migrate(url)
        with_secret = development.with_secret(settings)
        place = asyncio.run(server.check(with_secret, url))
        _print_or_discard(_greeting(with_secret, listener, place))
        server.serve(with_secret, url, listener)


@cli.command(epilog=_examples("migrate", "migrate --sql > schema.sql"))
def migrate(
    *,
    sql: Annotated[bool, typer.Option("--sql", help="Print the statements only.")] = False,
    on_citus: Annotated[
        bool, typer.Option("--citus", help="Also distribute the tables, on a Citus coordinator.")
    ] = False,
) -> None:
    """Bring the database to the newest schema."""
    from todo_api.database import citus, migrations

    if sql:
        migrations.print_sql()
        if on_citus:
            print(";\n\n".join(citus.statements()) + ";")
        return
    with _database(Settings.load()) as url:
        migrations.migrate(url, applied=lambda revision: print(f"Ran revision {revision}."))
        if on_citus:
            citus.distribute(url)
        current, newest = schema.current(url), schema.newest()
    if current == newest:
        print("The schema is up to date.")
    else:
        print(f"The schema is newer ({current}) than this program ({newest}). It stays as it is.")


@cli.command(epilog=_examples("restored"))
def restored() -> None:
    """Lift the versions, so that none is given out twice.

    Run this after `pg_restore`, or after a failover that lost commits, before serving again.
    """
    from todo_api.database.restored import lift_versions

    with _database(Settings.load()) as url:
        users = lift_versions(url)
    print(f"Lifted the versions of {_counted(users, 'user')} above all that were given out before.")


@cli.command(epilog=_examples("backup tasks.backup"))
def backup(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A new file. It must not exist.")],
) -> None:
    """Write all data to a file, as it is at one moment. The service can run meanwhile."""
    from todo_api.database.backup import back_up

    with (
        console.new_file(file) as written,
        _database(Settings.load()) as url,
        console.Progress("rows") as progress,
    ):
        rows = back_up(url, written, progress.advance)
    print(f"Backed up {_counted(rows, 'row')}.")


@cli.command(epilog=_examples("restore tasks.backup"))
def restore(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A file of `todo-api backup`.")],
) -> None:
    """Load a backup into an empty database, all of it or nothing."""
    from todo_api.database import backup, migrations

    settings = Settings.load()
    with (
        console.existing_file(file) as read,
        _database(settings) as url,
        console.Progress("rows") as progress,
    ):
        revision = backup.revision_of(read)
        if settings.auto_migrate and revision in schema.known() and schema.current(url) is None:
            migrations.migrate(url, revision)
        rows = backup.restore(url, read, progress.advance)
        if settings.auto_migrate:
            _migrate(url)
    print(f"Restored {_counted(rows, 'row')}.")


_Format = Annotated[
    Literal["jsonl", "csv"] | None,
    typer.Option("--format", help="JSON lines or CSV. By default the name of FILE decides."),
]


@cli.command("export", epilog=_examples("export ann", "export ann tasks.csv"))
def export_tasks(
    user: _User,
    file: Annotated[
        Path | None,
        typer.Argument(metavar="FILE", help="A new file. The standard output if left out."),
    ] = None,
    form: _Format = None,
) -> None:
    """Write a user's tasks as they are at one moment, a task on each line."""
    from todo_api.tasks.transfer import Transfer

    owner = _named_by_operator(user)
    settings = Settings.load()
    output = console.new_file(file) if file else console.standard_output()
    with (
        output as written,
        _database(settings) as url,
        console.Progress("tasks") as progress,
    ):
        transfer = Transfer(owner, url, settings)
        number = transfer.export_tasks(written, form or _format(file), progress.advance)
    print(f"Exported {_counted(number, 'task')}.", file=sys.stderr)


@cli.command(
    "import",
    epilog=_examples("import ann tasks.csv", "export ann | todo-api import bob - --from ann"),
)
def import_tasks(
    user: _User,
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="A file of tasks, or - for the standard input.")
    ],
    form: _Format = None,
    source: Annotated[
        str | None,
        typer.Option("--from", metavar="USER", help="Whose tasks FILE has, if not USER's."),
    ] = None,
) -> None:
    """Make a user's tasks from a file, all of them or none. A repeat makes no task twice."""
    from todo_api.tasks.transfer import Source, Transfer

    owner = _named_by_operator(user)
    settings = Settings.load()
    with console.existing_file(file) as read, _database(settings) as url:
        if settings.auto_migrate:
            _migrate(url)
        transfer = Transfer(owner, url, settings)
        tasks = Source(read, form or _format(file), source)
        with console.Progress("tasks checked") as progress:
            count = transfer.check_tasks(tasks, progress.advance)
        with console.Progress(f"of {count:,} tasks imported") as progress:
            made, known = transfer.import_tasks(tasks, count, progress.advance)
    print(f"Imported {_counted(made, 'task')}, {known:,} were there already.")


def _counted(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def _format(file: Path | None) -> Literal["jsonl", "csv"]:
    return "csv" if file and file.suffix.lower() == ".csv" else "jsonl"


def _named_by_operator(user: str) -> "Owner":
    from todo_api.auth.owner import named_by_operator

    try:
        return named_by_operator(user, time.time())
    except ValueError:
        raise _not_a_user() from None


def _not_a_user() -> typer.BadParameter:
    return typer.BadParameter(
        "the user's id must be 1 to 255 characters, not blank, without control characters"
    )


@cli.command(epilog=_examples("token ann", "token ann --email ann@example.com --expires-in 7d"))
def token(
    user: _User,
    email: Annotated[str | None, typer.Option(help="The user's e-mail address.")] = None,
    expires_in: Annotated[str, typer.Option(help="Lifetime: 90s, 15m, 1h or 7d.")] = "1h",
) -> None:
    """Print a token for a user, signed with the shared secret."""
    settings = development.with_secret(Settings.load())
    lifetime = _seconds(expires_in)
    if not is_subject(user):
        raise _not_a_user()
    print(development.token(settings, user, lifetime=lifetime, email=email))


@cli.command(epilog=_examples("check", "check --json"))
def check(
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what is configured and whether it works; exit with 1 if something does not."""
    found = asyncio.run(_findings())
    ok = all(finding.status != "failure" for finding in found)
    if as_json:
        print(json.dumps({"ok": ok, "checks": [asdict(each) for each in found]}, indent=2))
    else:
        for each in found:
            status = typer.style(f"{each.status:8}", fg=_COLORS[each.status])
            typer.echo(f"{status} {each.subject}: {each.detail}")  # colours only on a terminal
    sys.exit(0 if ok else 1)


async def _findings() -> "list[Finding]":
    from todo_api import check

    try:
        settings = Settings.load()
        settings.require_keys()
        with _database(settings) as url:
            with_secret = development.with_secret(settings)
            return await check.findings(with_secret, url)
    except StartupError as error:
        return [check.Finding("settings", "failure", str(error))]


@cli.command(epilog=_examples("openapi > openapi.json"))
def openapi() -> None:
    """Print the OpenAPI document."""
    from todo_api.app import create_app

    app = create_app(Settings.model_construct(), "postgresql://")
    print(json.dumps(app.openapi(), indent=2))


@contextmanager
def _database(settings: Settings) -> Iterator[str]:
    """Yield the address of the configured database, or of an embedded one while it runs."""
    if settings.database_url is not None:
        yield settings.database_url.get_secret_value()
        return
    from todo_api.database import embedded

    embedded.forget_libpq_variables()
    folder = settings.data_dir / "postgres"
    if not folder.exists():
        console.note(f"Making a database in {folder} …")
    with embedded.EmbeddedPostgres.start(folder) as server:
        yield server.url


def _migrate(url: str) -> None:
    if schema.current(url) != schema.newest():
        from todo_api.database import migrations

        migrations.migrate(url)


def _greeting(settings: Settings, listener: "socket", place: str) -> str:
    """Return the address of the API, the database, and in development mode how to call it."""
    host, port = listener.getsockname()[:2]
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    greeting = f"todo-api is listening on {address} (documentation: {address}/docs)\n"
    database = place if settings.database_url else f"embedded, under {settings.data_dir}"
    greeting += f"Database: {database}\n"
    if settings.development:
        greeting += (
            f"\nDevelopment mode, data in {settings.data_dir}. Create a task:\n\n"
            f"  {development.curl_example(settings, address)}\n\n"
        )
    return greeting


def _print_or_discard(text: str) -> None:
    """Print a text; if that is impossible, the service runs without it."""
    try:
        print(text, end="", flush=True)
    except OSError:
        console.discard_output()


def _seconds(duration: str) -> float:
    """Return the seconds of a duration such as 90s, 15m, 1h or 7d."""
    match = re.fullmatch(r"([1-9]\d{0,5})([smhd]?)", duration, re.ASCII)
    if match is None:
        raise typer.BadParameter(
            "must be a number of seconds, or like 15m, 1h or 7d", param_hint="'--expires-in'"
        )
    return int(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400}[match[2]]
