"""The sections with scores and answers, before and after training."""

from html import escape

from tuneline.artifacts import TaskComparison
from tuneline.html.page import Cell, IntervalRow, badge, interval_chart, paragraph, section, table
from tuneline.html.units import count
from tuneline.records.in_words import is_fraction, score_cells
from tuneline.report.records import Line

_ROLES = {
    "target": "A target has to improve: its whole interval has to lie on the better side of "
    "gate.min_gain.",
    "guard": "Guards must not get worse: with 95 % confidence, their mean loss has to be smaller "
    "than gate.max_regression.",
    "member": "A member is a task of a group. The group is judged, not its members.",
    "control": "A control shows whether the tuned model still reads its prompts.",
    "prompted": "Prompted compares with the base model that has training rows in its prompt, and "
    "decides nothing.",
    "published": "Published compares with the model published last, which must not be better.",
}
"""What each role of a comparison means, in the order of the sentences."""
OUTCOME_TONES = {"better": "good", "worse": "bad", "undecided": "plain"}


def scores(line: Line) -> str:
    """Return the comparison of base and tuned model, with one chart per metric."""
    comparisons = line.decision.comparisons
    by_metric: dict[str, list[TaskComparison]] = {}
    for comparison in comparisons:
        unit = " (%)" if is_fraction(comparison) else ""
        by_metric.setdefault(f"{comparison.metric}{unit}", []).append(comparison)
    charts = [
        interval_chart(
            [_interval_row(c) for c in group],
            x_label=metric if group[0].higher_is_better else f"{metric} (lower is better)",
            higher_is_better=group[0].higher_is_better,
            whole=_scale(group[0]),
        )
        for metric, group in by_metric.items()
    ]
    rows = [
        [
            Cell(f"{escape(c.title)} {badge(c.role)}"),
            c.metric,
            *score_cells(c),
            _samples(c),
            badge(c.outcome, OUTCOME_TONES[c.outcome]),
        ]
        for c in comparisons
    ]
    headers = ["task", "metric", "base", "tuned"]
    headers += ["change", "95 % interval", "samples", "outcome"]
    return section(
        "Scores before and after training",
        f'<div class="pair">{"".join(charts)}</div>' if len(charts) > 1 else "".join(charts),
        table(headers, rows, numeric=range(2, 7)),
        paragraph(" ".join(_explained(line)), muted=True),
    )


def _explained(line: Line) -> list[str]:
    """Return sentences on how to read the table: on the roles that are in it, and no others."""
    comparisons = line.decision.comparisons
    roles = {comparison.role for comparison in comparisons}
    said = [
        "Both models answered the same samples: the base model as it was fetched, and the merged "
        f"model in {line.merge.dtype}."
    ]
    if line.training.base_quantization != "none":
        said.append("The losses of the training were measured with a base model in 4 bits.")
    said.append("The change is tuned minus base.")
    if not all(comparison.higher_is_better for comparison in comparisons):
        said.append("In a metric where lower is better, a negative change is an improvement.")
    said += [text for role, text in _ROLES.items() if role in roles]
    if any(c.num_clusters != c.num_samples for c in comparisons):
        said.append("Samples with the same question or passage count as one.")
    return said


def generations(line: Line) -> str:
    """Return the answers of base and tuned model next to the reference answers."""
    rows = []
    exact = [0, 0]
    for question, answer, *pair in answer_pairs(line):
        cells = []
        for index, text in enumerate(pair):
            same = text.strip() == answer.strip()
            exact[index] += same
            mark = f"\n{badge('equals the reference', 'good')}" if same else ""
            shown = escape(text.strip()) or '<span class="muted">(empty)</span>'
            cells.append(Cell(f"{shown}{mark}"))
        rows.append([question, answer, *cells])
    if not rows:
        return ""
    return section(
        "Answers before and after training",
        table(["question", "reference", "base", "tuned"], rows, prose=True),
        note=f"Greedy generation. Equal to the reference: base {exact[0]} of {len(rows)}, "
        f"tuned {exact[1]} of {len(rows)}.",
    )


def answer_pairs(line: Line) -> list[tuple[str, str, str, str]]:
    """Return question, reference, and the answers of base and tuned model, of each sampled row."""
    tuned = {row["prompt"]: row["text"] for row in line.tuned_generations}
    return [
        (row.get("question") or row["prompt"], row["answer"], row["text"], tuned[row["prompt"]])
        for row in line.base_generations
        if row["prompt"] in tuned
    ]


def _scale(comparison: TaskComparison) -> int:
    return 100 if is_fraction(comparison) else 1


def _interval_row(comparison: TaskComparison) -> IntervalRow:
    """Return the values of a comparison for a chart; fractions of right answers in percent."""
    c, scale = comparison, _scale(comparison)
    low, high = c.change_interval
    return IntervalRow(
        _label(c), scale * c.base, scale * c.tuned, scale * low, scale * high, scale * c.change
    )


def _samples(comparison: TaskComparison) -> str:
    if comparison.num_clusters == comparison.num_samples:
        return count(comparison.num_samples)
    return f"{count(comparison.num_samples)} ({count(comparison.num_clusters)} questions)"


def _label(comparison: TaskComparison) -> str:
    """Return the name of a comparison in a chart, which has little space."""
    apart = comparison.role in ("prompted", "published")
    return f"{comparison.task} ({comparison.role})" if apart else comparison.task
