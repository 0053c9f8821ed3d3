"""Read the rows of one file: JSON Lines, JSON, CSV, TSV, Parquet, Arrow and plain text.

A row that cannot be read is yielded with the reason, so that it can be counted. An error after
which the file cannot be divided into rows is raised.
"""

from collections.abc import Callable, Iterator

from tuneline.errors import DataError
from tuneline.prepare.sources.arrow_files import read_arrow, read_parquet
from tuneline.prepare.sources.content import (
    NOT_UTF8,
    explain_broken,
    find_encoding,
    has_undecoded,
    is_undecoded,
    open_text,
    suffixes_of,
)
from tuneline.prepare.sources.csv_files import read_csv, read_tsv
from tuneline.prepare.sources.json_files import read_json, read_jsonl
from tuneline.prepare.sources.proportion import MAX_ROW_BYTES, TOO_LARGE
from tuneline.prepare.sources.row import Remarks, SourceRow
from tuneline.prepare.sources.stored import StoredFile

TEXT_SUFFIXES = (".txt", ".md")
"""Suffixes of files that are one document each."""


def read_file(file: StoredFile, encoding: str | None, remarks: Remarks) -> Iterator[SourceRow]:
    """Yield the rows of a file that `can_read` accepts.

    Args:
        file: the file.
        encoding: encoding of text files; None: guess it.
        remarks: receives what a user should know, e.g. the encoding that was guessed.

    Raises:
        DataError: the file cannot be divided into rows.
    """
    return explain_broken(file, _rows(file, encoding, remarks))


def can_read(name: str) -> bool:
    """Return whether a file of this name can be read."""
    suffix, compression = suffixes_of(name)
    return suffix in SUFFIXES and not (compression and suffix in _ARROW_READERS)


def is_document(name: str) -> bool:
    """Return whether a file of this name is one document, and not a file of rows."""
    return suffixes_of(name)[0] in TEXT_SUFFIXES


def supported_types() -> str:
    """Return the suffixes that can be read, for messages."""
    return f"{', '.join(SUFFIXES)}; text also with .gz, .bz2, .xz or .zst behind"


def _rows(file: StoredFile, encoding: str | None, remarks: Remarks) -> Iterator[SourceRow]:
    suffix = suffixes_of(file.name)[0]
    num_rows = 0
    if suffix in _ARROW_READERS:
        rows = _ARROW_READERS[suffix](file)
    else:
        known = find_encoding(file, encoding, remarks)
        rows = _decoded(file, known, _TEXT_READERS[suffix](file, known, remarks))
    for row in rows:
        num_rows += 1
        yield row
    if not num_rows:
        remarks.add("holds no rows", file.name)


def _decoded(file: StoredFile, encoding: str, rows: Iterator[SourceRow]) -> Iterator[SourceRow]:
    line = 0
    try:
        for row in rows:
            line = row.line
            yield row
    except UnicodeError:
        raise DataError(
            f"{file.name} is not {encoding} text behind line {line}: set prepare.encoding, or "
            "convert the file with iconv"
        ) from None


def _read_text(file: StoredFile, encoding: str, remarks: Remarks) -> Iterator[SourceRow]:
    with open_text(file, encoding) as opened:
        text = opened.read(MAX_ROW_BYTES + 1).removeprefix("\ufeff")
    if len(text) > MAX_ROW_BYTES:
        yield SourceRow(file.name, 1, reason=TOO_LARGE)
    elif has_undecoded(text):
        index = next(place for place, mark in enumerate(text) if is_undecoded(mark))
        yield SourceRow(file.name, text[:index].count("\n") + 1, reason=NOT_UTF8)
    elif text:
        yield SourceRow(file.name, 1, {"text": text})


_ARROW_READERS: dict[str, Callable[[StoredFile], Iterator[SourceRow]]] = {
    ".parquet": read_parquet,
    ".arrow": read_arrow,
    ".feather": read_arrow,
}
_TEXT_READERS: dict[str, Callable[[StoredFile, str, Remarks], Iterator[SourceRow]]] = {
    ".jsonl": lambda file, encoding, _: read_jsonl(file, encoding),
    ".ndjson": lambda file, encoding, _: read_jsonl(file, encoding),
    ".json": lambda file, encoding, _: read_json(file, encoding),
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".txt": _read_text,
    ".md": _read_text,
}

SUFFIXES = (*_TEXT_READERS, *_ARROW_READERS)
"""Suffixes of the files that can be read."""
