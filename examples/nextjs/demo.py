"""Run the example on this machine: the API with its embedded PostgreSQL, and the front end.

`make demo` starts this program. It keeps its data in `.data/demo`. Ctrl-C ends everything.
"""

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from todo_api.database import embedded
from todo_api.errors import StartupError

FOLDER = Path(__file__).resolve().parent
DATA = Path(".data", "demo")
START_SECONDS = 60
STOP_SECONDS = 30


def main() -> None:
    """Start everything, print the address, and run until a signal or an error."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _stop)
    embedded.forget_libpq_variables()
    front_end, api = _free_port(3000), _free_port(8000)
    with ExitStack() as running:
        database = running.enter_context(embedded.EmbeddedPostgres.start(DATA / "postgres"))
        variables = {
            # The developer's own settings must not reach the demo.
            **{name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ},
            "API_URL": f"http://localhost:{api}",
            "BETTER_AUTH_SECRET": _secret(),
            "BETTER_AUTH_URL": f"http://localhost:{front_end}",
            "CORS_ORIGINS": f"http://localhost:{front_end}",
            "DATABASE_URL": database.url,
            "NEXT_TELEMETRY_DISABLED": "1",
        }
        # Better Auth first, because the API fetches its keys.
        next_js = ["node", str(FOLDER / "node_modules/next/dist/bin/next"), "start", str(FOLDER)]
        next_js += ["--hostname", "127.0.0.1", "--port", str(front_end)]
        processes = [running.enter_context(_process("front-end", next_js, variables))]
        _wait_for(f"http://127.0.0.1:{front_end}/api/auth/jwks", processes[0])
        del variables["BETTER_AUTH_SECRET"]  # the API needs the published keys only
        todo_api = [sys.executable, "-m", "todo_api", "serve", "--port", str(api)]
        processes += [running.enter_context(_process("api", todo_api, variables))]
        _wait_for(f"http://127.0.0.1:{api}/readyz", processes[1])
        print(f"Open http://localhost:{front_end} and create an account.", flush=True)
        while all(process.poll() is None for process in processes):
            time.sleep(0.2)  # another process has no event to wait for
    raise StartupError(f"a part of the demo has ended; see the logs in {DATA}")


def _stop(*_: object) -> None:
    """End the program in order. A second signal does not disturb that."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sys.exit(0)


def _free_port(preferred: int) -> int:
    """Return the preferred port, or another one if that is taken."""
    for port in (preferred, 0):
        try:
            with socket.create_server(("127.0.0.1", port)) as listener:
                return int(listener.getsockname()[1])
        except OSError:
            continue
    raise StartupError("no port is free on 127.0.0.1")


def _secret() -> str:
    """Return Better Auth's secret, made at the first start: the stored keys are useless without."""
    file = DATA / "secret"
    if not file.exists():
        file.touch(mode=0o600)
        file.write_text(secrets.token_urlsafe(32))
    return file.read_text()


@contextmanager
def _process(
    name: str, command: list[str], variables: Mapping[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program, and end it afterwards. It writes to a log in the data folder."""
    with (DATA / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=DATA, env=variables, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    """Wait until an address answers."""
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=START_SECONDS):
                return
        except OSError:
            time.sleep(0.1)  # another process has no event to wait for
    raise StartupError(f"the demo does not start; see the logs in {DATA}")


if __name__ == "__main__":
    try:
        main()
    except StartupError as error:
        sys.exit(f"demo: {error}")
