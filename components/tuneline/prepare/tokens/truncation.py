"""Truncate examples to max_seq_length and count the tokens that are lost."""

import logging
from dataclasses import dataclass
from typing import Any, Literal

import numpy
import pyarrow
from numpy.typing import NDArray

from tuneline.artifacts import LABEL, PREFERENCE_METHODS, Method
from tuneline.errors import DataError
from tuneline.prepare.tokens import lengths, parquet

logger = logging.getLogger(__name__)

Sizes = NDArray[numpy.integer[Any]]
"""Lengths in tokens."""


@dataclass
class Cut:
    """Counts of the examples of a file, after truncation where not stated otherwise."""

    num_rows: int = 0
    num_source_tokens: int = 0
    """Number of tokens before truncation."""
    num_tokens: int = 0
    num_loss_tokens: int = 0
    num_desirable: int = 0
    """Number of examples of the method kto whose answer is desirable."""

    def add(self, other: "Cut") -> None:
        """Add the counts of a batch."""
        self.num_rows += other.num_rows
        self.num_source_tokens += other.num_source_tokens
        self.num_tokens += other.num_tokens
        self.num_loss_tokens += other.num_loss_tokens
        self.num_desirable += other.num_desirable


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


def cut_batch(
    batch: pyarrow.RecordBatch, max_seq_length: int, method: Method
) -> tuple[pyarrow.RecordBatch, Cut]:
    """Return the examples of a batch, truncated to `max_seq_length`, and their counts."""
    if _fits(batch, max_seq_length, method):
        return batch, _count(batch, method)
    counts = Cut()
    kept = []
    for row in parquet.rows_of(batch, method=method):
        counts.num_source_tokens += lengths.num_tokens(row)
        for piece in lengths.fit(row, max_seq_length, is_document=method == "cpt"):
            counts.num_tokens += lengths.num_tokens(piece)
            counts.num_loss_tokens += lengths.num_loss_tokens(piece)
            counts.num_desirable += bool(piece.is_desirable)
            kept.append(piece)
    counts.num_rows = len(kept)
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
    num_desirable = batch.column(LABEL).true_count if method == "kto" else 0
    return Cut(batch.num_rows, num_tokens, num_tokens, num_learnt, num_desirable)


def too_long(source: str, sizes: Sizes, needed: Sizes, max_seq_length: int) -> DataError:
    """Return the error for a dataset of which truncation leaves nothing to learn.

    Args:
        source: name of the dataset.
        sizes: length of each example before truncation.
        needed: smallest maximum length at which something of each example is learnt.
        max_seq_length: the maximum length that was used.
    """
    if needed.min() == lengths.NEVER:
        return DataError(
            f"no row of {source} has a token to learn: check prepare.loss_on, and the weights or "
            "train flags of the rows"
        )
    return DataError(
        f"all {len(sizes)} training rows of {source} reach max_seq_length {max_seq_length} before "
        f"their answer begins, so nothing is left to learn: set prepare.max_seq_length to "
        f"{sizes.max()} (fits every row) or 'auto'; the shortest prompt needs at least "
        f"{needed.min()}"
    )


def same_answers(source: str, apart: Sizes, max_seq_length: int) -> DataError:
    """Return the error for preferences of which truncation leaves no two different answers.

    Args:
        source: name of the dataset.
        apart: smallest maximum length at which the two answers of each preference differ.
        max_seq_length: the maximum length that was used.
    """
    possible = apart[apart < lengths.NEVER]
    advice = (
        "the chat template makes them equal, e.g. because they differ in white space only"
        if len(possible) == 0
        else f"set prepare.max_seq_length to {possible.max()} (keeps {len(possible)} pairs apart); "
        f"the first pair differs at {possible.min()}"
    )
    return DataError(
        f"both answers of all {len(apart)} preferences of {source} are equal after truncation to "
        f"max_seq_length {max_seq_length}, so nothing is left to learn: {advice}"
    )
