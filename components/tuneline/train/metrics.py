"""The few figures of a training run that a pipeline's pages compare in columns."""

from tuneline.artifacts import TrainingSummary


def comparable_metrics(summary: TrainingSummary) -> dict[str, float]:
    """Return numbers by stable names; one that was not measured is left out."""
    found = {
        "final_loss": summary.final_loss,
        "first_eval_loss": summary.first_eval_loss,
        "final_eval_loss": summary.final_eval_loss,
        "num_steps": summary.num_steps,
        "tokens_per_second": summary.tokens_per_second,
        "peak_memory_gib": summary.peak_memory_bytes / 2**30,
        "seconds": summary.seconds,
    }
    return {name: round(float(value), 6) for name, value in found.items() if value is not None}


def artifact_metadata(summary: TrainingSummary) -> dict[str, str | int]:
    """Return what the adapter's artifact says of itself."""
    return {
        "method": summary.method,
        "base_quantization": summary.base_quantization,
        "compute_dtype": summary.compute_dtype,
        "device": summary.device,
        "num_trainable_parameters": summary.num_trainable_parameters,
        "base_sha256": summary.base_sha256,
        "dataset_sha256": summary.dataset_sha256,
    }
