"""The figures of a training run, in one table.

The table is read by KFP's metrics, the adapter's metadata, the pages of train and report, and the
model card. A new field of TrainingSummary that users should see needs one line in the table.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from tuneline.artifacts import PREFERENCE_METHODS, TrainingSummary
from tuneline.html.units import count, duration, number, parameters, percent

_GIB = 2**30


class Figure(NamedTuple):
    """One figure of a training run."""

    name: str
    """Key in KFP's metrics and metadata."""
    label: str
    """Name on a page or a card."""
    value: float | int | str
    text: str
    """The value as text for a page or a card, with its unit."""
    is_metric: bool
    """Whether the figure is one of KFP's metrics, which can be compared between runs."""
    is_metadata: bool
    """Whether the figure is in the metadata of the adapter's artifact in KFP."""


def training_figures(summary: TrainingSummary) -> list[Figure]:
    """Return the measured figures in the order of display."""
    s = summary
    is_gpu = s.device.startswith("cuda")
    estimate = None if s.estimated_peak_bytes is None else s.estimated_peak_bytes / _GIB
    lora = s.settings.get("lora")
    # name, label, value, text, also shown in: KFP metric, artifact
    table: list[tuple[str, str, Any, Callable[[Any], str], str]] = [
        ("method", "Method", s.method, str, "artifact"),
        ("lora", "Adapter", lora, lambda v: f"LoRA, r={v['r']}, alpha={v['lora_alpha']}", ""),
        (
            "base_quantization",
            "Base weights",
            s.base_quantization,
            lambda v: _quantized(v, s.quantized_fraction),
            "artifact",
        ),
        ("compute_dtype", "Computed in", s.compute_dtype, str, "artifact"),
        (
            "num_trainable_parameters",
            "Trainable parameters",
            s.num_trainable_parameters,
            lambda v: _part(v, s.num_parameters),
            "artifact",
        ),
        ("learning_rate", "Highest learning rate", s.learning_rate, number, ""),
        ("num_steps", "Optimizer steps", s.num_steps, count, "metric"),
        ("num_tokens", "Tokens", s.num_tokens, count, ""),
        ("final_loss", "Last training loss", s.final_loss, number, "metric"),
        (
            "first_eval_loss",
            f"Evaluation loss before training, {weights_of_training(s)}",
            s.first_eval_loss,
            number,
            "metric",
        ),
        (
            "final_eval_loss",
            f"Evaluation loss of the adapter, {weights_of_training(s)}",
            s.final_eval_loss,
            number,
            "metric",
        ),
        ("eval_gap", "Evaluation loss above training loss", s.eval_gap, "{:+.4f}".format, "metric"),
        (
            "best_step",
            "Adapter kept",
            s.best_step,
            lambda v: f"from step {v:,}{', stopped early' if s.stopped_early else ''}",
            "",
        ),
        ("device", "Device", s.device, str, "artifact"),
        ("num_ranks", "Ranks", s.num_ranks if s.num_ranks > 1 else None, count, ""),
        ("tokens_per_second", "Tokens per second", s.tokens_per_second, _three, "metric"),
        ("peak_memory_gib", "Peak memory", s.peak_memory_bytes / _GIB, _memory, "metric artifact"),
        ("estimated_memory_gib", "Estimated peak memory", estimate, _memory, "artifact"),
        ("fitted", "Changed to fit into memory", s.fitted or None, str, ""),
        ("seconds", "Time", s.seconds, duration, "metric"),
        (
            "device_hours",
            "GPU-hours" if is_gpu else "Device hours",
            s.device_hours,
            _three,
            "metric",
        ),
        ("energy_kwh", "Energy of the GPUs", s.energy_kwh, lambda v: f"{_three(v)} kWh", "metric"),
        ("cost", "Cost (at price_per_hour)", s.cost, _three, "metric"),
        ("num_out_of_memory", "Out of memory", s.num_out_of_memory or None, _times, ""),
        (
            "num_skipped_steps",
            "Steps skipped: NaN or infinite",
            s.num_skipped_steps or None,
            count,
            "",
        ),
        ("num_rollbacks", "Rollbacks to a checkpoint", s.num_rollbacks or None, count, ""),
        ("num_restarts", "Restarted after a fault", s.num_restarts or None, _times, ""),
        ("num_resumptions", "Resumed from a checkpoint", s.num_resumptions or None, _times, ""),
    ]
    return [
        Figure(name, label, value, text(value), "metric" in uses, "artifact" in uses)
        for name, label, value, text, uses in table
        if value is not None
    ]


def weights_of_training(summary: TrainingSummary) -> str:
    """Return the base weights that the losses of the training were measured on, in words."""
    rounded = summary.base_quantization != "none"
    return "base in 4 bits" if rounded else f"base in {summary.compute_dtype}"


def loss_unit(summary: TrainingSummary) -> str:
    """Return the unit of the losses of the training; "" if they are not losses per token."""
    return "" if summary.method in PREFERENCE_METHODS else "nats per token"


def _quantized(name: str, fraction: float | None) -> str:
    return f"{name} ({percent(fraction)} of the parameters)" if fraction else name


def _part(num_trainable: int, num_parameters: int) -> str:
    if not num_parameters:  # the base model's record does not know
        return parameters(num_trainable)
    fraction = percent(num_trainable / num_parameters)
    return f"{parameters(num_trainable)} of {parameters(num_parameters)} ({fraction})"


def _three(value: float) -> str:
    return number(value, 3)


def _memory(gib: float) -> str:
    return f"{gib:.2f} GiB"


def _times(value: int) -> str:
    return "once" if value == 1 else f"{value:,} times"
