"""Publish into a directory: the very tree that a push would send."""

import shutil
from pathlib import Path

from tuneline.artifacts import PublishedRepo
from tuneline.errors import OutputExistsError, StorageError
from tuneline.publish.staging import MARKER_FILE, StagedRepo


def write_tree(staged_root: Path, staged: list[StagedRepo], target: Path) -> list[PublishedRepo]:
    """Put the staged tree at `target`; a tree that we made before is replaced as a whole.

    Raises:
        OutputExistsError: `target` holds something that tuneline did not make.
        StorageError: it cannot be replaced; what it held is still there.
    """
    if target.exists():
        foreign = (
            [path.name for path in target.iterdir() if not (path / MARKER_FILE).is_file()]
            if target.is_dir()
            else [target.name]
        )
        if foreign:
            raise OutputExistsError(
                f"{target} holds {', '.join(sorted(foreign)[:3])}, which tuneline did not make: "
                "name another directory in publish_to"
            )
    repos = [
        PublishedRepo(
            repo=str(target / repo.folder.name),
            kind=repo.kind,
            url=(target / repo.folder.name).as_uri(),
            num_files=len(repo.files()),
            num_bytes=sum(path.stat().st_size for path in repo.files()),
        )
        for repo in staged
    ]
    previous = staged_root.with_name("previous")
    try:
        if target.exists():
            target.replace(previous)
        staged_root.replace(target)
    except BaseException as error:
        # Whatever ends it between the two, what was there is not lost with the scratch directory.
        if previous.exists() and not target.exists():
            previous.replace(target)
        if not isinstance(error, OSError):
            raise
        raise StorageError(
            f"{target} cannot be put in its place ({error.strerror}): it must not be a mounted "
            "volume itself, nor another run's target now; name a directory below it in "
            "publish_to, or run this step again"
        ) from error
    shutil.rmtree(previous, ignore_errors=True)
    return repos
