"""The kinds of sources of rows: how a kind is recognised, read and fingerprinted."""

import datetime
import glob
import hashlib
import itertools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tuneline.errors import DataError
from tuneline.prepare.sources import builtin, hub
from tuneline.prepare.sources.files import SUFFIXES, read_file
from tuneline.prepare.sources.row import Selection, SourceRow
from tuneline.runtime.source_names import is_hub_id, list_builtins, looks_like_a_path

logger = logging.getLogger(__name__)

KindName = Literal["builtin", "files", "hub"]


@dataclass(frozen=True)
class Kind:
    """The functions for one kind of source."""

    read: Callable[[str, Selection], Iterator[SourceRow]]
    """Function that yields the rows of a source."""
    fingerprint: Callable[[str, str | None], str]
    """Function of a source and a revision; returns a text that changes when the rows change."""


def read_rows(source: str, selection: Selection | None = None) -> Iterator[SourceRow]:
    """Yield the rows of a Hub dataset, file, directory, glob of files or built-in dataset.

    Raises:
        DataError: the source does not exist or is of no known kind.
        HubError: the Hub could not be reached.
    """
    return KINDS[kind_of(source)].read(source, selection or Selection())


def kind_of(source: str) -> KindName:
    """Return the kind of a source; an existing path is never taken for a Hub ID.

    Raises:
        DataError: the source does not exist or is of no known kind.
    """
    if builtin.find_builtin(source) is not None:
        return "builtin"
    path = Path(source).expanduser()
    if path.is_file() or path.is_dir() or any(mark in source for mark in "*?["):
        _find_files(source)
        return "files"
    if looks_like_a_path(source) or path.suffix.lower() in SUFFIXES:
        raise DataError(f"there is no file or directory {source}")
    if not is_hub_id(source):
        raise DataError(
            f"'{source}' is not a file, a directory or a Hub ID: name e.g. rows.jsonl, "
            f"data/*.parquet, openai/gsm8k or {list_builtins(list(builtin.BUILTINS))}"
        )
    return "hub"


def _find_files(source: str) -> list[Path]:
    """Return the files of a source that have a known suffix, sorted."""
    path = Path(source).expanduser()
    suffixes = ", ".join(SUFFIXES)
    if path.is_file():
        if path.suffix.lower() not in SUFFIXES:
            raise DataError(f"{source} has a type that cannot be read; supported types: {suffixes}")
        return [path]
    if path.is_dir():
        candidates = sorted(path.rglob("*"))
    else:
        candidates = [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]
    candidates = [file for file in candidates if file.is_file()]
    files = [file for file in candidates if file.suffix.lower() in SUFFIXES]
    ignored = sorted({file.name for file in candidates} - {file.name for file in files})
    if not files:
        raise DataError(f"{source} has no file that can be read; supported types: {suffixes}")
    if ignored:
        logger.warning(
            "%s: %d files of other types are ignored, e.g. %s", source, len(ignored), ignored[0]
        )
    return files


def _read_files(source: str, selection: Selection) -> Iterator[SourceRow]:
    return itertools.chain.from_iterable(read_file(file) for file in _find_files(source))


def _hash_files(source: str, revision: str | None) -> str:
    digest = hashlib.sha256()
    for file in _find_files(source):
        digest.update(f"{file.name}\0".encode())
        with open(file, "rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


KINDS: dict[KindName, Kind] = {
    "builtin": Kind(builtin.read, builtin.fingerprint),
    "files": Kind(_read_files, _hash_files),
    "hub": Kind(hub.read, hub.fingerprint),
}


def date_of(source: str, revision: str | None) -> datetime.date:
    """Return the date (UTC) of the newest file of a source, or of its commit on the Hub.

    Raises:
        DataError: the source does not exist.
        HubError: the Hub could not be reached.
    """
    kind = kind_of(source)
    if kind == "builtin":
        return builtin.DATE
    if kind == "hub":
        return hub.date_of(source, revision)
    newest = max(file.stat().st_mtime for file in _find_files(source))
    return datetime.datetime.fromtimestamp(newest, datetime.UTC).date()
