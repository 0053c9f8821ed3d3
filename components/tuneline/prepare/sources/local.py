"""The files of this machine that a directory or a pattern of file names stands for."""

import glob
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from tuneline.errors import DataError
from tuneline.runtime.source_names import check_link, fixed_part


def is_hidden(name: str) -> bool:
    """Return whether a file or directory is left out, by its path within its source."""
    return any(part.startswith((".", "__")) for part in PurePosixPath(name).parts)


def files_below(directory: Path) -> Iterator[Path]:
    """Yield the files below a directory; a directory that links lead to twice is read once.

    Raises:
        DataError: a link leads out of the directory, or to nothing.
    """
    seen = set()
    for folder, folders, names in os.walk(directory, followlinks=True):
        status = os.stat(folder)
        # A hidden directory is left out, but a link to it is not.
        identity = (status.st_dev, status.st_ino, is_hidden(os.path.relpath(folder, directory)))
        if identity in seen:
            folders.clear()
            continue
        seen.add(identity)
        folders[:] = sorted(name for name in folders if _is_taken(Path(folder, name), directory))
        for name in names:
            path = Path(folder, name)
            if _is_taken(path, directory) and path.is_file():
                yield path


def matching_files(pattern: str) -> list[Path]:
    """Return the files that match a pattern.

    Raises:
        DataError: a file is behind a link that leads out of the directory in front of the first
            wildcard.
    """
    root = Path(fixed_part(pattern) or ".")
    names = sorted(glob.glob(pattern, recursive=True))
    paths = [path for path in map(Path, names) if path.is_file()]
    for path in paths:
        check_link(path, root, DataError)
    return paths


def _is_taken(path: Path, directory: Path) -> bool:
    """Return whether to look at a path below a directory: not at a link that is left out.

    Raises:
        DataError: the path is a link out of the directory, or to nothing.
    """
    if not path.is_symlink():
        return True
    if is_hidden(str(path.relative_to(directory))):
        return False
    check_link(path, directory, DataError)
    if not os.path.exists(path):
        raise DataError(
            f"{path} is a link to {os.readlink(path)}, which does not exist: remove the link, or "
            "restore the file that it leads to"
        )
    return True
