"""Find texts that are nearly the same: MinHash for candidates, then the real Jaccard similarity.

Shingles and MinHash bands are stored on disk, so that memory grows by a few bytes per row.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy
from numpy.typing import NDArray

from tuneline.prepare.parallel import in_order
from tuneline.prepare.rows.shingles import MAX_SHINGLES, ShingleFile, Shingles
from tuneline.prepare.rows.words import WordFile

SIMILARITY = 0.8
"""Smallest Jaccard similarity of near duplicates. Two changed words in 100 leave 0.81."""
MIN_SHINGLES = 20
"""Smallest number of shingles of a text that is compared; one changed word changes five."""
_NUM_BANDS = 20
_HASHES_PER_BAND = 5
"""With 20 bands of 5 hashes, texts of similarity 0.8 become candidates with probability 0.9996."""

_random = numpy.random.default_rng(0)
_FACTORS = _random.integers(2**63, size=(_NUM_BANDS, _HASHES_PER_BAND), dtype=numpy.uint64) * 2 + 1
_SUMMANDS = _random.integers(2**63, size=(_NUM_BANDS, _HASHES_PER_BAND), dtype=numpy.uint64)

Rows = NDArray[numpy.int64]


def link_near(
    words: WordFile,
    wanted: NDArray[numpy.bool_],
    work: Path,
    *,
    groups: Callable[[], Rows],
    link: Callable[[int, int], None],
) -> None:
    """Call `link` for pairs of rows whose texts are nearly the same.

    Args:
        words: the words of all rows.
        wanted: whether to compare a row; equal texts must be compared only once.
        work: directory for temporary files.
        groups: returns the group of each row: rows are linked already, directly or through other
            rows, if they have the same group.
        link: receives pairs of rows.
    """
    # One changed word would change too much of shorter texts.
    wanted = wanted & (words.lengths() >= MIN_SHINGLES)
    if not wanted.any():
        return
    shingles = ShingleFile(words, wanted, work / "shingles")
    try:
        for firsts, seconds in _candidates(shingles, work / "bands"):
            group = groups()
            # Most pairs share several bands, so they are linked since an earlier one.
            unlinked = numpy.flatnonzero(group[firsts] != group[seconds])
            pairs = zip(firsts[unlinked].tolist(), seconds[unlinked].tolist(), strict=True)
            for first, second in dict.fromkeys(pairs):
                if similarity(shingles.read_row(first), shingles.read_row(second)) >= SIMILARITY:
                    link(first, second)
    finally:
        shingles.close()


def similarity(first: Shingles, second: Shingles) -> float:
    """Return the Jaccard similarity of two texts; of long texts, it is estimated."""
    if max(len(first), len(second)) >= MAX_SHINGLES / 2:
        # Each file keeps the smallest hashes of a long text: compare up to the smaller maximum.
        last = min(first[-1], second[-1])
        first, second = first[first <= last], second[second <= last]
    shared = len(numpy.intersect1d(first, second, assume_unique=True))
    return shared / (len(first) + len(second) - shared)


def band_keys(values: Shingles, rows: Rows) -> tuple[Rows, NDArray[numpy.uint32]]:
    """Return the rows with enough shingles, and one key per band of each (bands x rows)."""
    found, counts = numpy.unique(rows, return_counts=True)
    kept = counts >= MIN_SHINGLES
    values = values[numpy.repeat(kept, counts)].astype(numpy.uint64)
    keys = numpy.zeros((_NUM_BANDS, int(kept.sum())), numpy.uint64)
    if kept.any():
        starts = numpy.concatenate(([0], numpy.cumsum(counts[kept])[:-1]))
        for band in range(_NUM_BANDS):
            for factor, summand in zip(_FACTORS[band], _SUMMANDS[band], strict=True):
                hashes = (values * factor + summand) >> numpy.uint64(32)
                keys[band] *= numpy.uint64(0x9E3779B97F4A7C15)
                keys[band] += numpy.minimum.reduceat(hashes.astype(numpy.uint32), starts)
    return found[kept], (keys >> numpy.uint64(32)).astype(numpy.uint32)


def _candidates(
    shingles: ShingleFile, path: Path
) -> Iterator[tuple[NDArray[numpy.int32], NDArray[numpy.int32]]]:
    """Yield the pairs of rows that share the key of a band: neighbours, and with the first of all.

    The pairs of one band follow each other; they are (the first row of each pair, the second one).
    """
    compared = []
    num_compared, stride = 0, 4 * len(shingles)

    def keys_of(rows: range) -> tuple[Rows, NDArray[numpy.uint32]]:
        return band_keys(*shingles.read(rows))

    with open(path, "w+b", buffering=0) as file:
        for _, (rows, keys) in in_order(keys_of, shingles.batches()):
            for band in range(_NUM_BANDS):
                os.pwrite(file.fileno(), keys[band].tobytes(), band * stride + 4 * num_compared)
            compared.append(rows.astype(numpy.int32))
            num_compared += len(rows)
        everything = numpy.concatenate(compared)
        for band in range(_NUM_BANDS):
            data = os.pread(file.fileno(), 4 * num_compared, band * stride)
            keys_of_band = numpy.frombuffer(data, numpy.uint32)
            order = numpy.argsort(keys_of_band, kind="stable")
            equal = numpy.diff(keys_of_band[order]) == 0
            places = numpy.flatnonzero(equal) + 1
            begins = numpy.where(numpy.concatenate(([False], equal)), 0, numpy.arange(num_compared))
            firsts = numpy.maximum.accumulate(begins)
            in_order_of_keys = everything[order]
            for others in (places - 1, firsts[places]):
                yield in_order_of_keys[others], in_order_of_keys[places]
