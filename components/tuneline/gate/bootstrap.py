"""Bootstrap intervals of weighted means over clusters of samples, for many data sets at once.

Both models answered the same samples, so the differences of the samples are resampled instead of
the two lists of scores. The difficulty of a sample, which is the same for both models, then
cancels. Samples of one cluster depend on each other, so clusters are resampled as wholes:

    mean* = sum_c S_c / sum_c W_c   over n clusters c, drawn from 1 to n with replacement

W_c is the sum of the weights in a cluster, and S_c the weighted sum of its differences. Two
intervals are computed from the same resamples, and the wider end of each side counts: the
percentile interval, and the bootstrap-t interval, whose resampled means are divided by their own
standard errors (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapters 12 and 13).
Where a few samples decide the mean, the percentile interval alone is too narrow. Neither interval
knows of harms that the samples happen not to contain, so each end is moved outwards by what one
more cluster would change that lies as far from the mean as the furthest.

How often each cluster is drawn in each resample is a matrix of counts, so that all sums over
clusters are matrix products. The data sets of a simulation share this matrix.
"""

from dataclasses import dataclass

import numpy as np

CHUNK_VALUES = 4_000_000
"""Number of counts that are in memory at the same time (32 MB)."""

Floats = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


@dataclass(frozen=True)
class Resampled:
    """Resampled means of data sets; every field has a row or an entry per data set."""

    mean: Floats
    """Weighted mean of each data set, [num_sets]."""
    error: Floats
    """Standard error of each mean, [num_sets]."""
    means: Floats
    """Means of the resamples, [num_resamples, num_sets]."""
    distances: Floats
    """Means of the resamples minus `mean`, in standard errors of the resample, [num_resamples,
    num_sets]."""
    reserve: Floats
    """How far one more cluster, as far from the mean as the furthest, would move the mean,
    [num_sets]."""

    def bound(self, level: float) -> Floats:
        """Return the bound below which each true mean lies with the probability `level`.

        Args:
            level: below 0.5 for a lower end of an interval, above 0.5 for an upper end.
        """
        percentile = np.quantile(self.means, level, axis=0)
        studentised = self.mean - np.quantile(self.distances, 1 - level, axis=0) * self.error
        if level < 0.5:
            low: Floats = np.minimum(percentile, studentised) - self.reserve
            return low
        high: Floats = np.maximum(percentile, studentised) + self.reserve
        return high


def resample(sums: Floats, weights: Floats, *, num_resamples: int, seed: int) -> Resampled:
    """Resample the clusters of each data set.

    Args:
        sums: weighted sum of the differences per cluster, [num_sets, num_clusters].
        weights: sum of the weights per cluster, positive, of the same shape.
        num_resamples: number of resamples; more make the interval more stable, not narrower.
        seed: seed of the resampling.
    """
    generator = np.random.default_rng(seed)
    num_sets, size = sums.shape
    small_sample = size / max(1, size - 1)
    mean, error = _mean_and_error(np.ones((1, size)), sums, weights, small_sample=small_sample)
    means = np.empty((num_resamples, num_sets))
    distances = np.empty((num_resamples, num_sets))
    chunk = max(1, CHUNK_VALUES // size)
    for start in range(0, num_resamples, chunk):
        rows = min(chunk, num_resamples - start)
        drawn = generator.integers(0, size, (rows, size))
        drawn += np.arange(rows)[:, None] * size
        counts = np.bincount(drawn.ravel(), minlength=rows * size).reshape(rows, size)
        some, errors = _mean_and_error(
            counts.astype(np.float64), sums, weights, small_sample=small_sample
        )
        means[start : start + rows] = some
        apart = some - mean
        # A resample without variation is infinitely many standard errors away, unless it equals
        # the mean. A large finite number keeps the quantiles' interpolation defined.
        with np.errstate(divide="ignore", invalid="ignore"):
            distances[start : start + rows] = np.nan_to_num(
                np.where(apart == 0, 0.0, apart / errors), posinf=1e9, neginf=-1e9
            )
    furthest = np.abs(sums - mean.T * weights).max(axis=1)
    return Resampled(mean[0], error[0], means, distances, furthest / weights.sum(axis=1))


def _mean_and_error(
    counts: Floats, sums: Floats, weights: Floats, *, small_sample: float
) -> tuple[Floats, Floats]:
    """Return means and standard errors of the resamples, each [num_resamples, num_sets].

    Args:
        counts: how often each cluster is in each resample, [num_resamples, num_clusters].
        sums: weighted sum of the differences per cluster, [num_sets, num_clusters].
        weights: sum of the weights per cluster, of the same shape.
        small_sample: factor of the variance, n / (n - 1) for n clusters.
    """
    total = counts @ weights.T
    mean = (counts @ sums.T) / total
    squares = (
        counts @ (sums * sums).T
        - 2 * mean * (counts @ (sums * weights).T)
        + mean * mean * (counts @ (weights * weights).T)
    )
    # Rounding can leave a tiny negative number where there is no variation.
    error: Floats = np.sqrt(np.maximum(squares, 0.0) * small_sample) / total
    return mean, error
