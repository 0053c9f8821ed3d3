"""The page of a run: its curves, what it took, and answers before and after."""

from collections.abc import Sequence
from typing import Any

from tuneline.artifacts import TrainingSummary
from tuneline.html.page import facts, line_chart, render_page, section, table
from tuneline.train.observe.samples import Sample

# Of progress.jsonl: name, what the chart is called, its unit, and what values are divided by.
_MEASURED = (
    ("tokens_per_second", "Tokens a second", "tokens a second", 1),
    ("peak_memory_bytes", "Peak memory so far", "GiB", 2**30),
    ("gpu_use", "Use of the GPU", "share of time with a kernel", 1),
)


def render(
    summary: TrainingSummary, progress: Sequence[dict[str, Any]], samples: Sequence[Sample]
) -> str:
    """Return one self-contained HTML page.

    Args:
        summary: of the run.
        progress: the lines of its progress.jsonl.
        samples: prompts and what is said to them.
    """
    history = summary.history
    loss = [(float(p.step), p.loss) for p in history if p.loss is not None]
    eval_loss = [(float(p.step), p.eval_loss) for p in history if p.eval_loss is not None]
    rate = [(float(p.step), p.learning_rate) for p in history if p.learning_rate is not None]
    margin = [(float(p.step), p.reward_margin) for p in history if p.reward_margin is not None]
    series = {"training": loss, "evaluation": eval_loss}
    sections = [
        section(
            "Loss",
            line_chart(
                {name: points for name, points in series.items() if points},
                x_label="step",
                y_label="loss (nats a token)" if summary.method != "dpo" else "loss",
            ),
        )
    ]
    if margin:
        chart = line_chart({"margin": margin}, x_label="step", y_label="reward margin")
        sections.append(section("Reward of chosen over rejected", chart))
    norm = [(float(p.step), p.grad_norm) for p in history if p.grad_norm is not None]
    if norm:
        chart = line_chart({"norm": norm}, x_label="step", y_label="norm before clipping")
        sections.append(section("Gradient", chart))
    if rate:
        chart = line_chart({"rate": rate}, x_label="step", y_label="learning rate")
        sections.append(section("Learning rate", chart))
    for name, heading, unit, divisor in _MEASURED:
        found = [(p["step"], p[name] / divisor) for p in progress if p.get(name) is not None]
        if found:
            chart = line_chart({heading.lower(): found}, x_label="step", y_label=unit)
            sections.append(section(heading, chart))
    figures = [
        ("Steps", f"{summary.num_steps:,}"),
        *_what_happened(summary),
        ("Tokens", f"{summary.num_tokens:,}"),
        ("Tokens a second", f"{summary.tokens_per_second:,.0f}"),
        ("Trainable parameters", f"{summary.num_trainable_parameters:,}"),
        *_what_it_took(summary),
        ("Base", f"{summary.base_quantization}, computed in {summary.compute_dtype}"),
        ("Device", summary.device),
    ]
    sections.append(section("Run", table(["Figure", "Value"], figures, numeric=[1])))
    if samples:
        sections.append(section("Answers before and after", *map(_shown, samples)))
    return render_page("Training", sections, f"method {summary.method}")


def _shown(sample: Sample) -> str:
    pairs = [("Prompt", sample.prompt), ("Base", sample.before), ("Tuned", sample.after)]
    if sample.reference is not None:
        pairs.append(("Reference", sample.reference))
    return facts(pairs)


def _what_it_took(summary: TrainingSummary) -> list[tuple[str, str]]:
    facts = [("Peak memory", f"{summary.peak_memory_bytes / 2**30:.2f} GiB")]
    if summary.estimated_peak_bytes is not None:
        facts.append(("Estimated before", f"{summary.estimated_peak_bytes / 2**30:.2f} GiB"))
    if summary.fitted:
        facts.append(("Made to fit", summary.fitted))
    figures = {
        "GPU-hours" if summary.device == "cuda" else "Hours": summary.device_hours,
        "Energy of the GPU (kWh)": summary.energy_kwh,
        "Cost": summary.cost,
    }
    return facts + [(name, f"{value:.3g}") for name, value in figures.items() if value is not None]


def _what_happened(summary: TrainingSummary) -> list[tuple[str, str]]:
    """Return the rows that only some runs have."""
    facts = []
    if summary.best_step is not None:
        early = ", stopped early" if summary.stopped_early else ""
        facts.append(("Adapter kept", f"of step {summary.best_step:,}{early}"))
    if summary.eval_gap is not None:
        label = "Last evaluation above the training loss since the one before"
        facts.append((label, f"{summary.eval_gap:+.4f}"))
    counts = {
        "Memory ran out": summary.num_out_of_memory,
        "Steps skipped, not finite": summary.num_skipped_steps,
        "Returns to a checkpoint, with a lower rate": summary.num_rollbacks,
        "Continued after an interruption": summary.num_resumptions,
    }
    return facts + [(name, f"{count:,}") for name, count in counts.items() if count]
