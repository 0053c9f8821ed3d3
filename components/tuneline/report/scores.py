"""The sections with scores and answers, before and after training."""

from html import escape

from tuneline.artifacts import TaskComparison
from tuneline.html.page import Cell, IntervalRow, badge, interval_chart, paragraph, section, table
from tuneline.html.units import count, number, signed
from tuneline.report.records import Line

OUTCOME_TONES = {"better": "good", "worse": "bad", "undecided": "plain"}


def scores(line: Line) -> str:
    """Return the comparison of base and tuned model, with one chart per metric."""
    comparisons = line.decision.comparisons
    by_metric: dict[str, list[TaskComparison]] = {}
    for comparison in comparisons:
        by_metric.setdefault(comparison.metric, []).append(comparison)
    charts = [
        interval_chart(
            [
                IntervalRow(_label(c), c.base, c.tuned, *c.change_interval, difference=c.change)
                for c in group
            ],
            x_label=metric if group[0].higher_is_better else f"{metric} (lower is better)",
            higher_is_better=group[0].higher_is_better,
        )
        for metric, group in by_metric.items()
    ]
    rows = [
        [
            Cell(f"{escape(c.title)} {badge(c.role)}"),
            c.metric,
            number(c.base),
            number(c.tuned),
            signed(c.change),
            interval(c),
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
        paragraph(
            "Both models answered the same samples: the base model as it was fetched, and the "
            f"merged model in {line.merge.dtype}. Neither has weights in 4 bits, on which the "
            "losses of the training may be measured. The change is tuned minus base; in a metric "
            "where lower is better, a negative change is an improvement. A target has to improve: "
            "its whole interval has to lie on the better side of gate.min_gain. Guards must not "
            "get worse: the loss that gate.max_regression names has to be excluded with a "
            "confidence of 95 %. The tasks of a group are its members, which decide nothing by "
            "themselves. A control shows whether the tuned model still reads its prompts. Prompted "
            "compares with the base model that sees training rows in its prompt; it decides "
            "nothing. Published compares with the model published last, which must not be better. "
            "Samples with the same question or passage count as one.",
            muted=True,
        ),
    )


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


def interval(comparison: TaskComparison) -> str:
    """Return the 95 % interval of the change of a comparison as text."""
    low, high = comparison.change_interval
    return f"[{signed(low, 3)}, {signed(high, 3)}]"


def _samples(comparison: TaskComparison) -> str:
    if comparison.num_clusters == comparison.num_samples:
        return count(comparison.num_samples)
    return f"{count(comparison.num_samples)} ({count(comparison.num_clusters)} questions)"


def _label(comparison: TaskComparison) -> str:
    """Return the name of a comparison in a chart, which has little space."""
    apart = comparison.role in ("prompted", "published")
    return f"{comparison.task} ({comparison.role})" if apart else comparison.task
