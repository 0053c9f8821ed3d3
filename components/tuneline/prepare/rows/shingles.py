"""The shingles of all rows, on disk, and how many rows share each shingle.

A text is a set of shingles: the hashes of every five consecutive words. Of a long text, only the
shingles with the smallest hashes are kept. Shingles that very many rows share are left out when
they are read, because they are an instruction or a template and say nothing about a row.
"""

import os
from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy
from numpy.typing import NDArray

from tuneline.prepare.parallel import in_order, ranges
from tuneline.prepare.rows.words import WordBatch, WordFile

MAX_SHINGLES = 300
"""Largest number of shingles of a text that are kept."""
_NUM_WORDS = 5
"""Number of words of a shingle."""
_BATCH = 128
"""Number of texts per batch. A batch adds at most this number to a counter of a byte."""
_FULL = 120
"""Largest count of a shingle between batches; `_FULL` + `_BATCH` fits in a byte."""
_LARGEST_TABLE = 2**26

Shingles = NDArray[numpy.uint32]


def most_that_share(num_rows: int) -> int:
    """Return the number of rows above which what they share does not make them similar.

    It is 1 % of the rows, but at least 10, at most 100, and at most half of the rows.
    """
    return min(max(10, min(100, num_rows // 100)), max(2, num_rows // 2))


def shingles_of(batch: WordBatch) -> tuple[Shingles, NDArray[numpy.int64]]:
    """Return the kept shingles of each text in ascending order, and their number per text."""
    hashes, rows = batch.ngrams(_NUM_WORDS)
    high = numpy.uint64(32)
    keys = numpy.unique((rows.astype(numpy.uint64) << high) | (hashes >> high))
    rows = (keys >> high).astype(numpy.int64)
    starts = numpy.searchsorted(rows, numpy.arange(len(batch.starts)))
    kept = numpy.arange(len(keys)) - starts[rows] < MAX_SHINGLES
    return keys[kept].astype(numpy.uint32), numpy.minimum(numpy.diff(starts), MAX_SHINGLES)


class ShingleFile:
    """A file with the shingles of all rows.

    Args:
        words: the words of all rows.
        wanted: whether to keep the shingles of a row; equal texts must be counted only once.
        path: the file to create.
    """

    def __init__(self, words: WordFile, wanted: NDArray[numpy.bool_], path: Path):
        self._limit = most_that_share(int(wanted.sum()))
        self._file = open(path, "w+b", buffering=0)
        self._ends = array("q", [0])
        most = int(numpy.minimum(words.lengths(), MAX_SHINGLES)[wanted].sum())
        size = min(_LARGEST_TABLE, 1 << max(10, (2 * most).bit_length()))
        self._counts = numpy.zeros(size, numpy.uint8)

        def shingles(rows: range) -> tuple[Shingles, NDArray[numpy.int64]]:
            return shingles_of(words.read(rows.start, rows.stop).only(wanted[rows]))

        batches = ranges(len(words), _BATCH)
        for _, (values, counts) in in_order(shingles, batches, num_alone=64):
            places = values % size
            # An operand of another type would make this ten times slower.
            numpy.add.at(self._counts, places, numpy.uint8(1))
            self._counts[places] = numpy.minimum(self._counts[places], _FULL)
            self._file.write(values.tobytes())
            self._ends.extend((self._ends[-1] + numpy.cumsum(counts)).tolist())

    def __len__(self) -> int:
        return len(self._ends) - 1

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def read(self, rows: range) -> tuple[Shingles, NDArray[numpy.int64]]:
        """Return the shingles of rows that tell them apart, and the row of each shingle."""
        ends = numpy.array(self._ends[rows.start : rows.stop + 1], numpy.int64)
        size, offset = 4 * int(ends[-1] - ends[0]), 4 * int(ends[0])
        values = numpy.frombuffer(os.pread(self._file.fileno(), size, offset), numpy.uint32)
        kept = self._counts[values % len(self._counts)] <= self._limit
        return values[kept], numpy.repeat(numpy.array(rows), numpy.diff(ends))[kept]

    def read_row(self, row: int) -> Shingles:
        """Return the shingles of one row that tell it apart, as `read` does in less time."""
        first, end = self._ends[row], self._ends[row + 1]
        data = os.pread(self._file.fileno(), 4 * (end - first), 4 * first)
        values = numpy.frombuffer(data, numpy.uint32)
        return values[self._counts[values % len(self._counts)] <= self._limit]

    def batches(self) -> Iterator[range]:
        """Return the numbers of all rows in batches."""
        return ranges(len(self), 4 * _BATCH)
