"""Folders in the shared temporary folder, which the next start removes if their users were killed.

Each folder is locked with flock(2) by the processes that use it, and the kernel frees the lock
when the last of them has ended. A folder is ours only if our account owns it: in a folder with the
sticky bit, such as /tmp, no other account can then rename, replace or remove it.
"""

import fcntl
import os
import shutil
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

_MODE = 0o755
"""The mode of a folder that has been locked. mkdtemp makes it 0700, so nobody can lock it first."""


def make_locked(place: Path, prefix: str) -> tuple[Path, int]:
    """Make a folder that every account can enter. Return it and the open file that locks it.

    A child process that inherits the file keeps the folder locked too.
    """
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=place))
    try:
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(lock, fcntl.LOCK_EX)
        folder.chmod(_MODE)
    except BaseException:
        folder.rmdir()
        raise
    return folder, lock


def remove_abandoned(place: Path, prefix: str) -> None:
    """Remove our folders that no living process has locked."""
    for folder in place.glob(f"{prefix}*"):
        with suppress(OSError):  # not a folder, not readable, or removed meanwhile
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                found = os.fstat(lock)
                if (found.st_uid, stat.S_IMODE(found.st_mode)) == (os.geteuid(), _MODE):
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)
