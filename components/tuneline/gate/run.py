"""Compare the scores of two models sample by sample, and decide whether to publish."""

import logging
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tuneline.artifacts import (
    SAMPLES_DIR,
    Decision,
    Scores,
    TaskComparison,
    TaskScore,
    Verdict,
    new_directory,
    read_jsonl,
)
from tuneline.errors import TaskError
from tuneline.gate.bootstrap import mean_interval
from tuneline.gate.config import GateConfig
from tuneline.runtime.termination import Ending, leave

logger = logging.getLogger(__name__)

MIN_SAMPLES = 20
"""Minimum number of samples; with fewer, the interval of the bootstrap is unreliably narrow."""


def run(
    config: GateConfig,
    *,
    base_scores_dir: str | Path,
    tuned_scores_dir: str | Path,
    decision_dir: str | Path,
    summary_path: str | Path | None = None,
) -> Decision:
    """Decide by a paired bootstrap whether the tuned model may be published.

    A target task has to improve: its 95 % interval has to lie above 0. Another task must not get
    worse: the verdict is hold if its whole interval lies below -max_regression.

    Args:
        config: the `gate` section of the recipe.
        base_scores_dir: directory of the `scores` artifact of the base model.
        tuned_scores_dir: directory of the `scores` artifact of the tuned model, on the same tasks
            and samples.
        decision_dir: new directory for decision.json.
        summary_path: Markdown file with the decision, for KFP's UI. Default: none.

    Raises:
        TaskError: the models were not evaluated on the same tasks and samples.
    """
    started = time.monotonic()
    base, tuned = Scores.read(base_scores_dir), Scores.read(tuned_scores_dir)
    if set(base.tasks) != set(tuned.tasks):
        raise TaskError(
            f"the base model was evaluated on {', '.join(sorted(base.tasks))}, but the tuned model "
            f"on {', '.join(sorted(tuned.tasks))}. Evaluate both with the same evaluation config"
        )
    targets = set(config.target_tasks or base.tasks)
    if unknown := targets - set(base.tasks):
        raise TaskError(
            f"gate.target_tasks names {', '.join(sorted(unknown))}, which was not evaluated. "
            f"Name tasks among {', '.join(sorted(base.tasks))}"
        )
    with new_directory(decision_dir) as directory:
        comparisons = [
            _compare(
                task,
                base.tasks[task],
                tuned.tasks[task],
                _samples(base_scores_dir, task),
                _samples(tuned_scores_dir, task),
                target=task in targets,
                config=config,
            )
            for task in sorted(base.tasks, key=lambda task: (task not in targets, task))
        ]
        verdict, reason = _decide(comparisons, config)
        decision = Decision(
            verdict=verdict,
            reason=reason,
            comparisons=comparisons,
            seconds=round(time.monotonic() - started, 3),
        )
        decision.write(directory, config, parents=(base, tuned))
        if summary_path is not None:
            Path(summary_path).write_text(_markdown(decision), encoding="utf-8")
    logger.info("%s: %s", verdict, reason)
    leave(Ending(step="gate", result=verdict, text=reason))
    return decision


def _samples(scores_dir: str | Path, task: str) -> dict[str, dict[str, Any]]:
    path = Path(scores_dir, SAMPLES_DIR, f"{task}.jsonl")
    if not path.is_file():
        raise TaskError(
            f"{path} does not exist: the evaluation wrote no per-sample scores for {task}. Run it "
            "again"
        )
    return {row["id"]: row for row in read_jsonl(path)}


def _compare(
    task: str,
    base: TaskScore,
    tuned: TaskScore,
    base_samples: dict[str, dict[str, Any]],
    tuned_samples: dict[str, dict[str, Any]],
    *,
    target: bool,
    config: GateConfig,
) -> TaskComparison:
    if set(base_samples) != set(tuned_samples) or base.metric != tuned.metric:
        unmatched = set(base_samples) ^ set(tuned_samples)
        raise TaskError(
            f"{task}: base ({base.metric}, {len(base_samples)} samples) and tuned ({tuned.metric}, "
            f"{len(tuned_samples)} samples) were not evaluated on the same samples "
            f"({len(unmatched)} in one only). Evaluate both with the same dataset and config"
        )
    sign = 1.0 if base.higher_is_better else -1.0
    ids = sorted(base_samples)
    differences = sign * np.array(
        [tuned_samples[sample]["score"] - base_samples[sample]["score"] for sample in ids],
        dtype=np.float64,
    )
    # A weight is the length of a reference answer, so it is the same for both models.
    weights = np.array([base_samples[sample].get("weight", 1) for sample in ids], np.float64)
    if not np.isfinite(differences).all():
        raise TaskError(
            f"{task}: the score of a sample is not finite, so a model computes NaN or infinity. "
            "Check the training curves (the page of the train step) and merge.json"
        )
    low, high = mean_interval(
        differences, num_resamples=config.num_resamples, seed=config.seed, weights=weights
    )
    outcome: Literal["better", "worse", "undecided"] = "undecided"
    if low > 0:
        outcome = "better"
    elif high < 0:
        outcome = "worse"
    return TaskComparison(
        task=task,
        metric=base.metric,
        higher_is_better=base.higher_is_better,
        base=base.value,
        tuned=tuned.value,
        difference=float(np.average(differences, weights=weights)),
        interval=(low, high),
        num_samples=len(ids),
        outcome=outcome,
        target=target,
    )


def _decide(comparisons: list[TaskComparison], config: GateConfig) -> tuple[Verdict, str]:
    for item in comparisons:
        if item.num_samples < MIN_SAMPLES:
            return "hold", (
                f"{item.task} has {item.num_samples} samples, but a decision needs {MIN_SAMPLES}: "
                "raise prepare.heldout.max_rows"
            )
    for item in comparisons:
        if item.target and item.outcome != "better":
            why = "the score got worse" if item.outcome == "worse" else "the interval includes 0"
            return "hold", f"{_result(item)}: {why}"
        if not item.target and item.interval[1] < -config.max_regression:
            return "hold", f"{_result(item)}: a task that is no target got worse"
    return "promote", "; ".join(_result(item) for item in comparisons if item.target)


def _result(item: TaskComparison) -> str:
    return (
        f"{item.task} {item.difference:+.3f} {item.metric}, 95 % interval "
        f"[{item.interval[0]:+.3f}, {item.interval[1]:+.3f}]"
    )


def _markdown(decision: Decision) -> str:
    rows = [
        f"| {item.task} | {item.metric} | {item.base:.4f} | {item.tuned:.4f} | "
        f"{item.difference:+.4f} | [{item.interval[0]:+.4f}, {item.interval[1]:+.4f}] | "
        f"{item.num_samples} | {item.outcome} |"
        for item in decision.comparisons
    ]
    return "\n".join(
        [
            f"**{decision.verdict}**: {decision.reason}",
            "",
            "| task | metric | base | tuned | improvement | 95 % interval | samples | outcome |",
            "|---|---|---|---|---|---|---|---|",
            *rows,
            "",
        ]
    )
