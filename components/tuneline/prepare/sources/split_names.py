"""Name the split that a file belongs to, as the `datasets` library does: by its path."""

import re
from collections.abc import Iterable
from pathlib import PurePosixPath

from datasets.data_files import FILES_TO_IGNORE, NON_WORDS_CHARS, SPLIT_KEYWORDS

from tuneline.prepare.sources.files import can_read, is_document
from tuneline.prepare.sources.row import DEFAULT_SPLIT
from tuneline.prepare.sources.stored import StoredFile

_SEPARATOR = f"[{NON_WORDS_CHARS}]"
_WORDS = {str(split): "|".join(words) for split, words in SPLIT_KEYWORDS.items()}
_IN_DIRECTORY = {
    split: re.compile(rf"(?:.*{_SEPARATOR})?(?:{words})(?:{_SEPARATOR}.*)?")
    for split, words in _WORDS.items()
}
_IN_NAME = {
    split: re.compile(rf"(?:.*{_SEPARATOR})?(?:{words}){_SEPARATOR}.*")
    for split, words in _WORDS.items()
}
_SHARD = re.compile(r"data/(\w+(?:\.\w+)*)-\d{5}-of-\d{5}[^/]*\.[^/]*")
"""Name of a file that push_to_hub writes."""

Splits = dict[str, list[StoredFile]]


def holds_rows(name: str) -> bool:
    """Return whether a file of this name has rows, and is neither a document nor about the rows."""
    is_about = PurePosixPath(name).name in FILES_TO_IGNORE
    return can_read(name) and not is_document(name) and not is_about


def split_by_name(files: Iterable[StoredFile]) -> tuple[Splits, list[StoredFile]]:
    """Return the files by split, as the `datasets` library names splits, and the other files.

    If no name contains the name of a split, all files are the split train.
    """
    files = list(files)
    for split_of in (_shard_split, _directory_split, split_of_name):
        splits: Splits = {}
        others = []
        for file in files:
            split = split_of(file.name)
            if split is None:
                others.append(file)
            else:
                splits.setdefault(split, []).append(file)
        if splits:
            return splits, others
    return ({DEFAULT_SPLIT: files} if files else {}), []


def _shard_split(name: str) -> str | None:
    match = _SHARD.fullmatch(name)
    return match[1] if match else None


def _directory_split(name: str) -> str | None:
    for part in PurePosixPath(name).parts[:-1]:
        for split, pattern in _IN_DIRECTORY.items():
            if pattern.fullmatch(part):
                return split
    return None


def split_of_name(name: str) -> str | None:
    """Return the split that the last part of a path names; None if it names none."""
    last = PurePosixPath(name).name
    return next((split for split, mark in _IN_NAME.items() if mark.fullmatch(last)), None)
