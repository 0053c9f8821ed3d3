"""The order in which rows are written, and the general rows that are mixed into it.

The general rows are drawn at random, with the recipe's seed, from the first rows of their source.
Ten times as many rows are read as are needed, so that a large source is not read to its end for a
few thousand rows. General rows are never held out or used for evaluation.
"""

from array import array
from dataclasses import dataclass

import numpy
from numpy.typing import NDArray

from tuneline.prepare.config import GeneralConfig, PrepareConfig

NUM_READ_FOR_ONE = 10
"""Number of general rows to read for each general row that is needed."""
_NUM_DRAWN_FOR_ONE = 2
"""Number of general rows to tokenise for each one that is needed, because some may be too long, or
equal a held-out row."""


class Origin:
    """Where a row comes from."""

    OWN, GENERAL, HELDOUT = range(3)


@dataclass(frozen=True)
class Order:
    """The rows to tokenise, in the order in which they are written."""

    rows: "array[int]"
    """Indices in the spool."""
    origins: NDArray[numpy.uint8]
    """Origin of each row."""
    priorities: NDArray[numpy.int64]
    """Rank of each general row: rows with a low rank are mixed in first; 0 for other rows."""


def num_wanted(general: GeneralConfig, num_own_rows: int) -> int:
    """Return the number of general rows to add to `num_own_rows` training rows of the dataset."""
    return round(num_own_rows * general.share / (1 - general.share))


def arrange(
    own: range,
    heldout: range | None,
    general: range,
    config: PrepareConfig,
    *,
    num_first: int,
) -> Order:
    """Return the order of rows in the spool: the dataset's rows shuffled, held-out rows last.

    Args:
        own: indices of the dataset's own rows.
        heldout: indices of held-out rows that were read separately.
        general: indices of the general rows that were read.
        config: the number of rows to use, the share of general rows and the seed.
        num_first: number of the dataset's rows in front of the general rows, because these rows
            will be held out or used for evaluation.
    """
    rows = numpy.random.default_rng(config.seed).permutation(own.stop)[: config.max_rows]
    random = numpy.random.default_rng(config.seed)
    drawn = random.permutation(general)
    if config.general is not None:
        most = _NUM_DRAWN_FOR_ONE * max(1, num_wanted(config.general, len(rows)))
        drawn = drawn[:most].astype(numpy.int64)
    num_first = min(num_first, len(rows))
    is_general = numpy.zeros(len(rows) + len(drawn), bool)
    is_general[num_first:][: len(drawn)] = True
    is_general[num_first:] = random.permutation(is_general[num_first:])
    shuffled = random.permutation(len(drawn))
    mixed = numpy.empty(len(is_general), numpy.int64)
    priorities = numpy.zeros(len(is_general), numpy.int64)
    mixed[~is_general], mixed[is_general] = rows, drawn[shuffled]
    priorities[is_general] = shuffled
    last = heldout or range(0)
    return Order(
        array("q", numpy.concatenate([mixed, numpy.array(last, numpy.int64)]).tobytes()),
        numpy.concatenate(
            [
                numpy.where(is_general, Origin.GENERAL, Origin.OWN),
                numpy.full(len(last), Origin.HELDOUT),
            ]
        ).astype(numpy.uint8),
        numpy.concatenate([priorities, numpy.zeros(len(last), numpy.int64)]),
    )
