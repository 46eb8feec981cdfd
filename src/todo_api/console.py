"""What the commands share: a new file that is complete or absent, output, and progress."""

import errno
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Self, TextIO, cast

from todo_api.errors import StartupError

PROGRESS_SECONDS = 1.0
"""After how long a command begins to say how far it is."""

PROGRESS_INTERVAL = 0.2


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """Yield a file that gets the name `path` when it is complete.

    Only its owner can read it. Nothing is left if the caller fails. Raises `StartupError` if
    `path` exists, or cannot be written.
    """
    _refuse_existing(path)
    try:
        number, name = tempfile.mkstemp(prefix=".todo-api-", dir=path.parent)
    except OSError as error:
        raise _not_written(path, error) from error
    temporary = Path(name)
    try:
        with os.fdopen(number, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        _publish(temporary, path)
    except OSError as error:
        raise _not_written(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def existing_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file to read, any number of times from its beginning. `-` is the standard input.

    Raises `StartupError` if it cannot be read.
    """
    try:
        with _standard_input() if str(path) == "-" else path.open("rb") as file:
            if file.seekable():
                yield file
                return
            with tempfile.TemporaryFile() as copy:
                shutil.copyfileobj(file, copy)
                yield cast("BinaryIO", copy)
    except OSError as error:
        raise StartupError(f"{path}: cannot be read ({error.strerror})") from error


def _standard_input() -> BinaryIO:
    return os.fdopen(0, "rb", closefd=False)


def _refuse_existing(path: Path) -> None:
    if path.exists() or path.is_symlink():
        raise StartupError(f"{path}: exists already; choose another name")


def _publish(temporary: Path, path: Path) -> None:
    """Give the file its name, which nothing may have. A rename would replace another file."""
    try:
        os.link(temporary, path)
    except OSError:  # somebody took the name, or the file system has no hard links
        _refuse_existing(path)
        temporary.rename(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _not_written(path: Path, error: OSError) -> StartupError:
    return StartupError(f"{path}: cannot be written ({error.strerror})")


@contextmanager
def standard_output() -> Iterator[BinaryIO]:
    """Yield the standard output for bytes, which are written when the caller is done.

    Raises `StartupError` if it cannot be written, and exits quietly if its reader has left.
    """
    try:
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
    except OSError as error:
        discard_output()
        if error.errno == errno.EPIPE:
            sys.exit(1)
        raise StartupError(f"standard output: cannot be written ({error.strerror})") from error


def discard_output() -> None:
    """Discard what is not printed yet, and all later output.

    Otherwise Python would try again at exit
    (https://docs.python.org/3/library/signal.html#note-on-sigpipe).
    """
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)


def note(text: str) -> None:
    """Say on a terminal what may take longer than a second."""
    if sys.stderr.isatty():
        with suppress(OSError):  # the terminal is gone, and the work goes on
            sys.stderr.write(f"{text}\n")
            sys.stderr.flush()


class Progress:
    """Says on a terminal how many things are done, if that takes longer than a second.

    A context manager. It writes to the standard error, and removes its line at the end.
    """

    def __init__(
        self,
        things: str,
        terminal: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._things = things
        self._terminal = terminal or sys.stderr
        self._clock = clock
        self._count = 0
        self._next = clock() + PROGRESS_SECONDS
        self._is_shown = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_shown:
            self._write("\r\x1b[K")

    def advance(self, count: int = 1) -> None:
        """Count this many things."""
        self._count += count
        now = self._clock()
        if now < self._next:
            return
        self._next = now + PROGRESS_INTERVAL
        if self._terminal.isatty():
            self._is_shown = True
            self._write(f"\r{self._count:,} {self._things}")

    def _write(self, text: str) -> None:
        with suppress(OSError):  # the terminal is gone, and the work goes on
            self._terminal.write(text)
            self._terminal.flush()
