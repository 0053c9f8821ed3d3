"""Temporary directories that do not outlive a killed process for long.

A process that receives SIGKILL cannot remove its temporary directory. Each directory made here is
locked by its process, and the kernel releases the lock when the process ends, however it ends. The
next process that makes a directory in the same place removes those that nobody holds.
"""

import contextlib
import errno
import fcntl
import glob
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

PREFIX = "tuneline."
"""Beginning of the names of scratch directories."""
# Locks of another machine may be invisible on a shared volume, so its directories are left alone.
_HOST = re.sub(r"[^\w-]", "_", platform.node())


@contextlib.contextmanager
def scratch_directory(
    parent: str | Path | None = None,
    *,
    prefix: str = PREFIX,
    rescue: Callable[[Path], None] | None = None,
) -> Iterator[Path]:
    """Create a directory for the body, and remove it afterwards if it is still there.

    Directories of the same parent and prefix whose processes on this machine were killed are
    removed first.

    Args:
        parent: directory to create it in; None: the directory for temporary files (TMPDIR).
        prefix: beginning of its name.
        rescue: function that takes what must not be lost out of a directory of a killed process.
    """
    parent = Path(tempfile.gettempdir() if parent is None else parent)
    remove_leftovers(parent, prefix=prefix, rescue=rescue)
    path, lock = _create(parent, prefix)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def remove_leftovers(
    parent: Path, *, prefix: str, rescue: Callable[[Path], None] | None = None
) -> list[Path]:
    """Remove the scratch directories of killed processes of this machine.

    Args:
        parent: directory in which they are.
        prefix: beginning of their names; they may go on with anything, as `.` does for `.merged.`.
        rescue: function that is called with each directory before it is removed.

    Returns:
        The directories that were removed.
    """
    removed = []
    for path in parent.glob(f"{glob.escape(prefix)}*"):
        if not re.search(rf"\.{re.escape(_HOST)}\.\w{{8}}$", path.name):
            continue
        with contextlib.suppress(OSError):
            if path.lstat().st_uid != os.geteuid():
                continue
            lock = _lock(path)
            try:
                if rescue is not None:
                    rescue(path)
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(lock)
            removed.append(path)
    return removed


def _create(parent: Path, prefix: str) -> tuple[Path, int | None]:
    """Create and lock a directory; the lock is None where the file system has no locks."""
    while True:
        path = Path(tempfile.mkdtemp(prefix=f"{prefix}{_HOST}.", dir=parent))
        try:
            lock = _lock(path)
        except OSError as error:
            # In these cases, another process is removing the directory, which was not locked yet.
            if error.errno in (errno.EWOULDBLOCK, errno.ENOENT):
                continue
            return path, None
        if path.exists():
            return path, lock
        os.close(lock)


def _lock(path: Path) -> int:
    """Lock a directory, and return the descriptor that holds the lock.

    Raises:
        OSError: the directory is locked or gone, or is no directory, or cannot be locked.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor
