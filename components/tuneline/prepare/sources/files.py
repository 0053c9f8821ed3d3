"""Read the rows of files: JSON Lines, JSON, CSV, TSV, Parquet and plain text.

A row that cannot be read is yielded with the reason, so that it can be counted. An error after
which the file cannot be divided into rows is raised.
"""

import codecs
import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from tuneline.errors import DataError
from tuneline.prepare.sources.row import SourceRow

_NOT_UTF8 = "not UTF-8 text; convert the file, e.g. with iconv -f CP949 -t UTF-8"
_CUT_OFF = "the line ends inside a JSON value: the file was cut off"


def read_file(path: Path) -> Iterator[SourceRow]:
    """Yield the rows of a file with one of the `SUFFIXES`.

    Raises:
        DataError: the file cannot be divided into rows.
    """
    return _READERS[path.suffix.lower()](path)


def _read_jsonl(path: Path) -> Iterator[SourceRow]:
    with open(path, "rb") as lines:
        for number, raw in enumerate(lines, 1):
            if number == 1:
                raw = raw.removeprefix(codecs.BOM_UTF8)
            if not raw.strip():
                continue
            try:
                values = json.loads(raw.decode("utf-8"))
            except UnicodeDecodeError:
                yield SourceRow(path.name, number, reason=_NOT_UTF8)
            except json.JSONDecodeError as error:
                # Only the last line of a file can lack a line feed; it may have been cut off.
                is_whole = raw.endswith(b"\n")
                reason = f"not JSON: {error.msg} at column {error.colno}" if is_whole else _CUT_OFF
                yield SourceRow(path.name, number, reason=reason)
            except RecursionError:
                yield SourceRow(path.name, number, reason="JSON nested too deeply")
            else:
                yield _object(path, number, values)


def _object(path: Path, number: int, values: Any) -> SourceRow:
    if isinstance(values, dict):
        return SourceRow(path.name, number, values)
    name = {list: "an array", str: "a string", type(None): "null"}.get(type(values), "a number")
    return SourceRow(path.name, number, reason=f"{name} instead of an object with columns")


def _read_json(path: Path) -> Iterator[SourceRow]:
    """Read an array of objects in pieces; a file that begins with { is read as JSON Lines."""
    with open(path, "rb") as file:
        head = file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()
    if head.startswith(b"{"):
        yield from _read_jsonl(path)
        return
    if head and not head.startswith(b"["):
        raise DataError(f"{path} is neither an array of objects nor JSON Lines")
    decoder = json.JSONDecoder()
    line = 1
    buffer = ""
    opened = False
    try:
        with open(path, encoding="utf-8-sig") as text:
            at_end = False
            while True:
                # Values are separated by white space and a comma.
                stripped = buffer.lstrip(" \t\r\n," if opened else " \t\r\n")
                line += buffer[: len(buffer) - len(stripped)].count("\n")
                buffer = stripped
                if not opened and buffer:
                    buffer, opened = buffer[1:], True
                    continue
                if buffer.startswith("]"):
                    return
                try:
                    if not buffer:
                        raise json.JSONDecodeError("", buffer, 0)
                    values, end = decoder.raw_decode(buffer)
                    if end == len(buffer) and not at_end:
                        # The value may be a number that continues in the next piece.
                        raise json.JSONDecodeError("", buffer, end)
                except json.JSONDecodeError as error:
                    # Each read doubles the buffer, so a long value is parsed only a few times.
                    piece = text.read(max(1 << 16, len(buffer)))
                    if piece:
                        buffer += piece
                        continue
                    if not at_end:
                        at_end = True
                        continue
                    if not buffer and not opened:
                        return
                    raise DataError(
                        f"{path}: the JSON array ends unexpectedly in or before line "
                        f"{line + buffer[: error.pos].count(chr(10))}: the file was cut off or is "
                        "not JSON. Create it again, or use JSON Lines, where a bad row affects "
                        "only its own line"
                    ) from None
                line += buffer[:end].count("\n")
                buffer = buffer[end:]
                yield _object(path, line, values)
    except UnicodeDecodeError:
        raise DataError(f"{path} is {_NOT_UTF8}") from None


def _read_csv(path: Path) -> Iterator[SourceRow]:
    # Bytes that are not UTF-8 become surrogates, so that only the row with them is rejected.
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
        csv.field_size_limit(1 << 30)  # a long document exceeds the default of 128 KiB
        reader = csv.reader(text, strict=True)
        try:
            header = next(reader, None)
            if header is None:
                return
            for cells in reader:
                if cells:
                    yield _cells(path, reader.line_num, header, cells)
        except csv.Error as error:
            yield SourceRow(
                path.name, reader.line_num, reason=f"not CSV from here to the end: {error}"
            )


def _read_tsv(path: Path) -> Iterator[SourceRow]:
    """Read tab-separated rows; quotes are removed only if they enclose the whole field.

    Python's csv module is not used, because it would remove the quotes from a field such as
    `"Parasite" is a film`.
    """
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="\n") as lines:
        header: list[str] | None = None
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            cells = [_unquote(cell) for cell in line.rstrip("\r\n").split("\t")]
            if header is None:
                header = cells
            else:
                yield _cells(path, number, header, cells)


def _unquote(cell: str) -> str:
    inner = cell[1:-1]
    is_quoted = len(cell) >= 2 and cell[0] == cell[-1] == '"'
    if is_quoted and '"' not in inner.replace('""', ""):
        return inner.replace('""', '"')
    return cell


def _cells(path: Path, number: int, header: list[str], cells: list[str]) -> SourceRow:
    if len(cells) != len(header):
        reason = f"{len(cells)} fields, but the header has {len(header)}"
        return SourceRow(path.name, number, reason=reason)
    if any("\udc80" <= character <= "\udcff" for cell in cells for character in cell):
        return SourceRow(path.name, number, reason=_NOT_UTF8)
    return SourceRow(path.name, number, dict(zip(header, cells, strict=True)))


def _read_parquet(path: Path) -> Iterator[SourceRow]:
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                for values in batch.to_pylist():
                    number += 1
                    yield SourceRow(path.name, number, values)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise DataError(
            f"{path} is not a complete Parquet file: row {number + 1} cannot be read "
            f"({' '.join(str(error).split())[:200]}). Create or download it again"
        ) from None


def _read_text(path: Path) -> Iterator[SourceRow]:
    raw = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    try:
        yield SourceRow(path.name, 1, {"text": raw.decode("utf-8")})
    except UnicodeDecodeError as error:
        yield SourceRow(path.name, raw[: error.start].count(b"\n") + 1, reason=_NOT_UTF8)


_READERS: dict[str, Callable[[Path], Iterator[SourceRow]]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
    ".txt": _read_text,
    ".md": _read_text,
}

SUFFIXES = tuple(_READERS)
"""Suffixes of the files that can be read."""
