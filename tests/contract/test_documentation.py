"""The curl examples of docs/api.md run unchanged, against the program."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import psycopg

from support.program import environment, serving
from support.service import SECRET, token

PAGE = (Path(__file__).parents[2] / "docs" / "api.md").read_text()
CURL = re.findall(r"^```\n(curl .*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


def curl(command: str, address: str) -> Any:
    """Run an example and return the JSON that it prints."""
    done = subprocess.run(
        ["bash", "-euc", command.replace("curl", "curl -sS --fail-with-body", 1)],
        env=environment(TOKEN=token("alice")),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, ""), f"{command}\n{done.stdout}{done.stderr}"
    assert address in command
    return json.loads(done.stdout)


def test_curl_examples_do_what_the_page_says(
    tmp_path: Path, database_url: str, sql: psycopg.Connection
) -> None:
    """The keyed creation is sent twice and stored once."""
    assert PAGE.count("\ncurl ") == len(CURL)
    settings = {"BETTER_AUTH_SECRET": SECRET, "DATABASE_URL": database_url}
    with serving(tmp_path, **settings) as program, program.client(token("alice")) as client:
        address = program.address.removeprefix("http://")
        search, create, batch, changes = (
            command.replace("localhost:8000", address) for command in CURL
        )
        for task in (
            {"title": "Milk", "due_date": "2026-12-07"},
            {"title": "Milk", "due_date": "2026-12-08"},
            {"title": "Bread", "due_date": "2026-12-07"},
        ):
            assert client.post("/api/tasks", json=task).status_code == 201
        assert [task["due_date"] for task in curl(search, address)] == ["2026-12-07"]
        assert curl(create, address) == curl(create, address)
        made = [result["task"]["title"] for result in curl(batch, address)["results"]]
        feed = curl(changes, address)
    assert made == ["Buy milk", "Bake a cake"]
    stored = sql.execute("SELECT title FROM tasks ORDER BY version").fetchall()
    assert [title for (title,) in stored] == ["Milk", "Milk", "Bread", "Buy milk", *made]
    assert [(change["task"]["title"],) for change in feed["changes"]] == stored
