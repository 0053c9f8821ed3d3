"""Scores of two models, written as the evaluate step writes them."""

from pathlib import Path
from typing import Any

import numpy as np
from small_records import new_origin

from tuneline.artifacts import Decision, ModelOrigin, Scores, TaskScore, write_jsonl
from tuneline.gate import GateConfig
from tuneline.gate.run import run
from tuneline.record import Ancestor
from tuneline.strict_model import StrictModel

Tasks = dict[str, Any]
"""An array of scores, or a list of rows, by the task's name."""


class Evaluated(StrictModel):
    """Settings of an evaluation."""

    limit: int | None = None
    num_fewshot: int | None = None
    batch_size: int = 8


def origin(sha256: str = "b" * 64, **made_from: str) -> ModelOrigin:
    ancestors = {name: Ancestor(sha256=sha) for name, sha in made_from.items()}
    return new_origin(sha256=sha256, made_from=ancestors)


BASE_PARENT = origin(dataset="d" * 64)
TUNED_PARENT = origin(dataset="d" * 64, merged="c" * 64)


def write_scores(
    directory: Path,
    label: str,
    tasks: Tasks,
    *,
    metric: str = "acc",
    higher: bool = True,
    groups: dict[str, list[str]] | None = None,
    settings: Evaluated | None = None,
    parent: ModelOrigin | None = None,
    harness: str = "test",
    prompted: Tasks | None = None,
) -> Path:
    scored = {}
    for name, measured in (("samples", tasks), ("prompted", prompted or {})):
        (directory / name).mkdir(parents=True)
        scored[name] = _write_samples(directory / name, measured, metric, higher)
    parent = parent or (BASE_PARENT if label == "base" else TUNED_PARENT)
    Scores(
        model=label,
        tasks=scored["samples"],
        groups=groups or {},
        harness=harness,
        num_examples=8 if prompted else 0,
        prompted=scored["prompted"],
    ).write(directory, settings or Evaluated(), parents=[parent])
    return directory


def _write_samples(
    directory: Path, tasks: Tasks, metric: str, higher: bool
) -> dict[str, TaskScore]:
    records = {}
    for task, values in tasks.items():
        rows = [
            value if isinstance(value, dict) else {"id": f"{task}-{number}", "score": float(value)}
            for number, value in enumerate(values)
        ]
        write_jsonl(directory / f"{task}.jsonl", rows)
        scores = [row["score"] for row in rows]
        weights = [row.get("weight", 1) for row in rows]
        records[task] = TaskScore(
            metric=metric,
            higher_is_better=higher,
            value=float(np.average(np.nan_to_num(scores), weights=weights)),
            num_samples=len(rows),
        )
    return records


def gate(
    root: Path, *, earlier: Path | None = None, merged: Path | None = None, **config: object
) -> Decision:
    """Decide on the scores in `root`."""
    return run(
        GateConfig(**config),
        base_scores_dir=root / "base",
        tuned_scores_dir=root / "tuned",
        decision_dir=root / "decision",
        earlier_path=earlier,
        merged_dir=merged,
        summary_path=root / "summary.md",
    )


def decide(
    tmp_path: Path,
    base: Tasks,
    tuned: Tasks,
    *,
    metric: str = "acc",
    higher: bool = True,
    groups: dict[str, list[str]] | None = None,
    **config: object,
) -> Decision:
    """Write the scores of two models and decide on them.

    Args:
        tmp_path: directory for the scores and the decision.
        base: scores of the base model.
        tuned: scores of the tuned model.
        metric: metric of all tasks.
        higher: whether higher scores are better.
        groups: names of groups, with their tasks.
        config: values of the config of the gate.
    """
    root = tmp_path / str(len(list(tmp_path.iterdir())))
    for label, tasks in (("base", base), ("tuned", tuned)):
        write_scores(root / label, label, tasks, metric=metric, higher=higher, groups=groups)
    return gate(root, **config)


def accuracies(seed: int, share: float, size: int = 200) -> np.ndarray:
    return (np.random.default_rng(seed).random(size) < share).astype(float)
