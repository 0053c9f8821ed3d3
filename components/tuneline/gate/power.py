"""What a gate can find with a number of samples, before anything was measured.

The power of right or wrong answers depends on how many of them change at all. An assumed share
stands for it: fine-tuning that matters changes about one answer in five.

    standard error = sqrt((share - gain^2) / num_samples)

`tests/gate/test_power.py` compares these numbers with simulated gates.
"""

import math
from statistics import NormalDist

from tuneline.verdict import Z_LEVEL

SHARE_OF_CHANGED_ANSWERS = 0.2
"""Assumed share of the answers that one model gets right and the other wrong."""
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
