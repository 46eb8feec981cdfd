"""The first session in docs/api.md, run unchanged."""

import re
import subprocess
import sys
from pathlib import Path

from support.program import environment, serving

PAGE = Path(__file__).parents[2] / "docs" / "api.md"


def normal(text: str) -> str:
    """Replace ids, versions and times, because they differ between runs."""
    text = re.sub(r'"id":\d+', '"id":N', text.replace("\r", "").strip())
    text = re.sub(r"/api/tasks/\d+", "/api/tasks/N", text)
    text = re.sub(r'"version":\d+', '"version":N', text)
    return re.sub(r'(_at":")[\dT:.-]+Z', r"\1NOW", text)


def session() -> tuple[list[str], str]:
    """Return the page's commands and their expected output."""
    block = PAGE.read_text().split("## A first session")[1].split("```console\n")[1].split("```")[0]
    lines = block.splitlines()
    commands = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    return commands, "\n".join(line for line in lines if not line.startswith("$ "))


def test_session_prints_what_the_page_says(tmp_path: Path) -> None:
    commands, printed = session()
    assert len(commands) > 4
    with serving(tmp_path) as program, program.client() as client:
        assert client.post("/api/tasks", json={"title": "Buy groceries"}).status_code == 201
        script = "\n".join(f"{command}\necho" for command in commands)
        script = script.replace("localhost:8000", program.address)
        script = script.replace(".venv/bin/todo-api", f"{sys.executable} -m todo_api")
        done = subprocess.run(
            ["bash", "-eu", "-o", "pipefail", "-c", script],
            cwd=tmp_path,
            env=environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        assert program.stop() == 0
    assert done.stderr == ""
    assert [line for line in normal(done.stdout).splitlines() if line] == normal(
        printed
    ).splitlines()
