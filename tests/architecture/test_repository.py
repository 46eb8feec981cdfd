"""What the files around the code say about each other: versions, the forge's forms and workflow."""

import os
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]  # it has no types

ROOT = Path(__file__).parents[2]
FORGE = ROOT / ".github"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
FORMS = sorted(FORGE.glob("ISSUE_TEMPLATE/*.yml"))
WORKFLOW: dict[Any, Any] = yaml.safe_load((FORGE / "workflows" / "ci.yml").read_text())


def test_changelog_starts_with_the_version() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text()
    sections = re.findall(r"^## (\S+)(?: – (\d{4}-\d\d-\d\d))?$", changelog, re.MULTILINE)
    released = [name for name, date in sections if date]
    assert released[0] == PROJECT["version"]
    assert len(sections) - len(released) <= 1  # what is not released yet


def test_docs_name_the_wheel_of_this_version() -> None:
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        named = re.findall(r"todo_api-([\d.]+)-py3-none-any\.whl", page.read_text())
        assert set(named) <= {PROJECT["version"]}, page.name


def test_workflow_runs_what_any_machine_runs() -> None:
    commands = [step.get("run") for step in WORKFLOW["jobs"]["all"]["steps"]]
    assert commands == [None, ".ci/run"]
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_workflow_may_only_read() -> None:
    assert WORKFLOW["permissions"] == {"contents": "read"}
    for job in WORKFLOW["jobs"].values():
        assert "permissions" not in job
        assert job["timeout-minutes"] <= 90
        for step in job["steps"]:
            assert "run" in step or step["with"] == {"persist-credentials": False}


def test_workflow_tries_the_wheel_on_every_other_python() -> None:
    named = set(re.findall(r"Python :: (3\.\d+)", " ".join(PROJECT["classifiers"])))
    image = WORKFLOW["jobs"]["all"]["container"]["image"]
    tried = WORKFLOW["jobs"]["wheel"]["strategy"]["matrix"]["python"]
    assert {*tried, re.sub(r"python:(3\.\d+)-.*", r"\1", image)} == named


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.stem)
def test_form_of_an_issue_is_valid(form: Path) -> None:
    content = yaml.safe_load(form.read_text())
    assert content["name"]
    assert content["description"]
    questions = [each for each in content["body"] if each["type"] != "markdown"]
    names = [each["id"] for each in questions]
    assert len(set(names)) == len(names) > 0
    for each in questions:
        assert each["type"] in {"textarea", "input", "dropdown"}
        assert each["attributes"]["label"]
        assert each["type"] != "dropdown" or each["attributes"]["options"]


def test_form_of_a_bug_asks_for_what_it_takes_and_points_to_security() -> None:
    text = (FORGE / "ISSUE_TEMPLATE" / "bug.yml").read_text()
    for wanted in ("SECURITY.md", "todo-api --version", "todo-api check", "X-Request-ID", "`code`"):
        assert wanted in text
