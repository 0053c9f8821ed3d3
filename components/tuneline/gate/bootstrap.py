"""The paired bootstrap: an interval of the mean difference between two models.

Both models answered the same samples, so the differences d_i of the samples are resampled instead
of the two lists of scores. The difficulty of a sample, which is the same for both models, then
cancels.
The interval is the percentile interval of the resampled means (Efron and Tibshirani, An
Introduction to the Bootstrap, 1993, chapter 13).

    mean* = sum_i w_i d_i / sum_i w_i   over n indices i, drawn from 1 to n with replacement

All weights w_i are one, except for scores that are ratios, such as nats per token, for which the
weight of a sample is the number of its tokens.
"""

import numpy as np

CHUNK_VALUES = 4_000_000
"""Number of resampled values that are in memory at the same time (32 MB)."""

Floats = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


def mean_interval(
    differences: Floats,
    *,
    num_resamples: int,
    seed: int,
    level: float = 0.95,
    weights: Floats | None = None,
) -> tuple[float, float]:
    """Return the `level` percentile interval of the mean.

    Args:
        differences: one number per sample, [num_samples], not empty.
        num_resamples: number of resamples; more make the interval more stable, not narrower.
        seed: seed of the resampling.
        level: probability that the interval covers the true mean, 0 to 1.
        weights: one positive number per sample. Default: ones.
    """
    generator = np.random.default_rng(seed)
    num_samples = len(differences)
    if weights is None:
        weights = np.ones(num_samples)
    weighted = differences * weights
    chunk = max(1, CHUNK_VALUES // num_samples)
    means = np.empty(num_resamples)
    for start in range(0, num_resamples, chunk):
        size = min(chunk, num_resamples - start)
        drawn = generator.integers(0, num_samples, (size, num_samples))
        means[start : start + size] = weighted[drawn].sum(axis=1) / weights[drawn].sum(axis=1)
    tail = (1 - level) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)
