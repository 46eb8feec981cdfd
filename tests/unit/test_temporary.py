"""Folders in a shared temporary folder: which are removed as abandoned, and which are not."""

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from todo_api.database import temporary

PREFIX = "todo-api-x-"


def abandoned(place: Path) -> Path:
    """Make a folder, with something in it, that nobody has locked."""
    folder, lock = temporary.make_locked(place, PREFIX)
    (folder / "below").mkdir()
    (folder / "below" / "file").touch()
    os.close(lock)
    return folder


def test_folder_is_removed_when_it_is_unlocked(tmp_path: Path) -> None:
    folder, lock = temporary.make_locked(tmp_path, PREFIX)
    temporary.remove_abandoned(tmp_path, PREFIX)
    assert folder.exists()
    os.close(lock)
    temporary.remove_abandoned(tmp_path, PREFIX)
    assert not folder.exists()


def test_child_that_inherits_the_lock_keeps_the_folder(tmp_path: Path) -> None:
    folder, lock = temporary.make_locked(tmp_path, PREFIX)
    command = [sys.executable, "-c", "input()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=[lock]) as child:
        os.close(lock)
        temporary.remove_abandoned(tmp_path, PREFIX)
        assert folder.exists()
        child.kill()
    temporary.remove_abandoned(tmp_path, PREFIX)
    assert not folder.exists()


def test_folder_that_is_being_made_is_left_alone(tmp_path: Path) -> None:
    """It is not locked yet."""
    folder = tmp_path / f"{PREFIX}new"
    folder.mkdir(mode=0o700)
    temporary.remove_abandoned(tmp_path, PREFIX)
    assert folder.exists()


def test_other_names_and_kinds_are_left_alone(tmp_path: Path) -> None:
    elsewhere = abandoned(tmp_path).rename(tmp_path / "elsewhere")
    link, file, pipe = (tmp_path / f"{PREFIX}{name}" for name in ("link", "file", "pipe"))
    link.symlink_to(elsewhere)
    file.touch(mode=0o755)
    os.mkfifo(pipe, mode=0o755)
    temporary.remove_abandoned(tmp_path, PREFIX)
    assert (elsewhere / "below" / "file").exists()
    assert link.is_symlink()
    assert file.exists()
    assert pipe.exists()


def test_link_inside_is_removed_and_its_target_is_not(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "file").touch()
    folder = abandoned(tmp_path)
    (folder / "link").symlink_to(target)
    temporary.remove_abandoned(tmp_path, PREFIX)
    assert not folder.exists()
    assert (target / "file").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder to another account")
def test_folder_of_another_account_is_left_alone(tmp_path: Path) -> None:
    folder = abandoned(tmp_path)
    os.chown(folder, 54321, 54321)
    temporary.remove_abandoned(tmp_path, PREFIX)
    assert (folder / "below" / "file").exists()


def test_nobody_can_lock_a_folder_before_its_maker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An open folder could be locked by anyone, and the maker would wait for ever."""
    modes: list[int] = []

    def flock(file: int, _: int) -> None:
        modes.append(os.fstat(file).st_mode & 0o777)

    monkeypatch.setattr(fcntl, "flock", flock)
    folder, lock = temporary.make_locked(tmp_path, PREFIX)
    os.close(lock)
    assert modes == [0o700]
    assert folder.stat().st_mode & 0o777 == 0o755
