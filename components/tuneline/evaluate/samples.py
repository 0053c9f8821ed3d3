"""Compute one score per sample, and one score per task, from lm-eval's samples."""

import math
from typing import Any

from tuneline.artifacts import TaskScore
from tuneline.errors import TaskError
from tuneline.models.clusters import clusters_of

# Metrics that the gate can compare sample by sample, in order of preference.
_PREFERRED = ("acc", "exact_match", "log_perplexity", "acc_norm", "em", "pass@1")


def primary_metric(name: str, samples: list[dict[str, Any]]) -> str:
    """Return the preferred metric of a task among those with a number for each sample.

    Raises:
        TaskError: no metric has a number for each sample; F1 over all samples, for example, has
            none.
    """
    # "metrics" lists the keys that the task's process_results returned for the sample.
    numeric = [metric for metric in samples[0]["metrics"] if _scored(samples[0][metric])]
    if not numeric:
        raise TaskError(
            f"task '{name}' has no metric with one number per sample (it has "
            f"{', '.join(samples[0]['metrics'])}), but the gate compares samples: "
            "name a task with acc or exact_match"
        )
    return next((metric for metric in _PREFERRED if metric in numeric), numeric[0])


def rows_of(samples: list[dict[str, Any]], metric: str) -> list[dict[str, Any]]:
    """Return one dictionary per sample, with the keys "id" and "score".

    If the metric is a ratio such as nats per token, "score" is the sample's ratio and a further
    key, "weight", is its denominator. A sample that depends on others has a key "cluster". The ID
    of a document is the same for every model.
    """
    rows = []
    ordered = sorted(samples, key=lambda sample: sample["doc_id"])
    clusters = clusters_of([sample["doc"] for sample in ordered])
    for sample, cluster in zip(ordered, clusters, strict=True):
        value = sample[metric]
        row: dict[str, Any] = {"id": sample["doc"].get("id") if _ours(sample) else _id(sample)}
        if isinstance(value, list | tuple):
            amount, weight = value
            row |= {"score": amount / weight, "weight": weight}
        else:
            row |= {"score": float(value)}
        if cluster is not None:
            row |= {"cluster": cluster}
        rows.append(row)
    return rows


def score_of(rows: list[dict[str, Any]], *, metric: str, higher_is_better: bool) -> TaskScore:
    """Return the weighted mean of the samples' scores, with its standard error."""
    weights = [row.get("weight", 1.0) for row in rows]
    total = sum(weights)
    value = sum(row["score"] * weight for row, weight in zip(rows, weights, strict=True)) / total
    stderr = None
    if len(rows) > 1:
        # Standard error of a ratio estimator. If all weights are 1, it equals that of the mean.
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
    # A pair of a sum and a number of tokens is a score; a pair of label and guess is not.
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
