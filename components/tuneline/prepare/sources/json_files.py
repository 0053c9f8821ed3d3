"""Read JSON Lines, and arrays of JSON objects."""

import codecs
import json
from collections.abc import Iterator
from typing import Any

from tuneline.errors import DataError
from tuneline.prepare.formats.checks import repeated_key
from tuneline.prepare.sources.content import (
    NOT_UTF8,
    UTF_8,
    has_undecoded,
    lines_of,
    open_content,
    open_text,
)
from tuneline.prepare.sources.proportion import MAX_ROW_BYTES, TOO_LARGE
from tuneline.prepare.sources.row import SourceRow
from tuneline.prepare.sources.stored import StoredFile

_CUT_OFF = "the line ends inside a JSON value: the file was cut off"


class _Decoder(json.JSONDecoder):
    """Decodes JSON, and notes a key that an object has twice: Python keeps only the last value."""

    def __init__(self) -> None:
        super().__init__(object_pairs_hook=self._object)
        self.flaw = ""
        """What is wrong with the text that was decoded last; "" for nothing."""

    def raw_decode(self, s: str, idx: int = 0) -> tuple[Any, int]:
        self.flaw = ""
        return super().raw_decode(s, idx)

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            self.flaw = f"an object {repeated_key(pairs)}, so which value counts is not clear"
        return values


def read_jsonl(file: StoredFile, encoding: str) -> Iterator[SourceRow]:
    """Yield the objects of JSON Lines."""
    if encoding != UTF_8:
        yield from _read_decoded_lines(file, encoding)
        return
    decoder = _Decoder()
    with open_content(file) as lines:
        for number, raw in enumerate(lines_of(lines), 1):
            if raw is None:
                yield SourceRow(file.name, number, reason=TOO_LARGE)
                continue
            if number == 1:
                raw = raw.removeprefix(codecs.BOM_UTF8)
            if not raw.strip():
                continue
            try:
                line = raw.decode("utf-8")
            except UnicodeDecodeError:
                yield SourceRow(file.name, number, reason=NOT_UTF8)
                continue
            yield _parse(file, number, line, decoder)


def _read_decoded_lines(file: StoredFile, encoding: str) -> Iterator[SourceRow]:
    decoder = _Decoder()
    with open_text(file, encoding, newline="\n") as lines:
        for number, line in enumerate(lines_of(lines), 1):
            if line is None:
                yield SourceRow(file.name, number, reason=TOO_LARGE)
                continue
            if number == 1:
                line = line.removeprefix("\ufeff")
            if not line.strip():
                continue
            if has_undecoded(line):
                yield SourceRow(file.name, number, reason=f"not {encoding} text")
                continue
            yield _parse(file, number, line, decoder)


def _parse(file: StoredFile, number: int, line: str, decoder: _Decoder) -> SourceRow:
    try:
        return _object(file, number, decoder.decode(line), decoder.flaw)
    except json.JSONDecodeError as error:
        # Only the last line of a file can lack a line feed; it may have been cut off.
        is_whole = line.endswith("\n")
        reason = f"not JSON: {error.msg} at column {error.colno}" if is_whole else _CUT_OFF
        return SourceRow(file.name, number, reason=reason)
    except RecursionError:
        return SourceRow(file.name, number, reason="JSON nested too deeply")
    except ValueError as error:
        # Python converts at most 4300 digits to an integer.
        return SourceRow(file.name, number, reason=f"not usable JSON: {error}")


def _object(file: StoredFile, number: int, values: Any, flaw: str) -> SourceRow:
    if flaw:
        return SourceRow(file.name, number, reason=flaw)
    if isinstance(values, dict):
        return SourceRow(file.name, number, values)
    name = {list: "an array", str: "a string", type(None): "null"}.get(type(values), "a number")
    return SourceRow(file.name, number, reason=f"{name} instead of an object with columns")


def read_json(file: StoredFile, encoding: str) -> Iterator[SourceRow]:
    """Read an array of objects in pieces; a file that begins with { is read as JSON Lines."""
    with open_text(file, encoding) as text:
        head = text.read(4096).removeprefix("\ufeff").lstrip()
    if head.startswith("{"):
        yield from read_jsonl(file, encoding)
        return
    if head and not head.startswith("["):
        raise DataError(f"{file.name} is neither an array of objects nor JSON Lines")
    decoder = _Decoder()
    line = 1
    buffer = ""
    opened = False
    at_end = False
    with open_text(file, encoding) as text:
        while True:
            # Values are separated by white space and a comma.
            stripped = buffer.lstrip(" \t\r\n," if opened else " \t\r\n\ufeff")
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
                if has_undecoded(piece):
                    raise DataError(f"{file.name} is {NOT_UTF8}") from None
                if piece and len(buffer) > MAX_ROW_BYTES:
                    raise DataError(
                        f"{file.name}: the value that begins in line {line} does not end within "
                        f"{MAX_ROW_BYTES:,} characters: it is not JSON, or too large for a row. "
                        "Correct that value, or divide its text into several rows"
                    ) from None
                if piece:
                    buffer += piece
                    continue
                if not at_end:
                    at_end = True
                    continue
                if not buffer and not opened:
                    return
                raise DataError(
                    f"{file.name}: the JSON array ends unexpectedly in or before line "
                    f"{line + buffer[: error.pos].count(chr(10))}: the file was cut off or is "
                    "not JSON. Create it again, or use JSON Lines, where a bad row affects "
                    "only its own line"
                ) from None
            line += buffer[:end].count("\n")
            buffer = buffer[end:]
            yield _object(file, line, values, decoder.flaw)
