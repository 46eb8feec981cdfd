"""The command line: its help, its documentation, its colours and its completion."""

import os
import re
import shlex
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

import psycopg
import pytest
import typer.main

from support.program import command, environment, run
from support.service import SECRET
from todo_api.cli import cli
from todo_api.database import migrations

OPERATIONS = (Path(__file__).parents[2] / "docs" / "operations.md").read_text()
REVISIONS = Path(migrations.__file__).parent / "versions"
GROUP: Any = typer.main.get_command(cli)
COMMANDS = sorted(GROUP.commands)
ESCAPE = "\x1b["


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_has_an_example_that_it_understands(name: str, tmp_path: Path) -> None:
    shown = run(tmp_path, name, "--help", COLUMNS="200")
    assert (shown.returncode, shown.stderr) == (0, "")
    examples = re.findall(r"^ \$ todo-api (.+?)(?: [|>] .*)? *$", shown.stdout, re.MULTILINE)
    assert examples
    for example in examples:
        called, *arguments = shlex.split(example)
        given = GROUP.commands[called].make_context(called, arguments)
        assert called == name or " | " in shown.stdout
        assert not given.args


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_and_option_is_documented(name: str) -> None:
    (row,) = re.findall(rf"^\| `todo-api {name}\b.*\|$", OPERATIONS, re.MULTILINE)
    for parameter in GROUP.commands[name].params:
        if parameter.param_type_name == "option" and parameter.name != "help":
            assert any(option in row for option in parameter.opts), parameter.opts
        elif parameter.param_type_name == "argument":
            assert (parameter.metavar or parameter.name).upper() in row


@pytest.mark.parametrize("code", [0, 1, 2, 130, 143])
def test_exit_codes_are_documented(code: int, tmp_path: Path) -> None:
    assert re.search(rf"^\| {code} \|", OPERATIONS, re.MULTILINE)
    assert re.search(rf"\b{code}: ", run(tmp_path, "--help").stdout)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [([], 2), (["--help"], 0), (["unknown"], 2), (["export"], 2), (["serve", "--port", "x"], 2)],
)
def test_wrong_usage_has_a_code_of_its_own(arguments: list[str], code: int, tmp_path: Path) -> None:
    done = run(tmp_path, *arguments)
    assert done.returncode == code
    assert "todo-api" in done.stdout + done.stderr
    assert ESCAPE not in done.stdout + done.stderr


def on_terminal(folder: Path, *arguments: str, **variables: str) -> str:
    """Return what a command shows on a terminal."""
    ours, theirs = os.openpty()
    process = subprocess.Popen(
        command(*arguments),
        cwd=folder,
        env=environment(TERM="xterm-256color", **variables),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    shown = b""
    try:
        while part := os.read(ours, 65_536):
            shown += part
    except OSError:  # the program has closed the terminal
        pass
    finally:
        os.close(ours)
        process.wait(60)
    return shown.decode()


def test_colours_are_only_on_a_terminal(tmp_path: Path, database_url: str) -> None:
    there = {"DATABASE_URL": database_url, "BETTER_AUTH_SECRET": SECRET}
    coloured = on_terminal(tmp_path, "check", **there)
    assert "\x1b[32mok      \x1b[0m database: " in coloured
    plain = run(tmp_path, "check", **there)
    assert plain.stdout.startswith("ok       ")
    assert ESCAPE not in plain.stdout + plain.stderr
    assert ESCAPE in on_terminal(tmp_path, "--help")


def test_a_terminal_shows_that_a_database_is_made(tmp_path: Path) -> None:
    made = "Making a database in .data/postgres …"
    assert on_terminal(tmp_path, "migrate").count(made) == 1
    assert on_terminal(tmp_path, "migrate").count(made) == 0
    other = tmp_path / "other"
    other.mkdir()
    assert run(other, "migrate").stderr == ""


def test_migrate_says_what_it_runs(tmp_path: Path, empty_database_url: str) -> None:
    there = {"DATABASE_URL": empty_database_url}
    first, second = (run(tmp_path, "migrate", **there) for _ in range(2))
    *ran, last = first.stdout.splitlines()
    revisions = sorted(file.name[:4] for file in REVISIONS.glob("0*.py"))
    assert ran == [f"Ran revision {revision}." for revision in revisions]
    assert second.stdout.splitlines() == [last] == ["The schema is up to date."]
    assert first.stderr + second.stderr == ""
    with psycopg.connect(empty_database_url) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    said = f"The schema is newer (9999) than this program ({revisions[-1]}). It stays as it is.\n"
    assert run(tmp_path, "migrate", **there).stdout == said


def test_check_asks_for_a_key_that_migrate_does_not_need(tmp_path: Path, database_url: str) -> None:
    refused = run(tmp_path, "check", DATABASE_URL=database_url)
    assert refused.returncode == 1
    assert refused.stdout == (
        "failure  settings: BETTER_AUTH_URL: set it, or BETTER_AUTH_SECRET, "
        "so that tokens can be verified\n"
    )


def completed(folder: Path, *words: str) -> list[str]:
    """Return what bash offers after these words."""
    script = (
        'eval "$(todo-api --show-completion)"; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1));'
        ' _todo_api_completion todo-api; echo "${COMPREPLY[@]}"'
    )
    done = subprocess.run(
        ["bash", "-c", script, "-", "todo-api", *words],
        cwd=folder,
        env=environment(PATH=f"{sysconfig.get_path('scripts')}:{os.environ['PATH']}"),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stdout.split()


def test_bash_completes_commands_and_options(tmp_path: Path) -> None:
    assert completed(tmp_path, "") == list(GROUP.commands)
    assert completed(tmp_path, "re") == ["restored", "restore"]
    assert completed(tmp_path, "export", "ann", "--f") == ["--format"]
    assert completed(tmp_path, "export", "ann", "--format", "") == ["jsonl", "csv"]
