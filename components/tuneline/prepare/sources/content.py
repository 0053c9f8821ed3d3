"""The bytes of a file after decompression, and the encoding of its text."""

import bz2
import codecs
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath
from typing import IO, Any, AnyStr, BinaryIO, cast

import charset_normalizer
import pyarrow

from tuneline.errors import DataError
from tuneline.prepare.sources.proportion import MAX_ROW_BYTES, check_proportion
from tuneline.prepare.sources.row import Remarks
from tuneline.prepare.sources.stored import StoredFile

UTF_8 = "utf-8"
NOT_UTF8 = "not UTF-8 text; convert the file, e.g. with iconv -f CP949 -t UTF-8"
"""Why a row with bytes that are not UTF-8 cannot be used."""
_BLOCK_BYTES = 1 << 20
_SAMPLE_BYTES = 1 << 18
"""Number of bytes from which an encoding is guessed."""
_MIN_BYTES = 4
"""Number of bytes that are not UTF-8 below which a file is taken for UTF-8 with bad rows."""
_MIN_ZEROS = 8
"""Number of zero bytes below which a file is not taken for UTF-16."""
_MAX_SCANNED_BYTES = 16 << 20
"""Number of bytes of a file in a store that are searched for the first that is not ASCII."""


class _Bounded(io.RawIOBase):
    """The decompressed bytes of a file, which must not be out of proportion to the file's own."""

    def __init__(self, content: BinaryIO, raw: BinaryIO, name: str) -> None:
        self._content, self._raw, self._name = content, raw, name
        self._num_bytes = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        block = self._content.read(len(buffer))
        self._num_bytes += len(block)
        buffer[: len(block)] = block
        stored = self._raw.tell()
        check_proportion(
            self._name,
            self._num_bytes,
            f"its first {stored:,} compressed bytes",
            stored,
            "decompress it, and name the result",
        )
        return len(block)

    def close(self) -> None:
        self._content.close()
        self._raw.close()
        super().close()


def _zstandard(raw: BinaryIO) -> BinaryIO:
    # Unlike the zstandard package, pyarrow notices that a file was cut off.
    stream: Any = pyarrow.CompressedInputStream(raw, "zstd")
    return cast(BinaryIO, io.BufferedReader(stream, _BLOCK_BYTES))


_DECOMPRESSORS: dict[str, Callable[[BinaryIO], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _zstandard,
}
_BROKEN = (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile, pyarrow.ArrowException, OSError)

_BOMS = (
    (codecs.BOM_UTF8, UTF_8),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_LEGACY = ["cp949", "cp932", "euc_jp", "gb18030", "big5", "cp1252", "cp1251"]
"""Encodings that a file may have which is neither UTF-8 nor UTF-16."""

_KINDS_BY_HEAD = (
    (b"PK\x03\x04", "a ZIP archive, e.g. an Excel workbook: export it as CSV or JSON Lines"),
    (b"PAR1", "a Parquet file: give it a name that ends in .parquet"),
    (b"ARROW1", "an Arrow file: give it a name that ends in .arrow"),
    (b"\x1f\x8b", "compressed with gzip: add .gz to its name"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstandard: add .zst to its name"),
    (b"BZh", "compressed with bzip2: add .bz2 to its name"),
    (b"\xfd7zXZ\x00", "compressed with xz: add .xz to its name"),
    (b"%PDF", "a PDF document: extract its text"),
    (b"SQLite format 3", "an SQLite database: export a table as CSV"),
    (b"\xd0\xcf\x11\xe0", "an old Office file: export it as CSV or JSON Lines"),
    (b"version https://git-lfs", "a pointer of Git LFS, not the file itself: run git lfs pull"),
    (b"<!doctype html", "an HTML page, perhaps of a login: check the address"),
    (b"<html", "an HTML page, perhaps of a login: check the address"),
)


def suffixes_of(name: str) -> tuple[str, str]:
    """Return the suffix of a file's type and the suffix of its compression, in lower case.

    Either may be "".
    """
    suffix = PurePosixPath(name).suffix.lower()
    if suffix not in _DECOMPRESSORS:
        return suffix, ""
    return PurePosixPath(PurePosixPath(name).stem).suffix.lower(), suffix


def open_content(file: StoredFile) -> BinaryIO:
    """Open a file for reading its decompressed bytes in order."""
    raw = file.open()
    compression = suffixes_of(file.name)[1]
    if not compression:
        return raw
    content = _DECOMPRESSORS[compression](raw)
    return io.BufferedReader(_Bounded(content, raw, file.name), _BLOCK_BYTES)


def explain_broken(file: StoredFile, rows: Iterator[Any]) -> Iterator[Any]:
    """Yield the rows of a file; if it cannot be decompressed, say after which line that was."""
    if not suffixes_of(file.name)[1]:
        yield from rows
        return
    line = 0
    try:
        for row in rows:
            line = row.line
            yield row
    except DataError:
        raise
    except _BROKEN as error:
        details = " ".join(str(error).split())[:120]
        raise DataError(
            f"{file.name} cannot be decompressed after line {line} ({details}): it was cut off or "
            "damaged. Create or download it again"
        ) from None


def check_kind(file: StoredFile, head: bytes) -> None:
    """Refuse a file that should hold text but begins as a file of another kind does.

    Raises:
        DataError: the file is not text.
    """
    start = head[:64].lstrip().lower() if head[:1] in b"<\n\r \t" else head
    for mark, words in _KINDS_BY_HEAD:
        if start.startswith(mark):
            raise DataError(f"{file.name} is {words}")


def find_encoding(file: StoredFile, encoding: str | None, remarks: Remarks) -> str:
    """Return the encoding of a text file: the given one, or the one that its bytes show.

    The bytes that are not ASCII decide. A file in which most of these bytes are UTF-8, or only a
    few are not, is read as UTF-8, and the lines with the others become unusable rows.

    Args:
        file: the file.
        encoding: `prepare.encoding` of the recipe; None: guess.
        remarks: receives the encoding, if it was guessed and is not UTF-8.

    Raises:
        DataError: the file is not text.
    """
    with open_content(file) as content:
        head = content.read(_SAMPLE_BYTES)
        check_kind(file, head)
        if encoding is not None:
            return encoding
        for mark, name in _BOMS:
            if head.startswith(mark):
                if name != UTF_8:
                    remarks.add(f"read as {name.upper()}, by its byte order mark", file.name)
                return name
        if b"\0" in head:
            guess = _utf_16(head)
            if guess is not None:
                remarks.add(_guessed(guess), file.name)
                return guess
        sample = _sample(content, head, is_local="://" not in file.path)
    if sample is None:
        return UTF_8
    lines = [line for line in sample.split(b"\n")[:-1] or [sample] if not line.isascii()]
    foreign = b"\n".join(lines)
    num_wrong = sum(map(is_undecoded, foreign.decode(UTF_8, errors="surrogateescape")))
    num_high = len(foreign) - sum(byte < 0x80 for byte in foreign)
    if num_wrong < _MIN_BYTES or 2 * num_wrong < num_high:
        return UTF_8
    best = charset_normalizer.from_bytes(
        foreign, cp_isolation=_LEGACY, enable_fallback=False
    ).best()
    if best is None:
        return UTF_8
    remarks.add(_guessed(best.encoding), file.name)
    return best.encoding


def open_text(file: StoredFile, encoding: str, *, newline: str = "") -> IO[str]:
    """Open a file as text; bytes that the encoding does not have become half surrogates."""
    name = "utf-8-sig" if encoding.replace("_", "-").lower() in ("utf-8", "utf8") else encoding
    errors = "strict" if name.startswith(("utf-16", "utf-32", "utf_16")) else "surrogateescape"
    return io.TextIOWrapper(open_content(file), encoding=name, errors=errors, newline=newline)


def lines_of(opened: IO[AnyStr]) -> Iterator[AnyStr | None]:
    """Yield the lines of a file with their ends; None for a line larger than MAX_ROW_BYTES."""
    while line := opened.readline(MAX_ROW_BYTES + 1):
        if len(line) <= MAX_ROW_BYTES:
            yield line
            continue
        size = MAX_ROW_BYTES + 1
        while len(line) == size and line[-1:] not in ("\n", b"\n"):
            size = _BLOCK_BYTES
            line = opened.readline(size)
        yield None


def has_undecoded(text: str) -> bool:
    """Return whether a text of `open_text` has bytes that the encoding does not have."""
    if text.isascii():
        return False
    return any(map(is_undecoded, text))


def _sample(content: BinaryIO, head: bytes, *, is_local: bool) -> bytes | None:
    """Return bytes of a file from the first that is not ASCII; None if there is none."""
    block, scanned = head, len(head)
    while block.isascii():
        if not is_local and scanned >= _MAX_SCANNED_BYTES:
            return None
        block = content.read(_BLOCK_BYTES)
        if not block:
            return None
        scanned += len(block)
    if len(block) <= _SAMPLE_BYTES:
        return block + content.read(_SAMPLE_BYTES)
    return block


def _utf_16(head: bytes) -> str | None:
    """Return the encoding of text without a byte order mark whose ASCII is padded with zeros."""
    even, odd = head[::2].count(0), head[1::2].count(0)
    if odd > 8 * even:
        name, line_end, begins = "utf-16-le", b"\n\0", head[:1] != b"\0" == head[1:2]
    elif even > 8 * odd:
        name, line_end, begins = "utf-16-be", b"\0\n", head[:1] == b"\0" != head[1:2]
    else:
        return None
    if max(even, odd) < max(_MIN_ZEROS, len(head) // 50) or not (begins or line_end in head):
        return None
    try:
        head[: len(head) // 2 * 2 - 2].decode(name)
    except UnicodeDecodeError:
        return None
    return name


def is_undecoded(character: str) -> bool:
    """Return whether a character of `open_text` is a byte that the encoding does not have."""
    return "\udc80" <= character <= "\udcff"


def _guessed(name: str) -> str:
    shown = name.upper().replace("_", "-")
    return f"read as {shown}, which its bytes look like; set prepare.encoding if that is wrong"
