"""What a run gained, in sentences: for the report's page, messages and the command line."""

import math
from collections.abc import Sequence

from tuneline.html.units import (
    change_decimals,
    count,
    number_pair,
    percent_pair,
    points,
    signed,
)
from tuneline.records.scores import HELDOUT_PREFIX, TaskComparison, Verdict

MAX_TARGETS = 3
"""Targets that a sentence has room for."""


def verdict_sentence(verdict: Verdict, reason: str, comparisons: Sequence[TaskComparison]) -> str:
    """Return what the tuned model gained on the targets, in full sentences.

    Args:
        verdict: verdict of the gate.
        reason: reason of the gate, which the sentence ends with if it is not the targets.
        comparisons: comparisons of the decision.
    """
    targets = [item for item in comparisons if item.role == "target"]
    if not targets:
        return f"{reason[:1].upper()}{reason[1:]}."
    parts = [gain(item) for item in targets[:MAX_TARGETS]]
    if len(targets) > MAX_TARGETS:
        parts.append(f"The recipe has {len(targets)} targets, of which these are the first.")
    if verdict == "hold" and all(item.outcome == "better" for item in targets):
        parts.append(f"Still, the gate holds the model back: {reason}.")
    return " ".join(parts)


def gain(item: TaskComparison) -> str:
    """Return how the score of a task changed, and how certain the change is, as a sentence."""
    what = "Right answers" if is_fraction(item) else item.metric
    pair = score_pair(item)
    if pair[0] == pair[1]:
        moved = f"stayed at {pair[0]}"
    else:
        moved = f"{'rose' if item.tuned > item.base else 'fell'} from {pair[0]} to {pair[1]}"
    return f"{what} {moved} on {_questions(item)}{_certainty(item)}."


def is_fraction(item: TaskComparison) -> bool:
    """Return whether the score is a fraction of right answers, which is shown in percent."""
    return item.num_changed is not None


def score_pair(item: TaskComparison) -> tuple[str, str]:
    """Return both scores as text: fractions of right answers in percent, others as numbers."""
    if not is_fraction(item):
        return number_pair(item.base, item.tuned)
    return percent_pair(item.base, item.tuned)


def change_text(item: TaskComparison, value: float) -> str:
    """Return a change of a score with its sign: in points of percent, or as a number."""
    if not is_fraction(item):
        return signed(value, 3)
    return points(value)


def with_unit(item: TaskComparison) -> str:
    """Return the change of a comparison with its unit: points, or the metric."""
    unit = "points" if is_fraction(item) else item.metric
    return f"{change_text(item, item.change)} {unit}"


def score_cells(item: TaskComparison) -> tuple[str, str, str, str]:
    """Return base, tuned, change and its 95 % interval for a table that names the metric."""
    change = change_text(item, item.change) + (" points" if is_fraction(item) else "")
    low, high = (change_text(item, end) for end in item.change_interval)
    return *score_pair(item), change, f"[{low}, {high}]"


def _certainty(item: TaskComparison) -> str:
    unit = " points" if is_fraction(item) else ""
    sign = 1 if item.higher_is_better else -1
    if item.outcome == "better":
        bound = change_text(item, sign * _towards_zero(item, item.lower))
        if not is_fraction(item):
            # "fell ... by at least 0.95": the verb has the sign already.
            bound = bound.lstrip("+-")
            return f", by at least {bound} with 95 % certainty"
        return f", at least {bound} points with 95 % certainty"
    if item.outcome == "worse":
        bound = change_text(item, sign * _towards_zero(item, item.interval[1]))
        return f", a loss of at least {bound.lstrip('+-')}{unit} with 95 % certainty"
    low, high = (change_text(item, end) for end in item.change_interval)
    return (
        f", but with 95 % certainty the true change is only known to be between {low} and "
        f"{high}{unit}: no gain is proven"
    )


def _towards_zero(item: TaskComparison, value: float) -> float:
    """Return a bound rounded to what is shown, never to a larger change than was proven."""
    if not is_fraction(item):
        return value
    steps = 100 * 10 ** change_decimals(value)
    return math.copysign(math.floor(abs(value) * steps + 1e-9) / steps, value)


def _questions(item: TaskComparison) -> str:
    is_heldout = item.task.startswith(HELDOUT_PREFIX)
    text = f"{count(item.num_samples)} {'unseen ' if is_heldout else ''}questions"
    text += "" if is_heldout else f" of {item.task}"
    if item.num_clusters != item.num_samples:
        text += f" ({count(item.num_clusters)} different ones)"
    return text
