"""Progress on a terminal, and nowhere else."""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from todo_api.console import Progress


@contextmanager
def terminal() -> Iterator[tuple[int, io.TextIOWrapper]]:
    ours, theirs = os.openpty()
    with os.fdopen(theirs, "w") as file:
        yield ours, file
    os.close(ours)


def shown(ours: int, file: io.TextIOWrapper) -> str:
    file.write("|")  # so that there is something to read
    file.flush()
    return os.read(ours, 1000).decode().removesuffix("|")


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
