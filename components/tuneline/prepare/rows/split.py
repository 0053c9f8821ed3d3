"""Divide rows into training, evaluation and held-out rows, so that no group is in two parts."""

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy
from numpy.typing import NDArray

from tuneline.prepare.config import PrepareConfig
from tuneline.prepare.rows.groups import Groups
from tuneline.prepare.rows.mixture import Origin, num_wanted
from tuneline.prepare.rows.weights import Weighted

logger = logging.getLogger(__name__)

MAX_HELDOUT_SHARE = 0.2
"""Largest fraction of a dataset that is held out if the recipe names no other held-out rows."""
_MAX_GROUP_SHARE = 0.01
"""Largest fraction of the rows in a group of which a row is held out or used for evaluation."""
_MAX_GROUP = 10
"""Number of rows of a group that is always small enough."""


class Part:
    """What becomes of a row."""

    LEFT_OUT, TRAIN, EVAL, HELDOUT = range(4)


@dataclass(frozen=True)
class Split:
    """The part of each row."""

    parts: NDArray[numpy.uint8]
    uses: NDArray[numpy.int64]
    """How often each row is used; above 1 only for training rows of a dataset with a weight."""
    weighted: Weighted
    """How often the rows of each dataset are used."""
    left_out: dict[str, int]
    """Number of rows left out because of a held-out or evaluation row, by the reason of
    `Groups.reason`."""
    num_general: int
    """Number of training rows that come from the general dataset."""
    num_general_wanted: int
    """Number of training rows that should come from the general dataset."""
    num_repeated: int
    """Number of separately read held-out rows that are left out, because an earlier held-out row is
    of the same group."""
    num_in_large_groups: int
    """Number of training rows in groups that are too large to be held out."""

    def rows(self, part: int) -> NDArray[numpy.int64]:
        """Return the rows of a part, in order."""
        return numpy.flatnonzero(self.parts == part)


def num_heldout_of(num_rows: int, config: PrepareConfig) -> int:
    """Return the number of rows to hold out of `num_rows` rows."""
    return min(config.heldout.max_rows, int(num_rows * MAX_HELDOUT_SHARE))


def num_eval_of(num_rows: int, config: PrepareConfig) -> int:
    """Return the number of evaluation rows of `num_rows` rows that are not held out."""
    num_eval = min(config.max_eval_rows, round(num_rows * config.eval_share))
    if config.eval_share and config.max_eval_rows and num_rows > 1:
        num_eval = max(1, num_eval)
    return num_eval


def split(
    origins: NDArray[numpy.uint8],
    usable: NDArray[numpy.bool_],
    groups: Groups,
    config: PrepareConfig,
    *,
    holds_out_own: bool,
    priorities: NDArray[numpy.int64],
    weigh: Callable[[NDArray[numpy.int64]], Weighted],
) -> Split:
    """Divide rows, which are in random order already; earlier rows are held out or evaluated first.

    Of a group, one row is held out and its other rows are left out, or all its rows are evaluation
    rows, or all are training rows. Groups of more than 1 % of the rows are trained on, because
    otherwise a few of them would take the place of many different rows.

    Args:
        origins: where each row comes from.
        usable: whether something is left to learn of a row.
        groups: the groups of the rows.
        config: fractions, limits and the seed.
        holds_out_own: whether to hold out some of the dataset's own rows.
        priorities: rank of each general row; usable rows with a low rank are mixed in first.
        weigh: returns how often each of the given training rows is used.
    """
    numbers = groups.numbers()
    parts = numpy.full(len(origins), Part.LEFT_OUT, numpy.uint8)
    own = numpy.flatnonzero((origins == Origin.OWN) & usable)
    sizes = numpy.bincount(numbers[own], minlength=len(origins))
    largest = max(_MAX_GROUP, int(len(own) * _MAX_GROUP_SHARE))
    is_small = sizes[numbers] <= largest

    representative: dict[int, int] = {}
    """The held-out row of each group that has one."""
    separate = numpy.flatnonzero(origins == Origin.HELDOUT)
    for row in separate.tolist():
        representative.setdefault(int(numbers[row]), row)
    num_repeated = len(separate) - len(representative)
    if holds_out_own:
        wanted, budget = num_heldout_of(len(own), config), int(len(own) * MAX_HELDOUT_SHARE)
        for row in own[is_small[own]].tolist():
            if len(representative) == wanted:
                break
            number = int(numbers[row])
            if number not in representative and sizes[number] <= budget:
                representative[number] = row
                budget -= int(sizes[number])
    parts[list(representative.values())] = Part.HELDOUT

    is_held = numpy.isin(numbers, list(representative))
    rest = own[~is_held[own]]
    evaluated: set[int] = set()
    num_left = num_eval_of(len(rest), config)
    for row in rest[is_small[rest]].tolist():
        if not num_left:
            break
        number = int(numbers[row])
        if number not in evaluated and sizes[number] <= num_left:
            evaluated.add(number)
            num_left -= int(sizes[number])
    is_evaluated = numpy.isin(numbers, list(evaluated))
    parts[rest] = numpy.where(is_evaluated[rest], Part.EVAL, Part.TRAIN)
    train = rest[~is_evaluated[rest]]

    general = numpy.flatnonzero((origins == Origin.GENERAL) & usable)
    free = general[~is_held[general] & ~is_evaluated[general]]
    weighted = weigh(train)
    num_own = int(weighted.uses.sum())
    wanted = num_wanted(config.general, num_own) if config.general is not None else 0
    taken = free[numpy.argsort(priorities[free])][:wanted]
    parts[taken] = Part.TRAIN

    by_evaluated = {int(numbers[row]): int(row) for row in rest[is_evaluated[rest]][::-1]}
    leaking = [*own[is_held[own] & (parts[own] != Part.HELDOUT)]]
    leaking += [*general[is_held[general] | is_evaluated[general]]]
    kept_instead = representative | by_evaluated
    reasons = Counter(groups.reason(int(row), kept_instead[int(numbers[row])]) for row in leaking)
    uses = (parts != Part.LEFT_OUT).astype(numpy.int64)
    uses[train] = weighted.uses
    return Split(
        parts=parts,
        uses=uses,
        weighted=weighted,
        left_out=dict(sorted(reasons.items())),
        num_general=len(taken),
        num_general_wanted=wanted,
        num_repeated=num_repeated,
        num_in_large_groups=int((~is_small[train]).sum()),
    )
