"""Repeat or draw training rows by the weights of their datasets.

The weights are applied after the split, so that a row that is used twice is not taken for a
duplicate, and so that it cannot be both trained on and evaluated on.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy

from tuneline.prepare.config import PrepareConfig


@dataclass(frozen=True)
class Weighted:
    """Training rows after the weights were applied."""

    train: Sequence[int]
    """Indices of rows, in the order of training; an index may occur several times."""
    num_distinct: list[int]
    """Number of different training rows of each dataset that are used."""
    num_used: list[int]
    """Number of training rows of each dataset, with repetitions."""


def apply_weights(
    train: Sequence[int],
    ranges: Sequence[range],
    weights: Sequence[float],
    *,
    config: PrepareConfig,
) -> Weighted:
    """Return the training rows with each dataset's rows repeated or drawn by its weight.

    Rows of no range are kept once. If every factor is 1, the order stays as it is.

    Args:
        train: indices of the training rows.
        ranges: indices of the rows of each dataset.
        weights: weight of each dataset.
        config: how weights count (`mixing`), and the seed.
    """
    rows = numpy.asarray(train, dtype=numpy.int64)
    origin = numpy.full(len(rows), -1)
    for number, indices in enumerate(ranges):
        origin[(rows >= indices.start) & (rows < indices.stop)] = number
    counts = [int((origin == number).sum()) for number in range(len(ranges))]
    factors = _factors(counts, weights, config)
    if all(factor == 1 for factor in factors):
        return Weighted(train, counts, counts)
    random = numpy.random.default_rng(config.seed)
    parts = [rows[origin == -1]]
    distinct, used = [], []
    for number, factor in enumerate(factors):
        own = rows[origin == number]
        wanted = max(1, round(factor * len(own))) if len(own) else 0
        repeats, remaining = divmod(wanted, len(own)) if len(own) else (0, 0)
        parts += [numpy.tile(own, repeats), random.permutation(own)[:remaining]]
        distinct.append(len(own) if repeats else remaining)
        used.append(wanted)
    mixed = numpy.concatenate(parts)
    return Weighted(array("q", random.permutation(mixed).tobytes()), distinct, used)


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
