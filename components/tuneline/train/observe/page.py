"""The HTML page of a run: its curves, its resource use, and answers before and after training."""

from collections.abc import Sequence
from typing import Any

from tuneline.artifacts import TrainingSummary
from tuneline.html.page import facts, line_chart, render_page, section, table
from tuneline.train.observe.samples import Sample

# Charts of values in progress.jsonl: name of the value, heading, unit, and divisor of the values.
_MEASURED = (
    ("tokens_per_second", "Tokens per second", "tokens per second", 1),
    ("peak_memory_bytes", "Peak memory so far", "GiB", 2**30),
    ("gpu_use", "GPU utilisation", "fraction of time with a kernel", 1),
)


def render(
    summary: TrainingSummary, progress: Sequence[dict[str, Any]], samples: Sequence[Sample]
) -> str:
    """Return one self-contained HTML page.

    Args:
        summary: Summary of the run.
        progress: Lines of progress.jsonl.
        samples: Prompts, and the answers before and after training.
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
                y_label="loss (nats per token)" if summary.method != "dpo" else "loss",
            ),
        )
    ]
    if margin:
        chart = line_chart({"margin": margin}, x_label="step", y_label="reward margin")
        sections.append(section("Reward margin of chosen over rejected answers", chart))
    norm = [(float(p.step), p.grad_norm) for p in history if p.grad_norm is not None]
    if norm:
        chart = line_chart({"norm": norm}, x_label="step", y_label="norm before clipping")
        sections.append(section("Gradient norm", chart))
    if rate:
        chart = line_chart({"rate": rate}, x_label="step", y_label="learning rate")
        sections.append(section("Learning rate", chart))
    for name, heading, unit, divisor in _MEASURED:
        points = [(p["step"], p[name] / divisor) for p in progress if p.get(name) is not None]
        if points:
            chart = line_chart({heading.lower(): points}, x_label="step", y_label=unit)
            sections.append(section(heading, chart))
    figures = [
        ("Steps", f"{summary.num_steps:,}"),
        *_what_happened(summary),
        ("Tokens", f"{summary.num_tokens:,}"),
        ("Tokens per second", f"{summary.tokens_per_second:,.0f}"),
        ("Trainable parameters", f"{summary.num_trainable_parameters:,}"),
        *_what_it_took(summary),
        ("Base model", f"{summary.base_quantization}, computed in {summary.compute_dtype}"),
        ("Device", summary.device),
    ]
    sections.append(section("Run", table(["Figure", "Value"], figures, numeric=[1])))
    if samples:
        sections.append(section("Answers before and after training", *map(_shown, samples)))
    return render_page("Training", sections, f"method {summary.method}")


def _shown(sample: Sample) -> str:
    pairs = [
        ("Prompt", sample.prompt),
        ("Base model", sample.before),
        ("Tuned model", sample.after),
    ]
    if sample.reference is not None:
        pairs.append(("Reference", sample.reference))
    return facts(pairs)


def _what_it_took(summary: TrainingSummary) -> list[tuple[str, str]]:
    facts = [("Peak memory", f"{summary.peak_memory_bytes / 2**30:.2f} GiB")]
    if summary.estimated_peak_bytes is not None:
        facts.append(("Estimated peak memory", f"{summary.estimated_peak_bytes / 2**30:.2f} GiB"))
    if summary.fitted:
        facts.append(("Changed to fit the memory", summary.fitted))
    figures = {
        "GPU-hours" if summary.device == "cuda" else "Hours": summary.device_hours,
        "GPU energy (kWh)": summary.energy_kwh,
        "Cost": summary.cost,
    }
    return facts + [(name, f"{value:.3g}") for name, value in figures.items() if value is not None]


def _what_happened(summary: TrainingSummary) -> list[tuple[str, str]]:
    """Return the figures of events that happen in some runs only."""
    facts = []
    if summary.best_step is not None:
        early = ", stopped early" if summary.stopped_early else ""
        facts.append(("Adapter kept", f"of step {summary.best_step:,}{early}"))
    if summary.eval_gap is not None:
        label = "Evaluation loss above training loss, at the end"
        facts.append((label, f"{summary.eval_gap:+.4f}"))
    counts = {
        "Times out of memory": summary.num_out_of_memory,
        "Steps skipped (NaN or infinite)": summary.num_skipped_steps,
        "Rollbacks to a lower learning rate": summary.num_rollbacks,
        "Resumptions after an interruption": summary.num_resumptions,
    }
    return facts + [(name, f"{count:,}") for name, count in counts.items() if count]
