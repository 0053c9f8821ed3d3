"""The two intervals of the gate against other ways to compute them."""

import numpy as np
import pytest
from gate_scores import accuracies

from tuneline.gate.bootstrap import resample
from tuneline.gate.estimate import Estimate, estimate
from tuneline.gate.proportion import score_bound


def of(
    differences: np.ndarray,
    *,
    weights: np.ndarray | None = None,
    clusters: np.ndarray | None = None,
    binary: bool = False,
    num_resamples: int = 4000,
) -> Estimate:
    size = len(differences)
    return estimate(
        differences[None],
        (np.ones(size) if weights is None else weights)[None],
        np.arange(size) if clusters is None else clusters,
        binary=binary,
        num_resamples=num_resamples,
        seed=2,
    )


@pytest.mark.parametrize(
    ("gains", "losses", "size", "z"),
    [(17, 6, 150, 1.96), (3, 9, 40, 1.645), (1, 0, 44, 1.96), (0, 2, 300, 1.96)],
)
def test_the_score_bound_solves_its_equation(
    gains: float, losses: float, size: float, z: float
) -> None:
    data = [np.array([float(value)]) for value in (gains, losses, size, z)]
    low = float(score_bound(*data, upper=False)[0])
    assert float(score_bound(data[1], data[0], *data[2:], upper=True)[0]) == -low
    # The likeliest share of losses for this difference on a fine grid, instead of its closed form.
    share = np.linspace(max(0.0, -low), (1 - low) / 2, 1_000_001)[1:-1]
    log_likelihood = (
        gains * np.log(share + low)
        + losses * np.log(share)
        + (size - gains - losses) * np.log(1 - 2 * share - low)
    )
    losing = share[log_likelihood.argmax()]
    error = np.sqrt(size * (2 * losing + low - low**2))
    assert (gains - losses - size * low) / error == pytest.approx(z, abs=1e-3)


def test_without_a_change_the_score_interval_is_not_empty() -> None:
    found = of(np.zeros(50), binary=True)
    assert found.low[0] == pytest.approx(-(1.96**2) / (50 + 1.96**2), abs=0.004)
    assert found.high[0] == -found.low[0]


def test_the_percentile_interval_against_scipy() -> None:
    scipy_stats = pytest.importorskip("scipy.stats")
    differences = accuracies(1, 0.6) - accuracies(2, 0.4)
    found = resample(differences[None], np.ones((1, 200)), num_resamples=20_000, seed=0)
    other = scipy_stats.bootstrap(
        (differences,), np.mean, n_resamples=20_000, method="percentile", rng=5
    ).confidence_interval
    error = differences.std(ddof=1) / np.sqrt(200)
    assert found.error[0] == pytest.approx(error)
    assert np.quantile(found.means, 0.025) == pytest.approx(other.low, abs=0.15 * error)
    assert np.quantile(found.means, 0.975) == pytest.approx(other.high, abs=0.15 * error)


def test_the_studentised_bootstrap_against_a_plain_loop() -> None:
    generator = np.random.default_rng(7)
    weights = generator.integers(1, 9, 80).astype(float)
    differences = generator.exponential(1.0, 80) - 0.8
    found = resample((differences * weights)[None], weights[None], num_resamples=6000, seed=3)

    def mean_and_error(picked: np.ndarray) -> tuple[float, float]:
        w, d = weights[picked], differences[picked]
        mean = np.average(d, weights=w)
        return mean, np.sqrt(80 / 79 * ((w * (d - mean)) ** 2).sum()) / w.sum()

    mean, error = mean_and_error(np.arange(80))
    drawn = [mean_and_error(generator.integers(0, 80, 80)) for _ in range(6000)]
    distances = [(one - mean) / its_error for one, its_error in drawn]
    for level in (0.05, 0.95):
        assert np.quantile(found.distances, level) == pytest.approx(
            np.quantile(distances, level), abs=0.12
        )
    furthest = max(weights * abs(differences - mean)) / weights.sum()
    low = min(
        np.quantile([one for one, _ in drawn], 0.025), mean - np.quantile(distances, 0.975) * error
    )
    assert found.bound(0.025)[0] == pytest.approx(low - furthest, abs=0.1 * error)


def test_a_cluster_counts_as_one_sample() -> None:
    once = np.random.default_rng(1).normal(0.1, 1, 100)
    clusters = np.repeat(np.arange(100), 5)
    one, five = of(once), of(np.repeat(once, 5), clusters=clusters)
    assert five.num_clusters == 100
    for field in ("difference", "low", "high", "lower", "effective_samples"):
        assert getattr(five, field)[0] == pytest.approx(getattr(one, field)[0])


def test_a_cluster_of_right_and_wrong_answers_counts_as_one_sample() -> None:
    once = accuracies(1, 0.5, 100) - accuracies(2, 0.4, 100)
    # The order of the samples has no influence.
    order = np.random.default_rng(3).permutation(500)
    clusters = np.repeat(np.arange(100), 5)[order]
    five = of(np.repeat(once, 5)[order], clusters=clusters, binary=True)
    one = of(once, binary=True)
    assert five.num_changed[0] == one.num_changed[0] == np.abs(once).sum()
    assert five.low[0] == pytest.approx(one.low[0], abs=0.01)
    assert five.high[0] == pytest.approx(one.high[0], abs=0.01)
    independent = of(np.repeat(once, 5), binary=True)
    assert independent.low[0] - five.low[0] > 0.04


def test_the_effective_number_of_samples() -> None:
    weights = np.array([1.0] * 90 + [100.0] * 10)
    found = of(np.random.default_rng(1).normal(0, 1, 100), weights=weights)
    assert found.effective_samples[0] == pytest.approx(1090**2 / (90 + 10 * 100**2))


def test_equal_differences_have_an_interval_of_one_point() -> None:
    found = of(np.full(80, 0.25))
    assert (found.low[0], found.high[0]) == (pytest.approx(0.25), pytest.approx(0.25))
