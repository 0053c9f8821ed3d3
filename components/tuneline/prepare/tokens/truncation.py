"""Truncate examples to max_seq_length and count the tokens that are lost."""

import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy
import pyarrow

from tuneline.artifacts import LABEL, PREFERENCE_METHODS, LengthStatistics, Method
from tuneline.errors import DataError
from tuneline.prepare.parallel import in_order
from tuneline.prepare.tokens import lengths, parquet

logger = logging.getLogger(__name__)


@dataclass
class Cut:
    """Counts of the examples of a file, after truncation where not stated otherwise."""

    num_rows: int = 0
    num_overlong_rows: int = 0
    """Number of rows left out because truncation leaves no token that the loss counts."""
    num_source_tokens: int = 0
    """Number of tokens before truncation."""
    num_tokens: int = 0
    num_loss_tokens: int = 0
    shortest_that_fits: int = sys.maxsize
    """Smallest `max_seq_length` at which at least one of the rows left out would not be."""

    def add(self, other: "Cut") -> None:
        """Add the counts of a batch, except `num_rows`, which is set when the rows are written."""
        self.num_overlong_rows += other.num_overlong_rows
        self.num_source_tokens += other.num_source_tokens
        self.num_tokens += other.num_tokens
        self.num_loss_tokens += other.num_loss_tokens
        self.shortest_that_fits = min(self.shortest_that_fits, other.shortest_that_fits)


def choose_length(requested: int | Literal["auto"], recommended: int, longest_allowed: int) -> int:
    """Return the requested length, or the recommended length if "auto" is requested.

    The result is never above `longest_allowed`, the model's limit.
    """
    if requested == "auto":
        return recommended
    if requested > longest_allowed:
        logger.warning(
            "prepare.max_seq_length %d is more than the model's %d positions: %d is used",
            requested,
            longest_allowed,
            longest_allowed,
        )
    return min(requested, longest_allowed)


def cut_rows(source: Path, target: Path, max_seq_length: int, method: Method) -> Cut:
    """Copy examples from one Parquet file to another, truncated, and return the counts.

    Args:
        source: file that `parquet.write` wrote.
        target: file to write.
        max_seq_length: maximum length in tokens.
        method: the training method.
    """
    total = Cut()

    def cut(batch: pyarrow.RecordBatch) -> tuple[pyarrow.RecordBatch, Cut]:
        return _cut_batch(batch, max_seq_length, method)

    def kept() -> Iterator[pyarrow.RecordBatch]:
        for _, (batch, counts) in in_order(cut, parquet.read_batches(source)):
            total.add(counts)
            yield batch

    total.num_rows = parquet.write(target, kept(), method=method)
    return total


def _cut_batch(
    batch: pyarrow.RecordBatch, max_seq_length: int, method: Method
) -> tuple[pyarrow.RecordBatch, Cut]:
    if _fits(batch, max_seq_length, method):
        return batch, _count(batch, method)
    counts = Cut()
    kept = []
    for row in parquet.rows_of(batch, method=method):
        counts.num_source_tokens += lengths.num_tokens(row)
        pieces = list(lengths.fit(row, max_seq_length, is_document=method == "cpt"))
        if not pieces:
            counts.num_overlong_rows += 1
            counts.shortest_that_fits = min(
                counts.shortest_that_fits, lengths.num_tokens_needed(row)
            )
        for piece in pieces:
            counts.num_tokens += lengths.num_tokens(piece)
            counts.num_loss_tokens += lengths.num_loss_tokens(piece)
            kept.append(piece)
    return parquet.to_batch(kept, method=method), counts


def _fits(batch: pyarrow.RecordBatch, max_seq_length: int, method: Method) -> bool:
    """Return whether truncation leaves all rows of the batch unchanged."""
    sizes = [column.value_lengths().to_numpy() for column in _ids(batch)]
    if method in PREFERENCE_METHODS:
        prompt, *answers = sizes
        longest = numpy.maximum.reduce(answers)
        return bool((prompt + longest <= max_seq_length).all() and (prompt < max_seq_length).all())
    ids, mask = batch.columns
    if not (sizes[0] <= max_seq_length).all() or (sizes[0] < 2).any():
        return False
    starts = mask.offsets.to_numpy()[:-1] - mask.offsets[0].as_py()
    return bool(numpy.logical_or.reduceat(mask.flatten().to_numpy() == 1, starts).all())


def _ids(batch: pyarrow.RecordBatch) -> list[pyarrow.ListArray]:
    """Return the columns of a batch that are lists."""
    return [batch.column(name) for name in batch.schema.names if name != LABEL]


def _count(batch: pyarrow.RecordBatch, method: Method) -> Cut:
    """Return the counts of a batch that truncation leaves unchanged."""
    sizes = [len(column.flatten()) for column in _ids(batch)]
    if method in PREFERENCE_METHODS:
        num_tokens, num_learnt = sum(sizes), sum(sizes[1:])
    else:
        num_tokens = sizes[0]
        num_learnt = int(batch.columns[1].flatten().to_numpy().sum(dtype="int64"))
    return Cut(num_source_tokens=num_tokens, num_tokens=num_tokens, num_loss_tokens=num_learnt)


def too_long(
    source: str, statistics: LengthStatistics, train: Cut, max_seq_length: int
) -> DataError:
    """Return the error for a dataset that has no training rows left after truncation.

    Args:
        source: name of the dataset.
        statistics: lengths before truncation.
        train: counts of the training rows after truncation.
        max_seq_length: the maximum length that was used.
    """
    return DataError(
        f"all {train.num_overlong_rows} training rows of {source} reach max_seq_length "
        f"{max_seq_length} before their answer begins, so nothing is left to learn: set "
        f"prepare.max_seq_length to {statistics.max} (fits every row) or 'auto'; the shortest "
        f"prompt needs at least {train.shortest_that_fits}"
    )
