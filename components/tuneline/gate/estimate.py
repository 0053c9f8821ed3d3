"""The difference between two models on one task, with bounds that hold for few samples.

Which method computes the bounds depends on the scores:

- All scores are 0 or 1 (right or wrong): the score interval. If samples share clusters, the numbers
  of questions and of changed answers are divided by the design effect: the variance between
  clusters, relative to that of independent samples.
- All other scores, and scores with weights: the bootstrap over clusters.
"""

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from tuneline.gate.bootstrap import Floats, resample
from tuneline.gate.proportion import score_bound

Integers = np.ndarray[tuple[int, ...], np.dtype[np.intp]]


@dataclass(frozen=True)
class Estimate:
    """Differences (positive: tuned is better) of data sets; one entry per data set."""

    difference: Floats
    low: Floats
    """Lower end of the 95 % interval."""
    high: Floats
    """Upper end of the 95 % interval."""
    lower: Floats
    """Bound above which the true difference lies with a probability of 95 %."""
    num_clusters: int
    effective_samples: Floats
    """(sum of weights)^2 / sum of squared weights, over clusters."""
    num_changed: Floats | None
    """Clusters with an answer that is right with one model only; None unless scores are 0 or 1."""


def estimate(
    differences: Floats,
    weights: Floats,
    clusters: Integers,
    *,
    binary: bool,
    num_resamples: int,
    seed: int,
) -> Estimate:
    """Estimate the weighted mean of each data set's differences.

    Args:
        differences: tuned minus base score per sample, [num_sets, num_samples].
        weights: positive weights of the samples, of the same shape.
        clusters: cluster of each sample, numbered from 0 without gaps, [num_samples].
        binary: whether all scores are 0 or 1 and all weights 1.
        num_resamples: number of resamples of the bootstrap.
        seed: seed of the bootstrap.
    """
    sums = _by_cluster(differences * weights, clusters)
    totals = _by_cluster(weights, clusters)
    effective = totals.sum(axis=1) ** 2 / (totals**2).sum(axis=1)
    num_clusters = totals.shape[1]
    if not binary:
        resampled = resample(sums, totals, num_resamples=num_resamples, seed=seed)
        low, high, lower = (resampled.bound(level) for level in (0.025, 0.975, 0.05))
        return Estimate(resampled.mean, low, high, lower, num_clusters, effective, None)
    num_samples = np.full(len(differences), float(differences.shape[1]))
    gains, losses = (differences > 0).sum(axis=1), (differences < 0).sum(axis=1)
    factor = _design_effect(differences, sums, totals)
    changed, num = (gains / factor, losses / factor), num_samples / factor
    z95, z90 = (np.full_like(num, _quantile(level, num_clusters)) for level in (0.975, 0.95))
    return Estimate(
        difference=(gains - losses) / num_samples,
        low=score_bound(*changed, num, z95, upper=False),
        high=score_bound(*changed, num, z95, upper=True),
        lower=score_bound(*changed, num, z90, upper=False),
        num_clusters=num_clusters,
        effective_samples=num,
        num_changed=(_by_cluster(np.abs(differences), clusters) > 0).sum(axis=1).astype(np.float64),
    )


def _by_cluster(values: Floats, clusters: Integers) -> Floats:
    if np.array_equal(clusters, np.arange(values.shape[1])):
        return values
    order = np.argsort(clusters, kind="stable")
    starts = np.searchsorted(clusters[order], np.arange(clusters.max() + 1))
    sums: Floats = np.add.reduceat(values[:, order], starts, axis=1)
    return sums


def _design_effect(differences: Floats, sums: Floats, totals: Floats) -> Floats:
    """Return the variance between clusters relative to that of independent samples, at least 1.

    It is the number of samples per cluster, weighted by itself, where no answer changed: whether
    answers would change together is then unknown.
    """
    num_clusters = totals.shape[1]
    if num_clusters == differences.shape[1]:
        return np.ones(len(differences))
    mean = differences.mean(axis=1, keepdims=True)
    between = ((sums - mean * totals) ** 2).sum(axis=1) * num_clusters / max(1, num_clusters - 1)
    independent = ((differences - mean) ** 2).sum(axis=1)
    largest = (totals**2).sum(axis=1) / totals.sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        effect: Floats = np.where(independent > 0, between / independent, largest)
    return np.maximum(effect, np.float64(1.0))


def _quantile(level: float, num_clusters: int) -> float:
    """Return the quantile of Student's t, which is near the normal one, to three terms."""
    z = NormalDist().inv_cdf(level)
    freedom = max(1, num_clusters - 1)
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
