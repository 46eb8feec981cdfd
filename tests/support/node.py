"""The TypeScript compiler and the generators of clients, which are Node programs."""

import shutil
import subprocess
from pathlib import Path

from support.program import environment

FOLDER = Path(__file__).parents[1] / "contract" / "generators"
PACKAGES = FOLDER / "node_modules"
QUIET = {"REDOCLY_TELEMETRY": "off", "REDOCLY_SUPPRESS_UPDATE_NOTICE": "true"}


def missing() -> str | None:
    """Say in one sentence what is missing to run the generators, or None."""
    if shutil.which("node") is None:
        return "The program `node` (20.19 or newer) is not on the PATH."
    if not (PACKAGES / ".package-lock.json").exists():
        return "The packages are not installed: run `make .venv/generators`."
    return None


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a program of Node's packages, or Node itself, in a folder."""
    program, *rest = arguments
    found = PACKAGES / ".bin" / program
    return subprocess.run(
        [str(found) if found.exists() else program, *rest],
        cwd=folder,
        env=environment(CI="true", NO_COLOR="1", **QUIET),
        capture_output=True,
        text=True,
        check=False,
    )


def succeed(folder: Path, *arguments: str) -> str:
    """Run a program that must succeed, and return what it prints."""
    done = run(folder, *arguments)
    assert done.returncode == 0, f"{' '.join(arguments)}\n{done.stdout}{done.stderr}"
    return done.stdout


def copy_sources(folder: Path) -> None:
    """Copy our TypeScript and the configuration to a folder, and link the packages there."""
    for source in FOLDER.iterdir():
        if source.is_file() and not source.name.startswith("package"):
            shutil.copy(source, folder)
    (folder / "node_modules").symlink_to(PACKAGES)
