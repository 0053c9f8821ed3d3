"""What a gate can find with a number of samples, before anything was measured.

The power of right or wrong answers depends on how many of them change at all. An assumed share
stands for it: fine-tuning that matters changes about one answer in five.

    standard error = sqrt((share - gain^2) / num_samples)

`tests/gate/test_power.py` compares these numbers with simulated gates.
"""

import math
from statistics import NormalDist

import numpy as np

from tuneline.gate.proportion import variance_at
from tuneline.verdict import Z_LEVEL

SHARE_OF_CHANGED_ANSWERS = 0.2
"""Assumed share of the answers that one model gets right and the other wrong."""
SHARE_CHANGED_BY_EXPORTS = 0.1
"""Assumed share of the answers that an export and the merged model do not both get right or both
wrong. Formats with few bits change more; q8_0 and f16 change hardly any."""
POWER = 0.8
"""Probability with which a gain has to be found for it to count as one that can be found."""
PASSING = 0.9
"""Probability with which a model that lost nothing has to pass all guards."""
Z_INTERVAL = 1.96


def least_gain(num_samples: int) -> float:
    """Return the gain of right answers that is found 80 % of the time, 0 to 1.

    With few samples it is larger than the assumed share of changed answers, which is then all
    gains and larger as well.
    """
    z = Z_INTERVAL + NormalDist().inv_cdf(POWER)
    share = SHARE_OF_CHANGED_ANSWERS
    gain = z * math.sqrt(share / (num_samples + z**2))
    # If every changed answer is a gain, the share is the gain: gain = z sqrt((gain - gain^2) / n).
    return gain if gain <= share else z**2 / (num_samples + z**2)


def least_effect(num_samples: int) -> float:
    """Return the gain that is found 80 % of the time, in standard deviations of the differences."""
    return (Z_INTERVAL + NormalDist().inv_cdf(POWER)) / math.sqrt(num_samples)


def samples_for_margin(margin: float, num_guards: int) -> int:
    """Return the samples per guard with which a model that lost nothing passes 90 % of the time.

    Args:
        margin: gate.max_regression.
        num_guards: number of guards, all of which have to pass.
    """
    share = SHARE_OF_CHANGED_ANSWERS
    mean = (Z_LEVEL + NormalDist().inv_cdf(PASSING)) ** 2 * share / (margin**2 * num_guards)
    if num_guards == 1:
        return math.ceil(mean)
    each = (Z_INTERVAL + NormalDist().inv_cdf(PASSING ** (1 / num_guards))) ** 2
    return math.ceil(max(mean, each * share / (2 * margin) ** 2))


def rows_for_exports(margin: float) -> int:
    """Return the rows with which an export that lost nothing is published 90 % of the time.

    Args:
        margin: gate.max_regression.
    """
    # Per row. Of the answers that change, half are gains. The variance is that of a true loss of
    # 2 x margin for the level, and that of no loss for the power.
    half = np.array(SHARE_CHANGED_BY_EXPORTS / 2)
    at_loss = float(variance_at(half, half, np.array(1.0), np.array(-2 * margin)))
    at_equal = SHARE_CHANGED_BY_EXPORTS
    deviations = Z_LEVEL * math.sqrt(at_loss)
    deviations += NormalDist().inv_cdf(PASSING) * math.sqrt(at_equal)
    return math.ceil((deviations / (2 * margin)) ** 2)


def least_rows_for_exports(margin: float) -> int:
    """Return the rows below which every export is held, even one that changes no answer.

    Without a change, the score interval's lower bound is -z^2 / (n + z^2).

    Args:
        margin: gate.max_regression.
    """
    return math.ceil(Z_LEVEL**2 * max(0.0, 1 / (2 * margin) - 1))
