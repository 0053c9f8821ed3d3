"""The words of a text, without what a copy may change: case, white space, punctuation, escapes."""

import os
import re
import unicodedata
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import accumulate
from pathlib import Path
from zlib import crc32

import numpy
from numpy.typing import NDArray

from tuneline.models.clusters import unified

Hashes = NDArray[numpy.uint64]
"""64-bit hashes."""

# Characters of these scripts are words of their own, because the scripts put no space between
# words: Thai, Lao, Kana and Han.
_NO_SPACES = "\u0e00-\u0eff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
# Signs that change the meaning of numbers and code, although Unicode calls them punctuation.
_MEANINGFUL = "%&*/@#\\"
_IGNORED = "".join(
    re.escape(character)
    for character in map(chr, range(0x10000))
    if unicodedata.category(character) in {"Cf", "Pc", "Pd", "Pe", "Pf", "Pi", "Po", "Ps"}
    and character not in _MEANINGFUL
)
# A word is a run of letters and digits, a minus sign before a number, or one symbol.
_WORD = re.compile(rf"[{_NO_SPACES}]|[^\W{_NO_SPACES}]+|-(?=\d)|[^\w\s{_IGNORED}]")
# A comma or an apostrophe between groups of three digits.
_GROUPING = re.compile(r"[,'](?<=\d[,'])(?=\d{3}(?!\d))")
_ASCII_WORD = re.compile(r"\w+|-(?=\d)|[$+<=>^`|~%&*/@#\\]")


def words_of(text: str) -> list[str]:
    """Return the words of a text; texts that differ in case or white space have equal words.

    White space and punctuation separate words, invisible characters are left out, and characters
    that look alike are the same. Symbols (+, %, emoji) are words, because an answer may consist of
    one. 1,000 is the same word as 1000.
    """
    return words_of_unified(unified(text))


def words_of_unified(text: str) -> list[str]:
    """Return the words of a text from `unified`, or of a part of it between white space."""
    if "," in text or "'" in text:
        text = _GROUPING.sub("", text)
    return (_ASCII_WORD if text.isascii() else _WORD).findall(text.casefold())


def hash_of(words: Sequence[str]) -> int:
    """Return a 64-bit hash of words."""
    return hash_of_lines(joined(words))


def word_hashes(words: Sequence[str]) -> "array[int]":
    """Return a 32-bit hash of each word."""
    return hashes_of_lines(joined(words))


def hash_of_lines(lines: bytes) -> int:
    """Return `hash_of` the words in the given lines."""
    return int.from_bytes(blake2b(lines, digest_size=8).digest(), "little")


def hashes_of_lines(lines: bytes) -> "array[int]":
    """Return `word_hashes` of the words in the given lines."""
    return array("I", map(crc32, lines.split(b"\n"))) if lines else array("I")


def joined(words: Sequence[str]) -> bytes:
    """Return words as UTF-8, one per line."""
    return "\n".join(words).encode("utf-8", "replace")


def ngrams(words: NDArray[numpy.uint32], length: int) -> Hashes:
    """Return a hash of every `length` consecutive words of the given word hashes."""
    num_windows = max(0, len(words) - length + 1)
    values = numpy.zeros(num_windows, numpy.uint64)
    for position in range(length):
        values *= numpy.uint64(0x9E3779B97F4A7C15)
        values += words[position : position + num_windows]
        values ^= values >> numpy.uint64(29)
    values *= numpy.uint64(0xBF58476D1CE4E5B9)
    values ^= values >> numpy.uint64(32)
    return values


@dataclass(frozen=True)
class WordBatch:
    """The word hashes of consecutive rows, end to end."""

    words: NDArray[numpy.uint32]
    starts: NDArray[numpy.int64]
    """Index of each row's first word, and the number of words."""

    def only(self, wanted: NDArray[numpy.bool_]) -> "WordBatch":
        """Return the batch with no words in the rows that are not wanted."""
        counts = numpy.diff(self.starts)
        starts = numpy.concatenate(([0], numpy.cumsum(numpy.where(wanted, counts, 0))))
        return WordBatch(self.words[numpy.repeat(wanted, counts)], starts)

    def ngrams(self, length: int) -> tuple[Hashes, NDArray[numpy.int64]]:
        """Return the hash and the row of every `length` consecutive words within a row."""
        hashes = ngrams(self.words, length)
        rows = numpy.repeat(numpy.arange(len(self.starts) - 1), numpy.diff(self.starts))
        inside = rows[: len(hashes)] == rows[length - 1 :]
        return hashes[inside], rows[: len(hashes)][inside]


class WordFile:
    """A file with the word hashes of all rows; the end of each row is held in memory."""

    def __init__(self, path: Path):
        self._file = open(path, "w+b", buffering=0)
        self._starts = array("q", [0])

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __len__(self) -> int:
        return len(self._starts) - 1

    def append(self, words: bytes, counts: Sequence[int]) -> None:
        """Append rows: the word hashes of all of them, and the number of words of each."""
        self._file.write(words)
        self._starts.extend(accumulate(counts, initial=self._starts.pop()))

    def lengths(self) -> NDArray[numpy.int64]:
        """Return the number of words of each row."""
        return numpy.diff(numpy.frombuffer(self._starts, numpy.int64))

    def read(self, first: int, stop: int) -> WordBatch:
        """Return the words of the rows `first` to `stop` - 1; workers may call this too."""
        starts = numpy.array(self._starts[first : stop + 1], numpy.int64)
        size = 4 * int(starts[-1] - starts[0])
        data = os.pread(self._file.fileno(), size, 4 * int(starts[0]))
        return WordBatch(numpy.frombuffer(data, numpy.uint32), starts - starts[0])
