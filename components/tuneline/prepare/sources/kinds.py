"""The kinds of sources of rows: how a kind is recognised, read, fingerprinted and dated."""

import datetime
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tuneline.errors import DataError
from tuneline.prepare.sources import builtin, hub
from tuneline.prepare.sources.described import CARD, SAVED_DATASET, SAVED_DICT
from tuneline.prepare.sources.files import can_read, read_file, supported_types
from tuneline.prepare.sources.layout import choose
from tuneline.prepare.sources.row import Remarks, Selection, SourceRow
from tuneline.prepare.sources.stored import Listing, has_magic, list_source
from tuneline.runtime.redaction import redacted
from tuneline.runtime.source_names import (
    STORES,
    UPLOAD_PREFIX,
    claim_problem,
    is_claim,
    is_hub_id,
    list_builtins,
    looks_like_a_path,
    path_on_claim,
    scheme_of,
    store_of,
)

KindName = Literal["builtin", "files", "claim", "store", "hub"]

_DESCRIBING = (CARD, SAVED_DATASET, SAVED_DICT)
"""Files that say which files hold rows."""


@dataclass(frozen=True)
class Kind:
    """The functions for one kind of source."""

    read: Callable[[str, Selection, Remarks], Iterator[SourceRow]]
    """Function that yields the rows of a source."""
    fingerprint: Callable[[str, str | None], str]
    """Function of a source and a revision; returns a text that changes when the rows change."""
    date_of: Callable[[str, str | None], datetime.date | None]
    """Function of a source and a revision; returns the date of the last change, if it is known."""


def read_rows(
    source: str, selection: Selection | None = None, remarks: Remarks | None = None
) -> Iterator[SourceRow]:
    """Yield the rows of a dataset.

    Args:
        source: a Hub ID, a file, a directory, a glob of files, an address in a store,
            claim:NAME/PATH or builtin:NAME.
        selection: the part to read; None: the split train.
        remarks: receives what a user should know about the reading.

    Raises:
        DataError: the source does not exist or is of no known kind.
        CredentialsError: a store refused the credentials.
        HubError: the Hub or a store could not be reached.
    """
    return KINDS[kind_of(source)].read(source, selection or Selection(), remarks or Remarks())


def date_of(source: str, revision: str | None) -> datetime.date:
    """Return the date (UTC) of the newest file of a source, or of its commit on the Hub.

    Raises:
        DataError: the source does not exist, or its date is not known.
        HubError: the Hub or a store could not be reached.
    """
    date = KINDS[kind_of(source)].date_of(source, revision)
    if date is None:
        raise DataError(
            f"the chat template shows a date, but the date of {redacted(source)} is not known: set "
            "prepare.date, e.g. to 2026-01-31"
        )
    return date


def kind_of(source: str) -> KindName:
    """Return the kind of a source; an existing path is never taken for a Hub ID.

    Raises:
        DataError: the source does not exist or is of no known kind. Whether an address in a store
            exists is not checked.
    """
    if builtin.find_builtin(source) is not None:
        return "builtin"
    if is_claim(source):
        problem = claim_problem(source)
        if problem is not None:
            raise DataError(problem)
        return "claim"
    if store_of(source) is not None:
        return "store"
    if scheme_of(source) not in (None, "file"):
        raise DataError(
            f"{redacted(source)} begins with an unknown scheme: known are "
            f"{', '.join(f'{name}://' for name in STORES)} and file://"
        )
    path = Path(_local(source)).expanduser()
    if path.is_file() or path.is_dir() or has_magic(source):
        if not path.is_dir() and not list_source(str(path)).files:
            raise DataError(
                f"{source} has no file that can be read; supported types: {supported_types()}"
            )
        return "files"
    if source.startswith(UPLOAD_PREFIX):
        raise DataError(
            f"{source} was not sent with this run: submit the recipe with `tuneline submit`, which "
            "sends small files of your machine"
        )
    if looks_like_a_path(source) or scheme_of(source) or can_read(path.name):
        raise DataError(f"there is no file or directory {source}")
    if not is_hub_id(source):
        raise DataError(
            f"'{source}' is not a file, a directory or a Hub ID: name e.g. rows.jsonl, "
            f"data/*.parquet, s3://bucket/rows.jsonl, openai/gsm8k or "
            f"{list_builtins(list(builtin.BUILTINS))}"
        )
    return "hub"


def _local(source: str) -> str:
    return source.removeprefix("file://")


def _read_files(source: str, selection: Selection, remarks: Remarks) -> Iterator[SourceRow]:
    listing = list_source(source)
    chosen = choose(redacted(source), listing, selection, remarks)

    def rows() -> Iterator[SourceRow]:
        for file in chosen:
            yield from read_file(file, selection.encoding, remarks)
        _check_unchanged(source, listing, list_source(source))

    return rows()


def _check_unchanged(source: str, before: Listing, after: Listing) -> None:
    old = {file.name: file.version for file in before.files}
    new = {file.name: file.version for file in after.files}
    changed = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    if changed:
        raise DataError(
            f"{redacted(source)} changed while it was read ({', '.join(changed[:3])}): wait until "
            "it is complete, and run the step again"
        )


def _fingerprint_files(source: str, revision: str | None) -> str:
    """Return a hash of names and contents; of a file in a store, of the version that it reports."""
    digest = hashlib.sha256()
    for file in list_source(source).files:
        if not (can_read(file.name) or file.name in _DESCRIBING):
            continue
        digest.update(f"{file.name}\0".encode())
        if store_of(file.path) is not None and file.version:
            digest.update(f"{file.version}\0".encode())
        else:
            with file.open() as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


def _date_of_files(source: str, revision: str | None) -> datetime.date | None:
    times = [file.modified for file in list_source(source).files if file.modified is not None]
    if not times:
        return None
    return datetime.datetime.fromtimestamp(max(times), datetime.UTC).date()


KINDS: dict[KindName, Kind] = {
    "builtin": Kind(builtin.read, builtin.fingerprint, lambda source, revision: builtin.DATE),
    "files": Kind(
        lambda source, selection, remarks: _read_files(_local(source), selection, remarks),
        lambda source, revision: _fingerprint_files(_local(source), revision),
        lambda source, revision: _date_of_files(_local(source), revision),
    ),
    "claim": Kind(
        lambda source, selection, remarks: _read_files(path_on_claim(source), selection, remarks),
        lambda source, revision: _fingerprint_files(path_on_claim(source), revision),
        lambda source, revision: _date_of_files(path_on_claim(source), revision),
    ),
    "store": Kind(_read_files, _fingerprint_files, _date_of_files),
    "hub": Kind(hub.read, hub.fingerprint, hub.date_of),
}
