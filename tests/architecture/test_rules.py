"""The rules of the design as tests, because code drifts from rules without tests."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from todo_api.app import create_app
from todo_api.errors import FIELD_REASONS, InvalidJson
from todo_api.http.openapi import error_classes
from todo_api.http.routing import PrivateRoute
from todo_api.settings import Settings, variables
from todo_api.tasks.schemas import _CODES, _MESSAGES

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "todo_api"
MODULES = sorted(SOURCE.rglob("*.py"))

LAYERS: dict[str, set[str]] = {
    "errors": set(),
    "env_file": {"errors"},
    "settings": {"env_file", "errors"},
    "limiter": {"errors"},
    "request_context": {"errors"},
    "database": {"limiter", "settings", "errors"},
    "auth": {"database", "request_context", "settings", "errors"},
    "http": {"request_context", "limiter", "settings", "errors"},
    "tasks": {"http", "auth", "database", "settings", "errors"},
    "development": {"auth", "settings", "errors"},
    "app": {"development", "tasks", "http", "auth", "database"}
    | {"request_context", "settings", "errors"},
    "check": {"auth", "database", "settings", "errors"},
    "server": {"app", "http", "database", "settings", "errors"},
    "console": {"errors"},
    "cli": {
        "console",
        "tasks",
        "auth",
        "server",
        "check",
        "app",
        "development",
        "http",
        "database",
        "settings",
        "errors",
    },
}
"""The parts of our code that each part may import, besides itself."""


def part(module: Path) -> str:
    return module.relative_to(SOURCE).parts[0].removesuffix(".py")


def imports(module: Path) -> set[str]:
    """Return every module that a file imports, anywhere in the file."""
    found = set()
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in {module}"
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_dependencies_point_one_way(module: Path) -> None:
    name = part(module)
    if name in {"__init__", "__main__"}:
        return
    ours = {each.split(".")[1] for each in imports(module) if each.startswith("todo_api.")}
    assert ours - {name} <= LAYERS[name]


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_routes_schemas_and_auth_do_not_import_the_database(module: Path) -> None:
    if part(module) != "auth" and module.stem not in {"routes", "schemas"}:
        return
    for name in imports(module):
        assert name.split(".")[0] not in {"sqlalchemy", "sqlmodel", "psycopg"}
        assert not name.startswith("todo_api.database")


SQL = re.compile(r"\b(SELECT|INSERT INTO|UPDATE|DELETE FROM|set_config)\b")


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_only_statements_and_database_contain_sql(module: Path) -> None:
    """`tasks/statements.py` and migrations have SQL on tables. `database` has locks and pings."""
    if part(module) == "database" or module.name == "statements.py":
        return
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            assert not SQL.search(node.value), f"{module.name}:{node.lineno}"
    built = {"insert", "update", "delete", "select", "text"}
    assert not {name.rpartition(".")[2] for name in imports(module) if "sql" in name} & built - {
        "text"
    }


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_only_auth_creates_an_owner(module: Path) -> None:
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
            name = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
            assert name != "Owner" or module == SOURCE / "auth" / "owner.py"


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_only_commands_name_an_owner_without_a_token(module: Path) -> None:
    if module not in {SOURCE / "cli.py", SOURCE / "auth" / "owner.py"}:
        assert "named_by_operator" not in module.read_text()


def test_every_api_route_is_private() -> None:
    app = create_app(Settings.model_construct(), "postgresql://")
    public = {"/health", "/livez", "/readyz"}
    private = {route.path for route in app.routes if isinstance(route, PrivateRoute)}
    assert set(app.openapi()["paths"]) == private | public
    assert {path for path in app.openapi()["paths"] if path.startswith("/api/")} == private


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_only_settings_reads_the_environment(module: Path) -> None:
    """Only `settings` reads the environment, and not at import."""
    # Setting a variable is allowed, because Prometheus and OpenTelemetry have no other interface.
    # Removing one is allowed, because nothing else hides a variable from libpq.
    text = re.sub(r"os\.environ(\[.*\] = |\.setdefault\(|\.pop\()", "", module.read_text())
    assert "os.environ" not in text
    assert "getenv" not in text


def test_example_lists_every_setting() -> None:
    example = (ROOT / ".env.example").read_text()
    listed = re.findall(r"^#?\s?([A-Z][A-Z_]+)=", example, re.MULTILINE)
    assert sorted(listed) == sorted(variables())
    assert len(set(listed)) == len(listed)


def test_example_shows_the_defaults() -> None:
    example = (ROOT / ".env.example").read_text()
    shown = dict(re.findall(r"^# ([A-Z][A-Z_]+)=(\S*)", example, re.MULTILINE))
    for name, default in variables().items():
        if isinstance(default, bool):
            assert shown[name] == ("on" if default else "off"), name
        elif default is not None and not isinstance(default, tuple):
            assert shown[name] == str(default), name


def documented(heading: str) -> set[tuple[str, ...]]:
    """Return the code cells of a table of docs/api.md, row by row."""
    table = (ROOT / "docs" / "api.md").read_text().split(heading)[1].split("\n\n")[0]
    rows = re.findall(r"^\| (?:(\d{3}) \| )?`([a-z_]+)`", table, re.MULTILINE)
    return {tuple(filter(None, row)) for row in rows}


def test_docs_list_every_code_of_an_error() -> None:
    ours = [each for each in error_classes() if each.__module__.startswith("todo_api.")]
    assert documented("| status | code | when |") == {
        (str(each.status_code), each.code) for each in ours
    }


def test_docs_list_every_reason_of_a_field() -> None:
    fields, schemas = (SOURCE / "tasks" / f"{name}.py" for name in ("fields", "schemas"))
    raised = set(re.findall(r'invalid\("([a-z_]+)"\)', fields.read_text() + schemas.read_text()))
    given = {*_CODES.values(), *_MESSAGES, *raised} - {InvalidJson.code}
    assert given == set(FIELD_REASONS)
    assert documented("| reason | when |") == {(reason,) for reason in FIELD_REASONS}


def test_docs_link_only_to_existing_files() -> None:
    for paper in [*ROOT.glob("*.md"), *sorted((ROOT / "docs").rglob("*.md"))]:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", paper.read_text()):
            assert (paper.parent / target).exists(), f"{paper.name}: {target}"


LOCKS = [*ROOT.glob("*.lock"), *ROOT.glob("benchmarks/*.lock")]


@pytest.mark.parametrize("lock", LOCKS, ids=str)
def test_lock_has_hashes_and_does_not_name_an_index(lock: Path) -> None:
    text = lock.read_text()
    assert "://" not in text
    assert re.findall(r"^([a-z0-9-]+)==", text, re.MULTILINE)
    for block in re.split(r"\n(?=[a-z0-9])", text):
        assert not re.match(r"[a-z0-9-]+==", block) or "--hash=sha256:" in block


NODE_LOCKS = [
    lock
    for lock in [*ROOT.glob("*/*/package-lock.json"), *ROOT.glob("*/*/*/package-lock.json")]
    if "node_modules" not in lock.parts
]


@pytest.mark.parametrize("lock", NODE_LOCKS, ids=str)
def test_lock_of_node_packages_names_no_registry_and_has_hashes(lock: Path) -> None:
    packages = json.loads(lock.read_text())["packages"]
    del packages[""]
    assert packages
    for package in packages.values():
        assert "resolved" not in package
        assert "integrity" in package or package["inBundle"]


def test_package_does_not_import_a_framework() -> None:
    code = "import sys, todo_api; print({'fastapi', 'sqlalchemy', 'psycopg'} & set(sys.modules))"
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert output.stdout.strip() == "set()"
