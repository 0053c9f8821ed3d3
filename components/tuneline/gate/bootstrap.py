"""The paired bootstrap: how sure a difference of means is, sample by sample.

Both models answered the same samples, so the differences d_i are resampled, not the two lists of
scores: what makes a sample hard for both drops out. The interval is the percentile interval of
the resampled means (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13).

    mean* = sum_i w_i d_i / sum_i w_i   over n samples i drawn with replacement from the n

The weights are all one, or the tokens of a sample where scores are ratios such as nats a token.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

CHUNK_VALUES = 4_000_000
"""Resampled values held at once: 32 MB."""


def mean_interval(
    differences: "np.ndarray",
    *,
    num_resamples: int,
    seed: int,
    level: float = 0.95,
    weights: "np.ndarray | None" = None,
) -> tuple[float, float]:
    """Return the `level` percentile interval of the mean.

    Args:
        differences: one number a sample, float64 [num_samples], not empty.
        num_resamples: more make the ends steadier, not narrower.
        seed: the same seed gives the same interval.
        level: probability that the interval covers the true mean, 0 to 1.
        weights: one positive number a sample; default: ones.
    """
    import numpy as np

    generator = np.random.default_rng(seed)
    num_samples = len(differences)
    if weights is None:
        weights = np.ones(num_samples)
    weighted = differences * weights
    chunk = max(1, CHUNK_VALUES // num_samples)
    means = np.empty(num_resamples)
    for start in range(0, num_resamples, chunk):
        size = min(chunk, num_resamples - start)
        picked = generator.integers(0, num_samples, (size, num_samples))
        means[start : start + size] = weighted[picked].sum(axis=1) / weights[picked].sum(axis=1)
    tail = (1 - level) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)
