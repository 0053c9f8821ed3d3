"""The section of a held run: likely causes, what in the run speaks for each, and what to change.

Every cause is read from the records of the run. A cause that the records do not speak for is not
shown, so the section is short.
"""

import shlex
from collections.abc import Iterator
from html import escape
from typing import NamedTuple

from tuneline.artifacts import PREFERENCE_METHODS, TaskComparison, TrainingSummary
from tuneline.html.page import Cell, code, paragraph, section, table
from tuneline.html.units import count, number, number_pair, percent
from tuneline.records.in_words import with_unit
from tuneline.records.scores import HELDOUT_PREFIX
from tuneline.report.records import Line
from tuneline.verdict import MIN_CLUSTERS, rule_of, samples_to_exclude

STILL_FALLING = 0.01
"""Fraction by which the evaluation loss fell between the last two evaluations, from which training
counts as ended too early."""
RISE = 0.02
"""Fraction above its lowest value by which the last evaluation loss shows overfitting."""
FEW_ROWS = 200
"""Training rows below which more rows are worth more than other settings."""
MANY_REJECTED, MANY_TRUNCATED = 0.05, 0.02
"""Fractions of rows and of tokens from which their loss counts as a cause."""
MAX_MORE_ROWS = 20
"""Factor of the measured samples above which more samples are not advised: the gain is too small to
be worth measuring."""


class Cause(NamedTuple):
    """A likely cause of a verdict of hold."""

    name: str
    evidence: str
    """What in this run speaks for it."""
    change: str
    """What to change, in words."""
    settings: tuple[str, ...] = ()
    """What to change, as arguments of --set."""


def card(line: Line) -> str:
    """Return the card; "" for a run that was promoted."""
    if line.decision.verdict != "hold":
        return ""
    found = list(causes(line))
    if not found:
        return _card(
            paragraph(
                "The records of this run show none of the usual causes: too few questions, too few "
                "steps, overfitting, 4-bit rounding, forgetting, or lost data. Read the answers "
                "below, and compare the rows of the dataset with the questions of the target."
            )
        )
    rows = [[cause.name, cause.evidence, Cell(_change(line, cause))] for cause in found]
    return _card(table(["likely cause", "seen in this run", "change"], rows, prose=True))


def _card(content: str) -> str:
    note = "Likely causes that the records of this run speak for, the most direct first."
    return f'<section class="card">{section("What to change", content, note=note)}</section>'


def causes(line: Line) -> Iterator[Cause]:
    """Yield the causes that the records of a run speak for, the most direct first."""
    targets = [item for item in line.decision.comparisons if item.role == "target"]
    min_gain = rule_of(line.decision).min_gain
    for item in targets:
        yield from _too_few_questions(item, min_gain)
    yield from _unread_prompts(line)
    yield from _forgetting(line)
    if any(item.interval[0] <= min_gain for item in targets):
        yield from _training(line)
        yield from _rounding(line)
        yield from _data(line)


def _change(line: Line, cause: Cause) -> str:
    if not cause.settings:
        return escape(cause.change)
    again = "submit RECIPE"
    if line.place.is_local:
        again = f"resume {shlex.quote(line.place.run_name)}"
    settings = " ".join(f"--set {shlex.quote(each)}" for each in cause.settings)
    return f"{escape(cause.change)}\n{code(f'tuneline {again} {settings}')}"


def _too_few_questions(item: TaskComparison, min_gain: float) -> Iterator[Cause]:
    is_heldout = item.task.startswith(HELDOUT_PREFIX)
    words = "Keep more rows out of training." if is_heldout else "Measure more questions."
    key = "prepare.heldout.max_rows" if is_heldout else "evaluate.limit"
    if item.num_clusters < MIN_CLUSTERS:
        yield Cause(
            "Too few questions",
            f"{item.task} has {item.num_clusters} different questions, and a decision needs "
            f"{MIN_CLUSTERS}.",
            words,
            (f"{key}=200",),
        )
        return
    excess = item.difference - min_gain
    if item.interval[0] <= min_gain and excess > 0:
        rows = samples_to_exclude(item, excess)
        if item.num_samples < rows <= MAX_MORE_ROWS * item.num_samples:
            rounded = 50 * -(-int(rows) // 50)
            yield Cause(
                "Too few questions",
                f"{item.task} changed by {with_unit(item)} on {item.num_samples} questions. If "
                f"that is the true gain, about {count(rounded)} questions would prove it.",
                words,
                (f"{key}={rounded}",),
            )


def _unread_prompts(line: Line) -> Iterator[Cause]:
    control = next((c for c in line.decision.comparisons if c.role == "control"), None)
    if control is not None and control.outcome == "worse":
        yield Cause(
            "Answers do not belong to their prompts",
            "The tuned model depends less on its prompts than the base model does.",
            "Check in the data preview that each answer stands beside its own prompt, and that "
            "prepare.columns names the right columns.",
        )


def _forgetting(line: Line) -> Iterator[Cause]:
    worse = [
        item
        for item in line.decision.comparisons
        if item.role in ("guard", "member") and item.outcome == "worse"
    ]
    if worse:
        changed = ", ".join(f"{c.task} {with_unit(c)}" for c in worse[:4])
        yield Cause(
            "The model forgets what it could do",
            f"Worse than the base model: {changed}.",
            "Train more gently, or mix general rows into the data (prepare.general).",
            _lower_rate(line.training, 2),
        )


def _training(line: Line) -> Iterator[Cause]:
    training = line.training
    losses = [(p.step, p.eval_loss) for p in training.history if p.eval_loss is not None]
    first, last = training.first_eval_loss, losses[-1][1] if losses else None
    lowest = min(losses, key=lambda point: point[1], default=None)
    steps = training.num_steps
    is_preference = training.method in PREFERENCE_METHODS
    if first is not None and last is not None and last >= first and not is_preference:
        rate = training.learning_rate
        before, after = number_pair(first, last)
        yield Cause(
            "Training did not help",
            f"The evaluation loss was {before} before training and {after} after "
            f"{count(steps)} steps"
            + (f", at a learning rate of {rate:g}." if rate is not None else "."),
            "Lower the learning rate.",
            _lower_rate(training, 5),
        )
    elif lowest is not None and last is not None and last > (1 + RISE) * lowest[1]:
        before, after = number_pair(lowest[1], last)
        yield Cause(
            "Overfitting",
            f"The evaluation loss rose from {before} at step {count(lowest[0])} to "
            f"{after} at step {count(losses[-1][0])}. The adapter of the lowest loss was "
            "kept.",
            "Add rows, or let the adapter memorise less: fewer steps, dropout, a lower rank.",
            (f"train.max_steps={max(1, lowest[0])}", "train.lora.lora_dropout=0.05"),
        )
    elif len(losses) > 1 and last is not None and losses[-2][1] > (1 + STILL_FALLING) * last:
        before, after = number_pair(losses[-2][1], last)
        yield Cause(
            "Too few steps",
            f"The evaluation loss was still falling at the end: {before} at step "
            f"{count(losses[-2][0])}, {after} at step {count(losses[-1][0])}.",
            "Train longer.",
            (f"train.max_steps={2 * steps}",),
        )
    if training.num_rollbacks or training.num_skipped_steps:
        yield Cause(
            "Training was unstable",
            f"{count(training.num_skipped_steps)} steps were skipped because their loss or "
            f"gradient was not finite, and training went back {training.num_rollbacks} times.",
            "Lower the learning rate.",
            _lower_rate(training, 5),
        )


def _lower_rate(training: TrainingSummary, divisor: int) -> tuple[str, ...]:
    """Return the setting of a lower learning rate; none if that of the training is unknown."""
    rate = training.learning_rate
    return (f"train.learning_rate={rate / divisor:.2g}",) if rate else ()


def _rounding(line: Line) -> Iterator[Cause]:
    training, losses = line.training, line.merge.base_losses
    if training.base_quantization == "none" or line.origin.quantization is not None:
        return
    rounded, original = losses.get("dequantized"), losses.get("original")
    measured = ""
    if rounded is not None and original is not None:
        if original >= rounded:
            return
        measured = (
            f" On the same rows, base and adapter have a loss of {number(rounded)} with weights in "
            f"4 bits and of {number(original)} with those in 16 bits."
        )
    merged = (
        "The merged model has these rounded weights, and the gate compares it with the base model "
        "in 16 bits, so rounding takes part of the gain."
        if line.merge.base == "dequantized"
        else "The adapter was merged into weights in 16 bits, on which it was not trained."
    )
    yield Cause(
        "4-bit rounding",
        f"Training held the base model in 4 bits ({training.base_quantization}). {merged}"
        f"{measured}",
        "Train on weights in 16 bits, which take about four times the memory, or let merge choose "
        "the better weights (merge.base: auto).",
        ("train.load_in_4bit=false",),
    )


def _data(line: Line) -> Iterator[Cause]:
    dataset = line.dataset
    read = dataset.num_train_rows + dataset.num_eval_rows + dataset.num_heldout_rows
    lost = dataset.num_rejected_rows + dataset.num_overlong_rows
    if lost and lost / (read + lost) > MANY_REJECTED:
        yield Cause(
            "Rows were lost",
            f"{count(lost)} of {count(read + lost)} rows were rejected or too long "
            f"({percent(lost / (read + lost))}).",
            "See in the data preview why, and mend the rows or prepare.max_seq_length.",
        )
    if dataset.truncated_token_share > MANY_TRUNCATED:
        yield Cause(
            "Answers were cut",
            f"{percent(dataset.truncated_token_share)} of the tokens were cut off at "
            f"{count(dataset.max_seq_length)} tokens.",
            "Raise the length.",
            (f"prepare.max_seq_length={dataset.recommended_max_seq_length}",),
        )
    if dataset.num_train_rows < FEW_ROWS:
        yield Cause(
            "Few training rows",
            f"The model saw {count(dataset.num_train_rows)} training rows.",
            "Collect more rows of the kind that the target asks for.",
        )
