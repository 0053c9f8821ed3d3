"""Publish to a directory, which gets the tree that a push to the Hub would send."""

import shutil
from pathlib import Path

from tuneline.artifacts import PublishedRepo
from tuneline.errors import OutputExistsError, StorageError
from tuneline.publish.staging import MARKER_FILE, StagedRepo


def write_tree(staged_root: Path, staged: list[StagedRepo], target: Path) -> list[PublishedRepo]:
    """Move the staged tree to `target`; replace a tree that tuneline published there before.

    Args:
        staged_root: the staged tree, on the file system of `target`.
        staged: the repositories in the tree.
        target: the directory.

    Raises:
        OutputExistsError: `target` holds something that tuneline did not make.
        StorageError: `target` cannot be replaced; its content is unchanged.
    """
    if target.exists():
        foreign = (
            [path.name for path in target.iterdir() if not (path / MARKER_FILE).is_file()]
            if target.is_dir()
            else [target.name]
        )
        if foreign:
            raise OutputExistsError(
                f"{target} holds {', '.join(sorted(foreign)[:3])}, which tuneline did not make. "
                "Name another directory in publish_to"
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
        # After an exception between the two renames, the old tree is in the scratch directory. It
        # is moved back, because the scratch directory is deleted.
        if previous.exists() and not target.exists():
            previous.replace(target)
        if not isinstance(error, OSError):
            raise
        raise StorageError(
            f"{target} cannot be replaced ({error.strerror}): it may be the root of a mounted "
            "volume, or another run may be publishing to it. Name a directory below it in "
            "publish_to, or run this step again"
        ) from error
    shutil.rmtree(previous, ignore_errors=True)
    return repos
