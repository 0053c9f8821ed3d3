"""Simulated evaluations whose true differences are known, and the share of each verdict.

The estimates of all runs of one kind are computed together; each run is then decided by the rule
of the gate itself.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tuneline.artifacts import ComparisonRole, TaskComparison
from tuneline.gate.estimate import Estimate, estimate
from tuneline.verdict import GateRule, decide, decide_export

NUM_RUNS = 2000
NUM_RESAMPLES = 1000
MARGIN = 0.05
SHARE = 0.2  # of the answers that change, as tuneline.gate.power assumes

Array = np.ndarray


@dataclass(frozen=True)
class Task:
    """Differences of all runs, [NUM_RUNS, num_samples]."""

    differences: Array
    weights: Array | None = None
    clusters: Array | None = None

    def estimate(self) -> Estimate:
        weights = np.ones_like(self.differences) if self.weights is None else self.weights
        clusters = np.arange(weights.shape[1]) if self.clusters is None else self.clusters
        return estimate(
            self.differences,
            weights,
            clusters,
            binary=self.weights is None and bool(np.isin(self.differences, (-1, 0, 1)).all()),
            num_resamples=NUM_RESAMPLES,
            seed=1,
        )


def comparisons(task: Task, name: str, role: ComparisonRole) -> list[TaskComparison]:
    """Return the comparison of each run, as the gate would record it."""
    found = task.estimate()
    return [
        TaskComparison(
            task=name,
            metric="acc" if found.num_changed is not None else "log_perplexity",
            higher_is_better=True,
            base=0.0,
            tuned=float(found.difference[run]),
            difference=float(found.difference[run]),
            interval=(float(found.low[run]), float(found.high[run])),
            lower=float(found.lower[run]),
            num_samples=task.differences.shape[1],
            num_clusters=found.num_clusters,
            effective_samples=float(found.effective_samples[run]),
            num_changed=None if found.num_changed is None else int(found.num_changed[run]),
            outcome="undecided",
            role=role,
        )
        for run in range(len(task.differences))
    ]


def promoted(*tasks: tuple[Task, ComparisonRole], rule: GateRule | None = None) -> float:
    """Return the share of the runs that are promoted."""
    rule = rule or GateRule(max_regression=MARGIN)
    by_task = [
        comparisons(task, f"task{number}", role) for number, (task, role) in enumerate(tasks)
    ]
    verdicts = [decide(run, rule)[0] for run in zip(*by_task, strict=True)]
    return verdicts.count("promote") / len(verdicts)


class Draws:
    """Draws the answers of both models, with a seed of its own."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)

    def answers(self, size: int, gain: float = 0.0, share: float = SHARE) -> Task:
        """Right or wrong answers: `share` of them change, and `gain` is the true difference."""
        return Task(self._changes(size, gain, share))

    def answers_in_clusters(self, size: int, per_cluster: int, gain: float = 0.0) -> Task:
        """Answers of which four fifths agree with the others of their cluster."""
        clusters = np.arange(size) // per_cluster
        together = self._changes(clusters[-1] + 1, gain, SHARE)[:, clusters]
        alone = self.random.random((NUM_RUNS, size)) < 0.2
        return Task(np.where(alone, self._changes(size, gain, SHARE), together), None, clusters)

    def paraphrases(self, size: int) -> Task:
        """Answers to questions of which each is asked in four ways: a model knows it or not."""
        clusters = np.arange(size) // 4
        return Task(self._changes(clusters[-1] + 1, 0.0, SHARE)[:, clusters], None, clusters)

    def likelihoods(self, size: int) -> Task:
        """Log likelihoods per token without a gain; short answers vary more."""
        weights = self.lengths(size)
        return Task(self.random.normal(0, 1, weights.shape) / np.sqrt(weights), weights)

    def likelihoods_in_clusters(self, size: int, per_cluster: int) -> Task:
        clusters = np.arange(size) // per_cluster
        shape = (NUM_RUNS, size)
        shared = self.random.normal(0, 1, (NUM_RUNS, clusters[-1] + 1))[:, clusters]
        return Task(shared + self.random.normal(0, 0.5, shape), self.lengths(size), clusters)

    def rare_harms(self, size: int, share: float, gain: float = 0.0) -> Task:
        """A small gain on most answers, a harm that outweighs it on a few, weights unequal.

        `gain` is the true difference.
        """
        harmed = self.random.random((NUM_RUNS, size)) < share
        harm = -0.1 * (1 - share) / share
        noise = self.random.normal(0, 0.1, harmed.shape)
        return Task(np.where(harmed, harm, 0.1) + noise + gain, self.lengths(size))

    def gains_on_short(self, size: int) -> Task:
        """The difference falls with the logarithm of the length, and its weighted mean is 0."""
        weights = self.lengths(size)
        # E[w log w] / E[w] of a log-normal w is mu + sigma^2.
        differences = 0.2 * (4 + 0.8**2 - np.log(weights))
        return Task(differences + self.random.normal(0, 0.1, weights.shape), weights)

    def lengths(self, size: int) -> Array:
        """Tokens per answer: a log-normal with a median of 55, at least one."""
        return np.maximum(1.0, self.random.lognormal(4, 0.8, (NUM_RUNS, size)))

    def _changes(self, size: int, gain: float, share: float) -> Array:
        drawn = self.random.random((NUM_RUNS, size))
        gained = drawn < (share + gain) / 2
        return gained * 1.0 - (~gained & (drawn < share)) * 1.0


def targets_without_gain() -> dict[str, Callable[[Draws], Task]]:
    """Return how to draw each kind of target task whose true gain is 0, by its description."""
    kinds: dict[str, Callable[[Draws], Task]] = {}
    for size in (20, 50, 100, 200, 1000):
        for share in (0.05, 0.2, 0.5):
            kinds[f"0/1, {share:.0%} change, {size} questions".replace("%", " %")] = (
                lambda draws, size=size, share=share: draws.answers(size, share=share)
            )
    for size in (60, 100, 200, 1000):
        kinds[f"log likelihood, {size} answers"] = lambda draws, size=size: draws.likelihoods(size)
        for share in (0.05, 0.1):
            kinds[f"rare harms, {share:.0%} of {size} answers".replace("%", " %")] = (
                lambda draws, size=size, share=share: draws.rare_harms(size, share)
            )
        kinds[f"gains on short, losses on long, {size} answers"] = lambda draws, size=size: (
            draws.gains_on_short(size)
        )
    for size, each in ((200, 5), (200, 10), (1000, 5), (1000, 10)):
        kinds[f"0/1, clusters of {each}, {size} questions"] = lambda draws, size=size, each=each: (
            draws.answers_in_clusters(size, each)
        )
        kinds[f"log likelihood, clusters of {each}, {size} answers"] = (
            lambda draws, size=size, each=each: draws.likelihoods_in_clusters(size, each)
        )
    for size in (100, 200, 1000):
        kinds[f"four paraphrases, {size} questions"] = lambda draws, size=size: draws.paraphrases(
            size
        )
    return kinds


def guards(draws: Draws, *, num_guards: int, size: int, losses: int, loss: float) -> float:
    """Return the share of runs promoted with a clear gain, and `loss` on `losses` of the guards.

    Args:
        draws: where the answers come from.
        num_guards: number of guards.
        size: questions per guard.
        losses: number of guards with a true loss; the others have none.
        loss: the true loss of these guards.
    """
    tasks = [(draws.answers(200, gain=0.2, share=0.3), "target")]
    for guard in range(num_guards):
        tasks.append((draws.answers(size, gain=-loss if guard < losses else 0.0), "guard"))
    return promoted(*tasks)


def exports_passed(draws: Draws, *, size: int, share: float, loss: float) -> float:
    """Return the share of exports that are not held.

    Args:
        draws: where the answers come from.
        size: rows that the export and the merged model answer.
        share: share of the answers that change.
        loss: the true loss against the merged model.
    """
    task = draws.answers(size, gain=-loss, share=max(share, loss))
    rule = GateRule(max_regression=MARGIN)
    verdicts = [decide_export(item, rule)[0] for item in comparisons(task, "quiz", "export")]
    return verdicts.count("promote") / len(verdicts)
