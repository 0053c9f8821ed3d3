"""Cut rows to max_seq_length, and count what is lost."""

import logging
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tuneline.artifacts import LengthStatistics
from tuneline.errors import DataError
from tuneline.prepare import lengths, parquet
from tuneline.prepare.config import PrepareConfig
from tuneline.prepare.tokenise import TokenRow

logger = logging.getLogger(__name__)


@dataclass
class Cut:
    """What truncation left of a file of rows."""

    num_rows: int = 0
    num_overlong_rows: int = 0
    num_source_tokens: int = 0
    num_tokens: int = 0
    num_loss_tokens: int = 0
    shortest_that_fits: int = sys.maxsize
    """Tokens that keep one token to learn of at least one row left out."""


def choose_length(config: PrepareConfig, recommended: int, longest_allowed: int) -> int:
    """Return the length that the config asks for and the model can hold."""
    if config.max_seq_length == "auto":
        return recommended
    if config.max_seq_length > longest_allowed:
        logger.warning(
            "prepare.max_seq_length %d is more than the model's %d positions: %d is used",
            config.max_seq_length,
            longest_allowed,
            longest_allowed,
        )
    return min(config.max_seq_length, longest_allowed)


def cut_rows(source: Path, target: Path, max_seq_length: int, method: str) -> Cut:
    """Copy rows, cut to the length, and count what is kept."""
    counts = Cut()

    def kept(rows: Iterable[TokenRow]) -> Iterator[TokenRow]:
        for row in rows:
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
                yield piece

    counts.num_rows = parquet.write(
        target, kept(parquet.read(source, method=method)), method=method
    )
    return counts


def too_long(
    source: str, statistics: LengthStatistics, train: Cut, max_seq_length: int
) -> DataError:
    """Say that truncation leaves no row, and which length would."""
    return DataError(
        f"all {train.num_overlong_rows} training rows of {source} are longer than max_seq_length "
        f"{max_seq_length} before their answer begins, so nothing is left to learn: set "
        f"prepare.max_seq_length to {statistics.max} (fits every row) or 'auto'; the first row "
        f"has an answer from {train.shortest_that_fits} tokens on"
    )
