"""Tango's score interval of the difference of two paired proportions.

Of n questions that both models answered, `gains` are right with the tuned model only and `losses`
with the base model only. The bootstrap fails where few answers change: without any change its
interval is [0, 0] at every n. The score interval holds there too (Tango, Equivalence test and
confidence interval for the difference in proportions for the paired-sample design, 1998).

    z(d) = (gains - losses - n d) / sqrt(n (2 q(d) + d (1 - d)))

q(d) is the likeliest share of losses if the true difference is d. The ends of the interval are the
d with |z(d)| = z of the level.
"""

import numpy as np

from tuneline.gate.bootstrap import Floats

NUM_BISECTIONS = 40
"""Halvings of the interval [-1, 1]; the last is 2e-12 wide."""


def score_bound(gains: Floats, losses: Floats, num: Floats, z: Floats, *, upper: bool) -> Floats:
    """Return one end of the score interval of each data set.

    Args:
        gains: questions that only the tuned model answered right. Shares of effective numbers of
            questions may be fractions.
        losses: questions that only the base model answered right.
        num: questions, all positive.
        z: quantile of the level, positive.
        upper: whether to return the upper end instead of the lower one.
    """
    if upper:
        return -score_bound(losses, gains, num, z, upper=False)
    low, high = np.full_like(gains, -1.0), (gains - losses) / num
    for _ in range(NUM_BISECTIONS):
        middle = (low + high) / 2
        beyond = _statistic(gains, losses, num, middle) > z
        low, high = np.where(beyond, middle, low), np.where(beyond, high, middle)
    return low


def variance_at(gains: Floats, losses: Floats, num: Floats, difference: Floats) -> Floats:
    """Return the variance of gains minus losses if the true difference is `difference`.

    Args:
        gains: questions that only the tuned model answered right.
        losses: questions that only the base model answered right.
        num: questions.
        difference: the true difference of the shares of right answers.
    """
    linear = (2 * num - gains + losses) * difference - gains - losses
    constant = -losses * difference * (1 - difference)
    losing = (np.sqrt(np.maximum(linear**2 - 8 * num * constant, 0.0)) - linear) / (4 * num)
    variance: Floats = num * (2 * losing + difference * (1 - difference))
    return np.maximum(variance, np.float64(0.0))


def _statistic(gains: Floats, losses: Floats, num: Floats, difference: Floats) -> Floats:
    distance: Floats = gains - losses - num * difference
    with np.errstate(divide="ignore", invalid="ignore"):
        statistic: Floats = np.where(
            distance <= 0, 0.0, distance / np.sqrt(variance_at(gains, losses, num, difference))
        )
    return statistic
