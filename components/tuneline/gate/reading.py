"""Read the scores of two models, and check that they can be compared.

Nothing that the gate reads is taken on trust: the files against the hashes in the record, the
samples against the record's counts and values, and the two records against each other.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tuneline.artifacts import (
    PROMPTED_DIR,
    SAMPLES_DIR,
    DatasetManifest,
    MergeProof,
    ModelOrigin,
    Scores,
    TaskScore,
    read_jsonl,
)
from tuneline.errors import TaskError
from tuneline.gate.bootstrap import Floats

SETTINGS_OF_SPEED = {"batch_size", "num_generations", "max_new_tokens"}
"""Settings of the evaluation that change no score."""
SHOWN = 3
"""Number of samples that a message names."""


@dataclass(frozen=True)
class Samples:
    """The samples of one task, in the order of their IDs."""

    ids: list[str]
    scores: Floats
    weights: Floats
    clusters: list[str]
    """Name of each sample's cluster; a sample that depends on no other has its own ID."""

    @property
    def binary(self) -> bool:
        """Return whether all scores are 0 or 1 and all weights are 1."""
        return bool(np.isin(self.scores, (0.0, 1.0)).all() and (self.weights == 1).all())


@dataclass(frozen=True)
class Evaluation:
    """The scores of one model."""

    record: Scores
    samples: dict[str, Samples]
    prompted: dict[str, Samples]
    """Samples of the base model with training rows in its prompts."""


def read(base_dir: str | Path, tuned_dir: str | Path) -> tuple[Evaluation, Evaluation]:
    """Read the scores of the base and of the tuned model.

    Raises:
        TaskError: the scores are incomplete, or those of two models cannot be compared.
        WorldError: a record is missing, or a file was changed after it was made.
    """
    records = [Scores.read(base_dir), Scores.read(tuned_dir)]
    _check_pair(*records)
    evaluations = []
    for record, directory in zip(records, (base_dir, tuned_dir), strict=True):
        record.check_files(directory)
        evaluations.append(
            Evaluation(
                record,
                _all_samples(record.tasks, record, Path(directory, SAMPLES_DIR)),
                _all_samples(record.prompted, record, Path(directory, PROMPTED_DIR)),
            )
        )
    base, tuned = evaluations
    for task in base.samples:
        _check_task(task, base, tuned)
    for task, samples in base.prompted.items():
        _check_same_samples(task, samples, tuned.samples[task])
    return base, tuned


def _all_samples(
    scores: Mapping[str, TaskScore], record: Scores, directory: Path
) -> dict[str, Samples]:
    return {task: _samples(scores[task], record, directory, task) for task in sorted(scores)}


def _samples(recorded: TaskScore, record: Scores, directory: Path, task: str) -> Samples:
    """Read the samples of one task, and check them against the record.

    Args:
        recorded: the score of the task.
        record: the record.
        directory: directory of the samples.
        task: name of the task.

    Raises:
        TaskError: samples are missing, doubled or not finite, or differ from the record.
    """
    name = f"{directory.name}/{task}.jsonl"
    path = directory / f"{task}.jsonl"
    again = "Run the evaluation again"
    if name not in record.files or not path.is_file():
        raise TaskError(
            f"{path} does not exist or is not in its record: the evaluation wrote no per-sample "
            f"scores for {task}. {again}"
        )
    rows = sorted(read_jsonl(path), key=lambda row: str(row.get("id")))
    wrong = [row for row in rows if not _is_sample(row)]
    if wrong:
        raise TaskError(
            f"{path}: a sample needs an ID, a number as its score and a positive number as its "
            f"weight, but {len(wrong)} have not, the first is {str(wrong[0])[:120]}. {again}"
        )
    ids = [row["id"] for row in rows]
    if doubled := [sample for sample, times in Counter(ids).items() if times > 1]:
        raise TaskError(f"{path} has samples twice: {_named(doubled)}. {again}")
    if infinite := [row["id"] for row in rows if not math.isfinite(row["score"])]:
        raise TaskError(
            f"{task}: the score of a sample is not finite ({_named(infinite)}), so a model "
            "computes NaN or infinity. Check the training curves (the page of the train step) and "
            "merge.json"
        )
    scores = np.array([row["score"] for row in rows], np.float64)
    weights = np.array([row.get("weight", 1) for row in rows], np.float64)
    if len(rows) != recorded.num_samples:
        raise TaskError(
            f"{path} has {len(rows)} samples, but its record has {recorded.num_samples}: samples "
            f"were removed or added. {again}"
        )
    value = float(np.average(scores, weights=weights))
    if not math.isclose(value, recorded.value, rel_tol=1e-6, abs_tol=1e-9):
        raise TaskError(
            f"{path}: the mean of the samples is {value:.6g}, but its record has "
            f"{recorded.value:.6g}: samples or the record were changed. {again}"
        )
    return Samples(ids, scores, weights, [str(row.get("cluster", row["id"])) for row in rows])


def _is_sample(row: dict[str, Any]) -> bool:
    score, weight = row.get("score"), row.get("weight", 1)
    return (
        isinstance(row.get("id"), str)
        and isinstance(score, int | float)
        and isinstance(weight, int | float)
        and math.isfinite(weight)
        and weight > 0
    )


def _check_pair(base: Scores, tuned: Scores) -> None:
    """Check that two records describe the same evaluation of a base model and of its tuned model.

    Raises:
        TaskError: they do not.
    """
    same = "Evaluate both with the same evaluation config"
    if base.model != "base" or tuned.model == "base":
        raise TaskError(
            f"the scores to compare are of the models '{base.model}' and '{tuned.model}', but the "
            "first has to be 'base' and the second another one. Swap them, or evaluate both again"
        )
    if set(base.tasks) != set(tuned.tasks) or base.groups != tuned.groups:
        raise TaskError(
            f"the base model was evaluated on {', '.join(sorted(base.tasks))}, but the tuned model "
            f"on {', '.join(sorted(tuned.tasks))}. {same}"
        )
    for key in sorted((base.settings.keys() | tuned.settings.keys()) - SETTINGS_OF_SPEED):
        one, other = base.settings.get(key), tuned.settings.get(key)
        if one != other:
            raise TaskError(
                f"the base model was evaluated with evaluate.{key} {one}, but the tuned model with "
                f"{other}. {same}"
            )
    if base.harness != tuned.harness:
        raise TaskError(
            f"the base model was evaluated by {base.harness}, but the tuned model by "
            f"{tuned.harness}. {same} and the same image"
        )
    needed = {
        base.called(): (base, (DatasetManifest.role, ModelOrigin.role)),
        tuned.called(): (tuned, (DatasetManifest.role, ModelOrigin.role, MergeProof.role)),
    }
    for name, (record, roles) in needed.items():
        if missing := [role for role in roles if role not in record.made_from]:
            raise TaskError(
                f"the record of {name} does not say from which {' and '.join(missing)} it was "
                "made, so nothing shows that the models can be compared. Evaluate the model in "
                "the directory that its step made, with its record"
            )
    for role in sorted(base.made_from.keys() & tuned.made_from.keys()):
        one, other = base.made_from[role].sha256, tuned.made_from[role].sha256
        if one != other:
            raise TaskError(
                f"the base scores were made from the {role} {one[:12]}, but the tuned scores from "
                f"{other[:12]}. Evaluate the base model that was tuned, on the same dataset"
            )


def _check_task(task: str, base: Evaluation, tuned: Evaluation) -> None:
    """Check that both models were measured on the same samples by the same metric.

    Raises:
        TaskError: they were not.
    """
    one, other = base.samples[task], tuned.samples[task]
    metrics = base.record.tasks[task].metric, tuned.record.tasks[task].metric
    unmatched = sorted(set(one.ids) ^ set(other.ids))
    if unmatched or metrics[0] != metrics[1]:
        raise TaskError(
            f"{task}: base ({metrics[0]}, {len(one.ids)} samples) and tuned ({metrics[1]}, "
            f"{len(other.ids)} samples) were not evaluated on the same samples ({len(unmatched)} "
            f"in one only: {_named(unmatched)}). Evaluate both with the same dataset and config"
        )
    _check_same_samples(task, one, other)


def _check_same_samples(task: str, one: Samples, other: Samples) -> None:
    """Check that the base and the tuned samples of a task have the same IDs, weights and clusters.

    Raises:
        TaskError: they have not.
    """
    if one.ids != other.ids:
        raise TaskError(
            f"{task}: the samples with training rows in the prompt are not those of the tuned "
            "model. Evaluate both with the same dataset and config"
        )
    for what, different in (
        ("weights", one.weights != other.weights),
        ("clusters", np.array(one.clusters) != np.array(other.clusters)),
    ):
        if different.any():
            samples = [
                sample for sample, differs in zip(one.ids, different, strict=True) if differs
            ]
            raise TaskError(
                f"{task}: {len(samples)} samples have other {what} in the tuned than in the base "
                f"scores ({_named(samples)}). A tokenizer that training changed makes other "
                "weights. Evaluate both with the same dataset, config and tokenizer"
            )


def _named(samples: list[str]) -> str:
    return ", ".join(samples[:SHOWN]) + (", ..." if len(samples) > SHOWN else "")
