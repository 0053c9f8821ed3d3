"""Divide rows into training, evaluation and held-out rows."""

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy

from tuneline.prepare.config import PrepareConfig

MAX_HELDOUT_SHARE = 0.2
"""Largest fraction of a dataset that is held out if the recipe names no other held-out rows."""


@dataclass(frozen=True)
class Split:
    """Indices of the rows of each part, in the order in which they are written."""

    train: Sequence[int]
    eval: Sequence[int]
    heldout: Sequence[int]
    num_leaking: int
    """Number of rows left out because they equal a held-out row."""
    num_general: int = 0
    """Number of rows of `train` that come from the general dataset."""


def split(
    num_rows: int,
    config: PrepareConfig,
    *,
    own_heldout: Sequence[int] | None,
    digest: Callable[[int], int],
) -> Split:
    """Split the rows with the indices 0 to `num_rows` - 1 at random, with the config's seed.

    Args:
        num_rows: number of rows that may be trained on.
        config: fractions, limits and the seed.
        own_heldout: indices of held-out rows that were read separately; None: hold out some of the
            `num_rows` rows.
        digest: returns the hash of the row with a given index.
    """
    order = numpy.random.default_rng(config.seed).permutation(num_rows)[: config.max_rows]
    heldout = own_heldout
    if heldout is None:
        num_heldout = min(config.heldout.max_rows, int(len(order) * MAX_HELDOUT_SHARE))
        heldout, order = order[:num_heldout].tolist(), order[num_heldout:]
    # If two rows are equal, one must not be trained on while the other one is held out.
    heldout_digests = {digest(index) for index in heldout}
    rows = array("q", (index for index in map(int, order) if digest(index) not in heldout_digests))
    num_eval = min(config.max_eval_rows, round(len(rows) * config.eval_share))
    if config.eval_share and config.max_eval_rows and len(rows) > 1:
        num_eval = max(1, num_eval)
    return Split(
        train=rows[num_eval:],
        eval=rows[:num_eval],
        heldout=heldout,
        num_leaking=len(order) - len(rows),
    )
