"""What the train step writes into KFP's metrics and into the adapter's metadata."""

from collections.abc import Sequence

from tuneline.artifacts import TrainingPoint, TrainingSummary
from tuneline.training_figures import training_figures


def comparable_metrics(summary: TrainingSummary) -> dict[str, float]:
    """Return the figures that KFP compares between runs, without those that were not measured."""
    return {
        figure.name: round(float(figure.value), 6)
        for figure in training_figures(summary)
        if figure.is_metric
    }


def eval_gap(history: Sequence[TrainingPoint]) -> float | None:
    """Return the last evaluation loss minus the mean training loss since the evaluation before.

    None if there are fewer than two evaluations, or no training loss was logged between them.
    """
    evaluated = [point for point in history if point.eval_loss is not None]
    if len(evaluated) < 2:
        return None
    previous, last = evaluated[-2:]
    losses = [p.loss for p in history if p.loss is not None and previous.step < p.step <= last.step]
    if not losses or last.eval_loss is None:
        return None
    return last.eval_loss - sum(losses) / len(losses)


def artifact_metadata(summary: TrainingSummary) -> dict[str, str | int | float]:
    """Return the metadata of the adapter's artifact in KFP."""
    metadata = {
        figure.name: round(figure.value, 3) if isinstance(figure.value, float) else figure.value
        for figure in training_figures(summary)
        if figure.is_metadata
    }
    return metadata | {
        "fitted": summary.fitted,
        "base_sha256": summary.base_sha256,
        "dataset_sha256": summary.dataset_sha256,
    }
