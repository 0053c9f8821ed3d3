"""Publish into a directory: the very tree that a push would send."""

import shutil
from pathlib import Path

from tuneline.artifacts import PublishedRepo
from tuneline.errors import OutputExistsError
from tuneline.publish.staging import MARKER_FILE, StagedRepo


def write_tree(staged_root: Path, staged: list[StagedRepo], target: Path) -> list[PublishedRepo]:
    """Put the staged tree at `target`; a tree that we made before is replaced as a whole.

    Raises:
        OutputExistsError: `target` holds something that tuneline did not make.
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
    if target.exists():
        target.replace(previous)
    try:
        staged_root.replace(target)
    except OSError:
        if previous.exists():
            previous.replace(target)
        raise
    shutil.rmtree(previous, ignore_errors=True)
    return repos
