"""The example front end in `examples/nextjs`, built and served."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import httpx2

from support.http import LOCAL
from support.program import environment

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "nextjs"
AXE = FOLDER / "node_modules" / "axe-core" / "axe.min.js"
SECRET = "the secret of the example's Better Auth"

_BUILD = FOLDER / ".next" / "BUILD_ID"
_START_SECONDS = 30


def missing() -> str | None:
    """Say in one sentence what is missing to run the example, or None."""
    if shutil.which("node") is None:
        return "The program `node` (20.9 or newer) is not on the PATH."
    if not _BUILD.exists():
        return "`make .venv/example` has not been run."
    if any(source.stat().st_mtime > _BUILD.stat().st_mtime for source in _sources()):
        return "The example is newer than its build: run `make .venv/example`."
    return None


def _sources() -> Iterator[Path]:
    for folder in ("app", "components", "lib"):
        yield from (path for path in (FOLDER / folder).rglob("*") if path.is_file())
    yield FOLDER / "instrumentation.ts"


@contextmanager
def served(database_url: str, port: int, api: str, log: Path) -> Iterator[str]:
    """Serve the example on a port of this machine, and yield its address."""
    address = f"http://localhost:{port}"
    variables = environment(
        API_URL=api,
        BETTER_AUTH_SECRET=SECRET,
        BETTER_AUTH_URL=address,
        DATABASE_URL=database_url,
        NEXT_TELEMETRY_DISABLED="1",
    )
    next_js = FOLDER / "node_modules" / "next" / "dist" / "bin" / "next"
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["node", next_js, "start", FOLDER, "--hostname", "127.0.0.1", "--port", str(port)],
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=output,
            start_new_session=True,
        )
    assert process.stdout is not None
    try:
        assert any(b"Ready" in line for line in process.stdout), log.read_text()
        # The first answer comes when the tables are there.
        httpx2.get(
            f"{address}/api/auth/jwks", **LOCAL | {"timeout": _START_SECONDS}
        ).raise_for_status()
        yield address
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@contextmanager
def demo(folder: Path) -> Iterator[tuple[subprocess.Popen[str], IO[str]]]:
    """Run what `make demo` runs, with its data in a folder. Yield it, and what it prints."""
    process = subprocess.Popen(
        [sys.executable, FOLDER / "demo.py"],
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    with process.stdout as output:
        try:
            yield process, output
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
