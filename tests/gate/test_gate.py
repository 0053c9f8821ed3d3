"""The gate: its interval against other ways to compute it, and what it decides."""

from pathlib import Path

import numpy as np
import pytest

from tuneline.artifacts import Decision, Scores, TaskScore, read_jsonl, write_jsonl
from tuneline.errors import TaskError
from tuneline.gate import GateConfig
from tuneline.gate.bootstrap import mean_interval
from tuneline.gate.run import run


def write_scores(
    directory: Path, label: str, tasks: dict[str, np.ndarray], *, higher: bool = True
) -> Path:
    (directory / "samples").mkdir(parents=True)
    records = {}
    for task, values in tasks.items():
        rows = [{"id": f"{task}-{i}", "score": float(value)} for i, value in enumerate(values)]
        write_jsonl(directory / "samples" / f"{task}.jsonl", rows)
        records[task] = TaskScore(
            metric="acc" if higher else "nll",
            higher_is_better=higher,
            value=float(np.nan_to_num(values).mean()),
            num_samples=len(values),
        )
    Scores(model=label, tasks=records, harness="test").write(directory)
    return directory


def decide(
    tmp_path: Path,
    base: dict[str, np.ndarray],
    tuned: dict[str, np.ndarray],
    *,
    higher: bool = True,
    **config: object,
) -> Decision:
    count = len(list(tmp_path.iterdir()))
    root = tmp_path / str(count)
    return run(
        GateConfig(**config),
        base_scores_dir=write_scores(root / "base", "base", base, higher=higher),
        tuned_scores_dir=write_scores(root / "tuned", "tuned", tuned, higher=higher),
        decision_dir=root / "decision",
        summary_path=root / "summary.md",
    )


def accuracies(seed: int, share: float, size: int = 200) -> np.ndarray:
    return (np.random.default_rng(seed).random(size) < share).astype(float)


def test_the_interval_against_scipy_and_the_normal_approximation() -> None:
    scipy_stats = pytest.importorskip("scipy.stats")
    differences = accuracies(1, 0.6) - accuracies(2, 0.4)
    low, high = mean_interval(differences, num_resamples=20_000, seed=0)
    other = scipy_stats.bootstrap(
        (differences,), np.mean, n_resamples=20_000, method="percentile", rng=5
    ).confidence_interval
    error = differences.std(ddof=1) / np.sqrt(len(differences))
    assert low == pytest.approx(other.low, abs=0.15 * error)
    assert high == pytest.approx(other.high, abs=0.15 * error)
    assert low == pytest.approx(differences.mean() - 1.96 * error, abs=0.2 * error)
    assert high == pytest.approx(differences.mean() + 1.96 * error, abs=0.2 * error)


def test_the_interval_against_a_plain_loop() -> None:
    differences = np.array([0.0, 1.0, 1.0, -1.0, 0.5])
    generator = np.random.default_rng(3)
    means = sorted(generator.choice(differences, 5).mean() for _ in range(20_000))
    low, high = mean_interval(differences, num_resamples=20_000, seed=3)
    assert low == pytest.approx(means[500], abs=0.05)
    assert high == pytest.approx(means[19_500], abs=0.05)
    assert mean_interval(differences, num_resamples=500, seed=1) == mean_interval(
        differences, num_resamples=500, seed=1
    )


def test_the_weighted_interval_against_a_plain_loop_and_the_delta_method() -> None:
    generator = np.random.default_rng(7)
    weights = generator.integers(1, 9, 150).astype(float)
    differences = generator.normal(0.1, 0.5, 150)
    low, high = mean_interval(differences, num_resamples=4000, seed=2, weights=weights)
    means = []
    for _ in range(4000):
        picked = generator.integers(0, 150, 150)
        means.append(np.average(differences[picked], weights=weights[picked]))
    mean = np.average(differences, weights=weights)
    error = np.sqrt(((weights * (differences - mean)) ** 2).sum()) / weights.sum()
    assert low == pytest.approx(np.quantile(means, 0.025), abs=0.15 * error)
    assert high == pytest.approx(np.quantile(means, 0.975), abs=0.15 * error)
    assert (low + high) / 2 == pytest.approx(mean, abs=0.15 * error)
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.1)


def test_weights_in_the_samples_are_used(tmp_path: Path) -> None:
    base = np.full(40, 2.0)
    # Long answers became better by 1, short ones worse by 1: in tokens, that is better.
    tuned = np.where(np.arange(40) < 20, 1.0, 3.0)
    directories = {
        label: write_scores(tmp_path / label, label, {"loss": values}, higher=False)
        for label, values in (("base", base), ("tuned", tuned))
    }
    for directory in directories.values():
        rows = read_jsonl(directory / "samples" / "loss.jsonl")
        weighted = [row | {"weight": 30 if i < 20 else 1} for i, row in enumerate(rows)]
        write_jsonl(directory / "samples" / "loss.jsonl", weighted)
    decision = run(
        GateConfig(),
        base_scores_dir=directories["base"],
        tuned_scores_dir=directories["tuned"],
        decision_dir=tmp_path / "decision",
    )
    assert decision.verdict == "promote"
    assert decision.comparisons[0].difference == pytest.approx((30 - 1) / 31)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    # 400 data sets without any gain: a bound above 0 in 2.5 % of them, give or take.
    generator = np.random.default_rng(11)
    promoted = 0
    for trial in range(400):
        differences = generator.integers(-1, 2, 100).astype(float)
        promoted += mean_interval(differences, num_resamples=400, seed=trial)[0] > 0
    assert 1 <= promoted <= 22


def test_equal_scores_hold(tmp_path: Path) -> None:
    scores = {"quiz": accuracies(1, 0.5)}
    decision = decide(tmp_path, scores, scores)
    assert decision.verdict == "hold"
    assert decision.comparisons[0].interval == (0.0, 0.0)


def test_shuffled_scores_hold_and_the_right_ones_promote(tmp_path: Path) -> None:
    base = accuracies(1, 0.3)
    tuned = np.maximum(base, accuracies(2, 0.6))
    won = decide(tmp_path, {"quiz": base}, {"quiz": tuned})
    assert won.verdict == "promote"
    assert won.comparisons[0].difference == pytest.approx((tuned - base).mean())
    # The same scores dealt out at random to the two models: no model is better.
    swap = np.random.default_rng(5).random(len(base)) < 0.5
    mixed = np.where(swap, base, tuned), np.where(swap, tuned, base)
    held = decide(tmp_path, {"quiz": mixed[0]}, {"quiz": mixed[1]})
    assert held.verdict == "hold"
    assert "the interval includes 0" in held.reason


def test_lower_is_better_is_turned(tmp_path: Path) -> None:
    loss = np.random.default_rng(1).normal(2.0, 0.3, 100)
    decision = decide(tmp_path, {"loss": loss}, {"loss": loss - 0.5}, higher=False)
    assert decision.verdict == "promote"
    assert decision.comparisons[0].difference == pytest.approx(0.5)
    worse = decide(tmp_path, {"loss": loss}, {"loss": loss + 0.5}, higher=False)
    assert worse.verdict == "hold"
    assert worse.comparisons[0].outcome == "worse"


def test_another_task_must_not_become_worse(tmp_path: Path) -> None:
    base = {"quiz": accuracies(1, 0.2), "general": accuracies(2, 0.8)}
    tuned = {"quiz": accuracies(3, 0.9), "general": accuracies(4, 0.5)}
    held = decide(tmp_path, base, tuned, target_tasks=("quiz",))
    assert held.verdict == "hold"
    assert held.reason.startswith("general")
    allowed = decide(tmp_path, base, tuned, target_tasks=("quiz",), max_regression=0.5)
    assert allowed.verdict == "promote"


def test_few_samples_decide_nothing(tmp_path: Path) -> None:
    decision = decide(tmp_path, {"quiz": np.zeros(19)}, {"quiz": np.ones(19)})
    assert decision.verdict == "hold"
    assert "19 samples" in decision.reason


@pytest.mark.parametrize(
    ("base", "tuned", "says"),
    [
        ({"quiz": np.ones(30)}, {"quiz": np.ones(31)}, "not evaluated on the same samples"),
        ({"quiz": np.ones(30)}, {"other": np.ones(30)}, "with the same evaluation config"),
        ({"quiz": np.ones(30)}, {"quiz": np.full(30, np.nan)}, "score of a sample is not finite"),
    ],
)
def test_scores_that_cannot_be_compared(tmp_path: Path, base: dict, tuned: dict, says: str) -> None:
    with pytest.raises(TaskError, match=says):
        decide(tmp_path, base, tuned)


def test_the_summary_says_what_the_record_says(tmp_path: Path) -> None:
    decision = decide(tmp_path, {"quiz": np.zeros(50)}, {"quiz": np.ones(50)})
    text = (tmp_path / "0" / "summary.md").read_text()
    assert text.startswith(f"**promote**: {decision.reason}")
    assert "| quiz | acc | 0.0000 | 1.0000 | +1.0000 | [+1.0000, +1.0000] | 50 | better |" in text
