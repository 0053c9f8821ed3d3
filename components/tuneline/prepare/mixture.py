"""General rows among those that are trained on, so that the model forgets less of the rest.

They are drawn by the seed from the first rows of their source, ten times as many as are wanted:
large general data sets are not read to their end for a few thousand rows. None of them is held out
or evaluated, and one that equals a held-out row is left out.
"""

import logging
from array import array
from collections.abc import Callable
from dataclasses import replace

from tuneline.prepare.config import GeneralConfig
from tuneline.prepare.split import Split

logger = logging.getLogger(__name__)

NUM_READ_FOR_ONE = 10


def num_wanted(general: GeneralConfig, num_own_rows: int) -> int:
    """Return how many general rows make up their share beside so many of the data set."""
    return round(num_own_rows * general.share / (1 - general.share))


def mix_in(
    parts: Split,
    general: GeneralConfig,
    *,
    candidates: range,
    seed: int,
    digest: Callable[[int], int],
) -> Split:
    """Return the split with general rows in its training part, all in an order of the seed.

    Args:
        parts: the data set's own rows.
        general: the recipe's part.
        candidates: indices of the general rows that were read.
        seed: decides which are taken, and the order.
        digest: hash of the row with an index.
    """
    import numpy

    random = numpy.random.default_rng(seed)
    held = {digest(index) for index in parts.heldout}
    drawn = [
        index for index in map(int, random.permutation(candidates)) if digest(index) not in held
    ]
    wanted = num_wanted(general, len(parts.train))
    taken = drawn[:wanted]
    if len(taken) < wanted:
        logger.warning(
            "prepare.general asks for %d rows of %s, and it has %d: they are %.1f %% of the "
            "training rows, not %.1f %%",
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
