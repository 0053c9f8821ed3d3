"""The page of a training run: curves, figures, and answers before and after training."""

from collections.abc import Sequence
from typing import Any

from tuneline.artifacts import TrainingPoint, TrainingSummary
from tuneline.html.page import facts, line_chart, render_page, section, table
from tuneline.train.observe.samples import Sample
from tuneline.training_figures import loss_unit, training_figures

# Charts of progress.jsonl: key, heading, unit, and the divisor that converts a value to the unit.
_MEASURED = (
    ("tokens_per_second", "Tokens per second", "tokens per second", 1),
    ("peak_memory_bytes", "Peak memory so far", "GiB", 2**30),
    ("gpu_use", "GPU utilisation", "fraction of time with a kernel running", 1),
)


def render(
    summary: TrainingSummary, progress: Sequence[dict[str, Any]], samples: Sequence[Sample]
) -> str:
    """Return one self-contained HTML page.

    Args:
        summary: record of the run.
        progress: lines of the run's progress.jsonl.
        samples: prompts with the answers of the base model and of the adapter.
    """
    history = summary.history
    losses = {
        "training": _series(history, "loss"),
        "evaluation": _series(history, "eval_loss"),
    }
    sections = [
        section(
            "Loss",
            line_chart(
                {name: points for name, points in losses.items() if points},
                x_label="step",
                y_label=f"loss ({unit})" if (unit := loss_unit(summary)) else "loss",
            ),
        )
    ]
    for field, heading, name, unit in (
        (
            "reward_margin",
            "Reward margin of good over bad answers",
            "margin",
            "reward margin",
        ),
        ("grad_norm", "Gradient norm", "norm", "norm before clipping"),
        ("learning_rate", "Learning rate", "rate", "learning rate"),
    ):
        if points := _series(history, field):
            chart = line_chart({name: points}, x_label="step", y_label=unit)
            sections.append(section(heading, chart))
    for key, heading, unit, divisor in _MEASURED:
        points = [(p["step"], p[key] / divisor) for p in progress if p.get(key) is not None]
        if points:
            chart = line_chart({heading.lower(): points}, x_label="step", y_label=unit)
            sections.append(section(heading, chart))
    rows = [(figure.label, figure.text) for figure in training_figures(summary)]
    sections.append(section("Figures", table(["figure", "value"], rows, numeric=[1])))
    if samples:
        sections.append(section("Answers before and after training", *map(_answers, samples)))
    return render_page("Training", sections, f"method {summary.method}")


def _series(history: Sequence[TrainingPoint], field: str) -> list[tuple[float, float]]:
    values = ((float(point.step), getattr(point, field)) for point in history)
    return [(step, value) for step, value in values if value is not None]


def _answers(sample: Sample) -> str:
    pairs = [
        ("Prompt", sample.prompt),
        ("Base model", sample.before),
        ("Tuned model", sample.after),
    ]
    if sample.reference is not None:
        pairs.append(("Reference", sample.reference))
    return facts(pairs)
