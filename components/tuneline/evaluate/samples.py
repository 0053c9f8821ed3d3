"""From lm-eval's samples to one score a sample, and to a task's score."""

import math
from typing import Any

from tuneline.artifacts import TaskScore
from tuneline.errors import TaskError

# Where a task has several metrics, the one that a gate can compare sample by sample.
_PREFERRED = ("acc", "exact_match", "log_perplexity", "acc_norm", "em", "pass@1")


def primary_metric(name: str, samples: list[dict[str, Any]]) -> str:
    """Choose the metric of a task that is a number for each sample.

    Raises:
        TaskError: it has none; an F1 over all samples cannot be compared pair by pair.
    """
    # "metrics" are the keys that the task's process_results gave for the sample.
    numeric = [metric for metric in samples[0]["metrics"] if _scored(samples[0][metric])]
    if not numeric:
        raise TaskError(
            f"task '{name}' has no metric that is one number a sample (it has "
            f"{', '.join(samples[0]['metrics'])}), and the gate compares samples: "
            "name a task with acc or exact_match"
        )
    return next((metric for metric in _PREFERRED if metric in numeric), numeric[0])


def rows_of(samples: list[dict[str, Any]], metric: str) -> list[dict[str, Any]]:
    """Return rows {"id", "score"}, with "weight" where a sample is a ratio such as nats a token.

    The id is the same for the same document, whichever model answered.
    """
    rows = []
    for sample in sorted(samples, key=lambda sample: sample["doc_id"]):
        value = sample[metric]
        row: dict[str, Any] = {"id": sample["doc"].get("id") if _ours(sample) else _id(sample)}
        if isinstance(value, list | tuple):
            amount, weight = value
            row |= {"score": amount / weight, "weight": weight}
        else:
            row |= {"score": float(value)}
        rows.append(row)
    return rows


def score_of(rows: list[dict[str, Any]], *, metric: str, higher_is_better: bool) -> TaskScore:
    """Return the weighted mean of the samples' scores and its standard error."""
    weights = [row.get("weight", 1.0) for row in rows]
    total = sum(weights)
    value = sum(row["score"] * weight for row, weight in zip(rows, weights, strict=True)) / total
    stderr = None
    if len(rows) > 1:
        # The ratio estimator's standard error; without weights it is the mean's.
        squares = sum(
            (weight * (row["score"] - value)) ** 2
            for row, weight in zip(rows, weights, strict=True)
        )
        stderr = math.sqrt(squares * len(rows) / (len(rows) - 1)) / total
    return TaskScore(
        metric=metric,
        higher_is_better=higher_is_better,
        value=value,
        stderr=stderr,
        num_samples=len(rows),
    )


def _scored(value: Any) -> bool:
    if isinstance(value, bool | int | float):
        return True
    # A sum and the number of tokens it is over; a pair of a label and a guess is not that.
    return (
        isinstance(value, list | tuple)
        and len(value) == 2
        and isinstance(value[0], float)
        and isinstance(value[1], int)
        and value[1] > 0
    )


def _ours(sample: dict[str, Any]) -> bool:
    return "endings" in sample["doc"] and "num_tokens" in sample["doc"]


def _id(sample: dict[str, Any]) -> str:
    return f"{sample['doc_id']}-{sample['doc_hash'][:12]}"
