"""New files, which are complete or absent, and progress, which is only on a terminal."""

import errno
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from todo_api.console import Progress, new_file
from todo_api.errors import StartupError


@contextmanager
def terminal() -> Iterator[tuple[int, io.TextIOWrapper]]:
    ours, theirs = os.openpty()
    with os.fdopen(theirs, "w") as file:
        yield ours, file
    os.close(ours)


def shown(ours: int, file: io.TextIOWrapper) -> str:
    file.write("|")  # so that there is something to read
    file.flush()
    text = ""
    while not text.endswith("|"):  # it may arrive in parts
        text += os.read(ours, 1000).decode()
    return text.removesuffix("|")


def test_progress_begins_after_a_second_and_leaves_no_line() -> None:
    times = iter((0.0, 0.5, 1.0, 1.1, 1.25))
    with terminal() as (ours, file):
        with Progress("rows", file, lambda: next(times)) as progress:
            progress.advance(500)
            assert not shown(ours, file)
            progress.advance(1000)
            assert shown(ours, file) == "\r1,500 rows"
            progress.advance(100)
            assert not shown(ours, file)
            progress.advance()
            assert shown(ours, file) == "\r1,601 rows"
        assert shown(ours, file) == "\r\x1b[K"


def test_short_work_shows_nothing() -> None:
    with terminal() as (ours, file):
        with Progress("rows", file, lambda: 0.0) as progress:
            progress.advance()
        assert not shown(ours, file)


@pytest.mark.parametrize("count", [1, 1000])
def test_progress_shows_nothing_in_a_file(count: int) -> None:
    file, times = io.StringIO(), iter((0.0, 60.0))
    with Progress("rows", file, lambda: next(times)) as progress:
        progress.advance(count)
    assert not file.getvalue()


def test_work_goes_on_without_its_terminal() -> None:
    ours, theirs = os.openpty()
    times = iter((0.0, 60.0))
    with (
        os.fdopen(theirs, "w", closefd=False) as file,
        Progress("rows", file, lambda: next(times)) as progress,
    ):
        os.close(ours)
        progress.advance()
    os.close(theirs)


@pytest.fixture
def without_hard_links(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system such as FAT, of which a test cannot have one."""

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuse)


@pytest.mark.usefixtures("without_hard_links")
def test_a_file_system_without_hard_links_gets_the_file_too(tmp_path: Path) -> None:
    with new_file(tmp_path / "new") as file:
        file.write(b"content")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"content"]


@pytest.mark.usefixtures("without_hard_links")
def test_there_as_well_no_file_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "new"
    with pytest.raises(StartupError, match="exists already"), new_file(path):
        path.write_text("precious")
    assert [each.read_text() for each in tmp_path.iterdir()] == ["precious"]


def test_a_failure_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="invalid literal"), new_file(tmp_path / "new") as file:
        file.write(str(int("not a number")).encode())
    assert not list(tmp_path.iterdir())
