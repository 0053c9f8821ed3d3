"""Figures of a training run for the comparison and artifact pages of Kubeflow Pipelines."""

from collections.abc import Sequence

from tuneline.artifacts import TrainingPoint, TrainingSummary


def comparable_metrics(summary: TrainingSummary) -> dict[str, float]:
    """Return the figures that KFP compares between runs, without those that were not measured."""
    found = {
        "final_loss": summary.final_loss,
        "first_eval_loss": summary.first_eval_loss,
        "final_eval_loss": summary.final_eval_loss,
        "eval_gap": summary.eval_gap,
        "num_steps": summary.num_steps,
        "tokens_per_second": summary.tokens_per_second,
        "peak_memory_gib": summary.peak_memory_bytes / 2**30,
        "seconds": summary.seconds,
        "device_hours": summary.device_hours,
        "energy_kwh": summary.energy_kwh,
        "cost": summary.cost,
    }
    return {name: round(float(value), 6) for name, value in found.items() if value is not None}


def eval_gap(history: Sequence[TrainingPoint]) -> float | None:
    """Return the last evaluation loss minus the mean training loss since the evaluation before it.

    None if the run has fewer than two evaluations, or no training loss between the last two.
    """
    evaluated = [point for point in history if point.eval_loss is not None]
    if len(evaluated) < 2:
        return None
    before, last = evaluated[-2:]
    losses = [p.loss for p in history if p.loss is not None and before.step < p.step <= last.step]
    if not losses or last.eval_loss is None:
        return None
    return last.eval_loss - sum(losses) / len(losses)


def artifact_metadata(summary: TrainingSummary) -> dict[str, str | int | float]:
    """Return the metadata of the adapter's artifact in KFP."""
    memory = {"peak_memory_gib": round(summary.peak_memory_bytes / 2**30, 3)}
    if summary.estimated_peak_bytes is not None:
        memory["estimated_memory_gib"] = round(summary.estimated_peak_bytes / 2**30, 3)
    return {
        **memory,
        "fitted": summary.fitted,
        "method": summary.method,
        "base_quantization": summary.base_quantization,
        "compute_dtype": summary.compute_dtype,
        "device": summary.device,
        "num_trainable_parameters": summary.num_trainable_parameters,
        "base_sha256": summary.base_sha256,
        "dataset_sha256": summary.dataset_sha256,
    }
