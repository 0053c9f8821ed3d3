"""Deal rows to training, evaluation and the held-out benchmark."""

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tuneline.prepare.config import PrepareConfig

# Of a data set that brings no held-out rows of its own, so many are held out at most.
MAX_HELDOUT_SHARE = 0.2


@dataclass(frozen=True)
class Split:
    """Indices of rows, in the order in which they are written."""

    train: Sequence[int]
    eval: Sequence[int]
    heldout: Sequence[int]
    num_leaking: int
    """Rows left out because a held-out row is the same."""
    num_general: int = 0
    """Rows of `train` that come from the general data set."""


def split(
    num_rows: int,
    config: PrepareConfig,
    *,
    own_heldout: Sequence[int] | None,
    digest: Callable[[int], int],
) -> Split:
    """Split rows 0 to num_rows by the seed.

    Args:
        num_rows: rows that may be trained on.
        config: shares, limits and the seed.
        own_heldout: indices of held-out rows from elsewhere; None to take them from these rows.
        digest: hash of the row with an index.
    """
    import numpy

    order = numpy.random.default_rng(config.seed).permutation(num_rows)[: config.max_rows]
    heldout = own_heldout
    if heldout is None:
        num_heldout = min(config.heldout.max_rows, int(len(order) * MAX_HELDOUT_SHARE))
        heldout, order = order[:num_heldout].tolist(), order[num_heldout:]
    # A row that stands in the data twice must not be trained on and then be asked for.
    seen = {digest(index) for index in heldout}
    rows = array("q", (index for index in map(int, order) if digest(index) not in seen))
    num_eval = min(config.max_eval_rows, round(len(rows) * config.eval_share))
    if config.eval_share and config.max_eval_rows and len(rows) > 1:
        num_eval = max(1, num_eval)
    return Split(
        train=rows[num_eval:],
        eval=rows[:num_eval],
        heldout=heldout,
        num_leaking=len(order) - len(rows),
    )
