"""Repeat or draw training rows by the weights of their datasets.

The weights are applied after the split, so that a row that is used twice is not taken for a
duplicate, and so that it cannot be both trained on and evaluated on.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy
from numpy.typing import NDArray

from tuneline.prepare.config import PrepareConfig


@dataclass(frozen=True)
class Weighted:
    """How often each training row is used."""

    uses: NDArray[numpy.int64]
    """Number of times that each of the given rows is used; 0 if it was not drawn."""
    num_distinct: list[int]
    """Number of different training rows of each dataset that are used."""
    num_used: list[int]
    """Number of training rows of each dataset, with repetitions."""


def apply_weights(
    train: NDArray[numpy.int64],
    ranges: Sequence[range],
    weights: Sequence[float],
    *,
    config: PrepareConfig,
) -> Weighted:
    """Return how often each training row is used: repeated or drawn by its dataset's weight.

    Args:
        train: indices of the training rows; each is in one of the ranges.
        ranges: indices of the rows of each dataset.
        weights: weight of each dataset.
        config: how weights count (`mixing`), and the seed.
    """
    uses = numpy.ones(len(train), numpy.int64)
    origin = numpy.full(len(train), -1)
    for number, indices in enumerate(ranges):
        origin[(train >= indices.start) & (train < indices.stop)] = number
    counts = [int((origin == number).sum()) for number in range(len(ranges))]
    random = numpy.random.default_rng(config.seed)
    distinct, used = [], []
    for number, factor in enumerate(_factors(counts, weights, config)):
        own = numpy.flatnonzero(origin == number)
        wanted = max(1, round(factor * len(own))) if len(own) else 0
        repeats, remaining = divmod(wanted, len(own)) if len(own) else (0, 0)
        uses[own] = repeats
        uses[random.permutation(own)[:remaining]] += 1
        distinct.append(len(own) if repeats else remaining)
        used.append(wanted)
    return Weighted(uses, distinct, used)


def _factors(counts: Sequence[int], weights: Sequence[float], config: PrepareConfig) -> list[float]:
    """Return how often each dataset's rows are used."""
    if config.mixing == "epochs" or len(counts) == 1:
        return list(weights)
    sizes = [count * weight for count, weight in zip(counts, weights, strict=True)]
    largest = max(sizes, default=0) or 1
    shares = [(size / largest) ** (1 / config.mixing_temperature) for size in sizes]
    return [
        sum(counts) * share / sum(shares) / count if count else 1.0
        for share, count in zip(shares, counts, strict=True)
    ]
