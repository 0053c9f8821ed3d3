"""Publish to a directory, which gets the tree that a push to the Hub would send."""

import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from tuneline.artifacts import PublishedRepo
from tuneline.errors import OutputExistsError, StorageError
from tuneline.publish.card_parts import CARD_FILE
from tuneline.publish.previous import MARKER_FILE, Previous, adapt, check_ours, read_bundle
from tuneline.publish.staging import StagedRepo

logger = logging.getLogger(__name__)

_PREVIOUS = "previous"
"""Directory, in the scratch directory, for the repositories that are replaced."""


def write_tree(staged_root: Path, staged: list[StagedRepo], target: Path) -> list[PublishedRepo]:
    """Move the staged repositories into `target`; replace those that tuneline published there.

    Other directories and files in `target` stay, and so do files that people added to a repository.

    Args:
        staged_root: the directory with the staged repositories, on the file system of `target`.
        staged: the repositories.
        target: the directory.

    Raises:
        OutputExistsError: `target` or a repository in it is something that tuneline did not make.
        StorageError: a repository cannot be replaced; the content of `target` is unchanged.
    """
    previous = check_tree(staged, target)
    published = []
    for repo in staged:
        place, held = target / repo.folder.name, previous[repo.repo]
        adapt(repo.folder, held)
        files = repo.files()
        published.append(
            PublishedRepo(
                repo=str(place),
                kind=repo.kind,
                url=place.as_uri(),
                num_files=len(files),
                num_bytes=sum(path.stat().st_size for path in files.values()),
            )
        )
        for name in held.theirs:
            _carry_over(place / name, repo.folder / name)
    _replace(staged_root.with_name(_PREVIOUS), staged, target)
    return published


def put_back(scratch: Path) -> None:
    """Put repositories back that a killed process had set aside, and not replaced by new ones.

    Args:
        scratch: the scratch directory of that process, in the directory that it published to.
    """
    for old in sorted((scratch / _PREVIOUS).glob("*")):
        place = scratch.parent / old.name
        if not place.exists():
            old.replace(place)
            logger.warning("%s was put back: the process that was replacing it was killed", place)


def check_tree(staged: Sequence[StagedRepo], target: Path) -> dict[str, Previous]:
    """Return what `target` holds for each repository, if this run may replace it.

    Raises:
        OutputExistsError: `target` or a repository in it is something that tuneline did not make.
    """
    if target.exists() and not target.is_dir():
        raise OutputExistsError(f"{target} is a file. Name a directory in publish_to")
    previous = {repo.repo: _previous(target / repo.folder.name) for repo in staged}
    for repo in staged:
        check_ours(previous[repo.repo], kind=repo.kind, names=repo.files().keys())
    return previous


def _previous(place: Path) -> Previous:
    """Return what a repository's directory holds: nothing if there is none.

    Raises:
        OutputExistsError: it is no directory.
    """
    if place.exists() and not place.is_dir():
        raise OutputExistsError(
            f"{place} is a file, which tuneline did not make. Name another directory in publish_to"
        )
    texts = {
        name: (place / name).read_text(encoding="utf-8", errors="replace")
        for name in (MARKER_FILE, CARD_FILE)
        if (place / name).is_file()
    }
    files = {
        path.relative_to(place).as_posix()
        for path in place.rglob("*")
        if path.is_symlink() or not path.is_dir()
    }
    bundle = read_bundle(texts.get(MARKER_FILE))
    return Previous(str(place), frozenset(files), bundle, texts.get(CARD_FILE))


def _carry_over(old: Path, new: Path) -> None:
    """Put a file that people added into the new version of its repository."""
    if new.exists():
        return
    new.parent.mkdir(parents=True, exist_ok=True)
    if old.is_symlink():
        new.symlink_to(os.readlink(old))
        return
    try:
        os.link(old, new)
    except OSError:
        shutil.copy2(old, new)


def _replace(old_root: Path, staged: list[StagedRepo], target: Path) -> None:
    """Put all staged repositories in their places, or none of them.

    Args:
        old_root: a directory on the same file system that is deleted afterwards, for the
            repositories that are replaced.
        staged: the repositories.
        target: the directory with the places.
    """
    old_root.mkdir()
    try:
        for repo in staged:
            place = target / repo.folder.name
            if place.exists():
                place.replace(old_root / place.name)
            repo.folder.replace(place)
    except BaseException as error:
        # What has happened is read from the directories, because the exception may have come
        # between any two renames.
        for repo in staged:
            place, old = target / repo.folder.name, old_root / repo.folder.name
            if not repo.folder.exists() and place.exists():
                place.replace(repo.folder)
            if old.exists():
                old.replace(place)
        if not isinstance(error, OSError):
            raise
        raise StorageError(
            f"{target} cannot be replaced ({error.strerror}): a repository in it may be the root "
            "of a mounted volume, or another run may be publishing to it. Name another directory "
            "in publish_to, or run this step again"
        ) from error
