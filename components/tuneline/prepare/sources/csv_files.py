"""Read CSV and TSV.

A quote that does not close where its field ends may make one row of many, without an error of the
parser. Therefore a file with such a quote is refused, and the message names the line of the quote.
"""

import csv
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import IO

from tuneline.errors import DataError
from tuneline.prepare.sources.content import NOT_UTF8, UTF_8, has_undecoded, lines_of, open_text
from tuneline.prepare.sources.proportion import MAX_ROW_BYTES, TOO_LARGE
from tuneline.prepare.sources.row import Remarks, SourceRow
from tuneline.prepare.sources.stored import StoredFile

_DELIMITERS = (",", ";", "\t", "|")
_NAMES = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}
_MAX_NAME_CHARACTERS = 100
_NUM_LINES_LIKE_ROWS = 3
_ADVICE = (
    "Write a quote inside a field as two quotes and enclose the field in quotes, or save the rows "
    "as JSON Lines"
)


def _numbered(file: StoredFile, text: IO[str]) -> Iterator[tuple[int, str]]:
    """Yield the number of each line, and the line.

    Raises:
        DataError: a line is larger than a row can be.
    """
    for number, line in enumerate(lines_of(text), 1):
        if line is None:
            raise DataError(f"{file.name}: line {number} is {TOO_LARGE}")
        yield number, line


class _Lines:
    """The lines of a file. A quote that never closes would make one row of all that follow it."""

    def __init__(self, file: StoredFile, text: IO[str]) -> None:
        self._lines = _numbered(file, text)
        self.row_size = 0
        """Number of characters since the row began."""

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        _, line = next(self._lines)
        self.row_size += len(line)
        if self.row_size > MAX_ROW_BYTES:
            raise csv.Error
        return line


@dataclass(frozen=True)
class _Dialect:
    """How the rows of a file are written."""

    delimiter: str
    skips_space: bool
    """Whether a space follows each delimiter."""
    num_skipped_lines: int
    """Number of lines in front of the header."""


def read_csv(file: StoredFile, encoding: str, remarks: Remarks) -> Iterator[SourceRow]:
    """Yield the rows of CSV; the delimiter is the one that divides the header into most columns.

    Raises:
        DataError: a quote does not close where its field ends, or the first line is not a header.
    """
    csv.field_size_limit(MAX_ROW_BYTES)
    dialect = _find_dialect(file, encoding, remarks)
    header: list[str] | None = None
    is_suspicious = False
    start = dialect.num_skipped_lines + 1
    with open_text(file, encoding) as text:
        lines = _Lines(file, text)
        reader = csv.reader(
            islice(lines, dialect.num_skipped_lines, None),
            delimiter=dialect.delimiter,
            skipinitialspace=dialect.skips_space,
            strict=True,
        )
        try:
            for cells in reader:
                lines.row_size = 0
                end = reader.line_num + dialect.num_skipped_lines
                if not cells:
                    pass
                elif header is None:
                    header = _read_header(file, cells, remarks)
                else:
                    if end > start:
                        if len(cells) != len(header):
                            raise DataError(_wrong_row(file, encoding, dialect, start, end))
                        if not is_suspicious and _holds_rows(cells, dialect.delimiter):
                            is_suspicious = True
                            remarks.add(
                                f"a quoted field in lines {start} to {end} holds lines that look "
                                "like rows; check its quotes",
                                file.name,
                            )
                    yield _cells(file, end, header, cells, encoding)
                start = end + 1
        except csv.Error:
            end = reader.line_num + dialect.num_skipped_lines
            raise DataError(_wrong_quote(file, encoding, dialect, start, end)) from None


def read_tsv(file: StoredFile, encoding: str, remarks: Remarks) -> Iterator[SourceRow]:
    """Yield tab-separated rows; quotes are removed only if they enclose the whole field.

    Python's csv module is not used, because it would remove the quotes from a field such as
    `"Parasite" is a film`. Therefore a row is always one line.

    Raises:
        DataError: a quoted field continues on the next line, or the first line is not a header.
    """
    header: list[str] | None = None
    open_line = 0
    with open_text(file, encoding) as text:
        head = text.read(1 << 16)
    newline = "\r" if "\r" in head and "\n" not in head else "\n"
    with open_text(file, encoding, newline=newline) as lines:
        for number, line in _numbered(file, lines):
            if not line.strip():
                continue
            raw = line.rstrip("\r\n").split("\t")
            if header is None:
                header = _read_header(file, [_unquote(cell) for cell in raw], remarks)
                continue
            is_open = raw[-1].startswith('"') and raw[-1].count('"') % 2 == 1
            if len(raw) != len(header) and (is_open or open_line):
                raise DataError(
                    f"{file.name}: the quoted field that begins in line {open_line or number} "
                    "seems to continue on the next line, which tab-separated rows cannot do here: "
                    "save the rows as CSV or JSON Lines"
                )
            open_line = number if is_open else 0
            yield _cells(file, number, header, [_unquote(cell) for cell in raw], encoding)


def _unquote(cell: str) -> str:
    inner = cell[1:-1]
    is_quoted = len(cell) >= 2 and cell[0] == cell[-1] == '"'
    if is_quoted and '"' not in inner.replace('""', ""):
        return inner.replace('""', '"')
    return cell


def _find_dialect(file: StoredFile, encoding: str, remarks: Remarks) -> _Dialect:
    with open_text(file, encoding) as text:
        head = text.read(1 << 16).removeprefix("\ufeff")
    named = re.match(r'"?sep=(.)"?\r?\n', head)
    if named:
        # Excel writes and reads this line.
        head = head[named.end() :]
        delimiters: tuple[str, ...] = (named[1],)
    else:
        delimiters = _DELIMITERS
    headers = {
        mark: next(csv.reader(io.StringIO(head, newline=""), delimiter=mark), [])
        for mark in delimiters
    }
    delimiter = max(delimiters, key=lambda mark: len(headers[mark]))
    cells = headers[delimiter]
    if delimiter != ",":
        shown = _NAMES.get(delimiter, repr(delimiter))
        remarks.add(f"its columns are separated by {shown}", file.name)
    skips_space = len(cells) > 1 and all(cell.startswith(" ") for cell in cells[1:])
    return _Dialect(delimiter, skips_space, 1 if named else 0)


def _read_header(file: StoredFile, cells: list[str], remarks: Remarks) -> list[str]:
    names: list[str] = []
    for number, cell in enumerate(cells, 1):
        name = cell.removeprefix("\ufeff").strip()
        if len(name) > _MAX_NAME_CHARACTERS or "\n" in name:
            raise DataError(
                f"{file.name}: its first line is not a header with the names of the columns, but "
                f"has '{name[:40]}...': put a header in front of the rows"
            )
        if not name:
            name = f"column {number}"
            remarks.add(f"column {number} has no name in the header", file.name)
        if name in names:
            raise DataError(
                f"{file.name}: columns {names.index(name) + 1} and {number} are both named "
                f"'{name}': rename or remove one"
            )
        names.append(name)
    return names


def _cells(
    file: StoredFile, number: int, header: list[str], cells: list[str], encoding: str
) -> SourceRow:
    if len(cells) != len(header):
        reason = f"{len(cells)} fields, but the header has {len(header)}"
        return SourceRow(file.name, number, reason=reason)
    if any(map(has_undecoded, cells)):
        reason = NOT_UTF8 if encoding == UTF_8 else f"not {encoding} text"
        return SourceRow(file.name, number, reason=reason)
    if any("\0" in cell for cell in cells):
        return SourceRow(file.name, number, reason="a field holds a NUL character")
    return SourceRow(file.name, number, dict(zip(header, cells, strict=True)))


def _holds_rows(cells: list[str], delimiter: str) -> bool:
    """Return whether all inner lines of a field have as many delimiters as a row."""
    for cell in cells:
        inner = cell.splitlines()[1:-1]
        if len(inner) >= _NUM_LINES_LIKE_ROWS and len(cells) > 1:
            if all(line.count(delimiter) == len(cells) - 1 for line in inner):
                return True
    return False


def _wrong_row(file: StoredFile, encoding: str, dialect: _Dialect, start: int, end: int) -> str:
    opened, text, _ = _find_quote(file, encoding, dialect, start, end)
    return (
        f"{file.name}: the row that begins in line {start} ends in line {end} and has another "
        f"number of fields than the header: a quote opens in line {opened} ({text}) and closes "
        f"only there. {_ADVICE}"
    )


def _wrong_quote(file: StoredFile, encoding: str, dialect: _Dialect, start: int, end: int) -> str:
    opened, text, closed = _find_quote(file, encoding, dialect, start, end)
    if closed is None:
        what = "never closes"
    elif closed == opened:
        what = "closes before its field ends"
    else:
        what = f"closes in line {closed}, before a field ends"
    return f"{file.name}: the quote that opens in line {opened} ({text}) {what}. {_ADVICE}"


def _find_quote(
    file: StoredFile, encoding: str, dialect: _Dialect, start: int, end: int
) -> tuple[int, str, int | None]:
    """Find the quote at fault in the rows of the lines `start` to `end`.

    Returns:
        The line of the last quote that opens a field, the beginning of its field, and the line in
        which the quote closes although the field does not end there; None if it does not close so.
    """
    opened, shown = start, ""
    is_open = False
    is_at_start = True
    with open_text(file, encoding) as text:
        for number, line in enumerate(islice(text, start - 1, end), start):
            index = 0
            while index < len(line):
                mark, following = line[index], line[index + 1 : index + 2]
                if is_open and mark == '"':
                    if following == '"':
                        index += 1
                    else:
                        is_open = False
                        if following not in ("", "\r", "\n", dialect.delimiter):
                            return opened, shown, number
                elif not is_open and mark == '"' and is_at_start:
                    is_open, opened = True, number
                    shown = line[index : index + 24].rstrip()
                skips = dialect.skips_space and is_at_start and mark == " "
                is_at_start = mark in (dialect.delimiter, "\r", "\n") or skips
                index += 1
            is_at_start = True
    return opened, shown, None
