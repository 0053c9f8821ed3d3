"""Mix general rows into the training rows, so that the model forgets fewer general abilities.

The general rows are drawn at random, with the recipe's seed, from the first rows of their source.
Ten times as many rows are read as are needed, so that a large source is not read to its end for a
few thousand rows. General rows are never held out or used for evaluation, and a general row that
equals a held-out row is left out.
"""

import logging
from array import array
from collections.abc import Callable
from dataclasses import replace

import numpy

from tuneline.prepare.config import GeneralConfig
from tuneline.prepare.rows.split import Split

logger = logging.getLogger(__name__)

NUM_READ_FOR_ONE = 10
"""Number of general rows to read for each general row that is needed."""


def num_wanted(general: GeneralConfig, num_own_rows: int) -> int:
    """Return the number of general rows to add to `num_own_rows` training rows of the dataset."""
    return round(num_own_rows * general.share / (1 - general.share))


def mix_in(
    parts: Split,
    general: GeneralConfig,
    *,
    candidates: range,
    seed: int,
    digest: Callable[[int], int],
) -> Split:
    """Return the split with general rows added to its training rows, shuffled by the seed.

    Args:
        parts: the split of the dataset's own rows.
        general: the `prepare.general` section of the recipe.
        candidates: indices of the general rows that were read.
        seed: determines which general rows are taken, and the order of all training rows.
        digest: returns the hash of the row with a given index.
    """
    random = numpy.random.default_rng(seed)
    heldout_digests = {digest(index) for index in parts.heldout}
    drawn = [
        index
        for index in map(int, random.permutation(candidates))
        if digest(index) not in heldout_digests
    ]
    wanted = num_wanted(general, len(parts.train))
    taken = drawn[:wanted]
    if len(taken) < wanted:
        logger.warning(
            "prepare.general asks for %d rows of %s, but only %d are usable: they are %.1f %% of "
            "the training rows instead of %.1f %%",
            wanted,
            general.source,
            len(taken),
            100 * len(taken) / (len(taken) + len(parts.train)),
            100 * general.share,
        )
    rows = array("q", [*parts.train, *taken])
    order = random.permutation(len(rows))
    return replace(
        parts,
        train=array("q", (rows[place] for place in order)),
        num_general=len(taken),
        num_leaking=parts.num_leaking + len(candidates) - len(drawn),
    )
