"""The page of a comparison: scores, what differs, and the curves over each other."""

from collections.abc import Sequence

from tuneline.html.charts import line_chart
from tuneline.html.page import banner, paragraph, render_page, section, table
from tuneline.html.units import number_pair, percent_pair, points, signed
from tuneline.pipelines.compare.differences import (
    Difference,
    ScoreDifference,
    figures,
    recipe_differences,
    remarks,
)
from tuneline.pipelines.compare.finished import FinishedRun
from tuneline.training_figures import loss_unit

SCORE_COLUMNS = (
    "task",
    "metric",
    "first",
    "second",
    "change",
    "95 % interval",
    "samples",
    "result",
)


def score_row(found: ScoreDifference) -> list[str]:
    """Return the cells of a comparison of two scores, in the order of SCORE_COLUMNS."""
    pair = (percent_pair if found.is_fraction else number_pair)(found.first, found.second)
    change, low, high = (
        points(value) if found.is_fraction else signed(value, 3)
        for value in (found.change, *found.change_interval)
    )
    samples = str(found.num_common)
    if found.num_samples != (found.num_common, found.num_common):
        samples += f" of {found.num_samples[0]} and {found.num_samples[1]}"
    return [
        found.task,
        found.metric,
        *pair,
        f"{change} points" if found.is_fraction else change,
        f"[{low}, {high}]",
        samples,
        found.verdict,
    ]


def render_comparison(
    runs: Sequence[FinishedRun], scores: Sequence[tuple[list[ScoreDifference], str]]
) -> str:
    """Return the page.

    Args:
        runs: the runs; the others are compared with the first.
        scores: for each of the others, the differences of its scores, and a remark.
    """
    first = runs[0].name
    names = [run.name for run in runs]
    cards, lead = [], ""
    for run, (found, remark) in zip(runs[1:], scores, strict=True):
        # Tables of prose are stacked on a phone, where the others would hide columns.
        parts = [table(SCORE_COLUMNS, [score_row(each) for each in found], prose=True)]
        parts += [paragraph(remark, muted=True)] if remark else []
        lead += banner(run.name, _result(found, first))
        note = (
            f"Scores of the tuned models on the samples that both runs have. First: {first}. "
            f"Second: {run.name}. The change is second minus first."
        )
        cards.append(section(f"{run.name} against {first}", *parts, note=note))
    differing = recipe_differences(runs)
    cards.append(
        section("What differs in the recipes", _table(differing, names))
        if differing
        else section("What differs in the recipes", paragraph("Nothing differs."))
    )
    shown = figures(runs)
    apart = [row for row in shown if len(set(row.values)) > 1]
    said = [_table(apart, names)] if apart else []
    # "-" stands for what no run has.
    equal = [row for row in shown if row not in apart and row.values[0] != "-"]
    if equal:
        same = "; ".join(f"{row.name}: {row.values[0]}" for row in equal)
        said.append(paragraph(f"Equal in all runs - {same}.", muted=True))
    said += [paragraph(remark, muted=True) for remark in remarks(runs)]
    cards.append(section("Data, training and exports", *said))
    units = {loss_unit(run.training) for run in runs}
    unit = units.pop() if len(units) == 1 else ""
    label = f"loss ({unit})" if unit else "loss"
    charts = []
    for title, key in (("Training loss", "loss"), ("Evaluation loss", "eval_loss")):
        series = {
            run.name: [
                (point.step, getattr(point, key))
                for point in run.training.history
                if getattr(point, key) is not None
            ]
            for run in runs
        }
        if any(series.values()):
            charts.append(line_chart(series, x_label="step", y_label=label, title=title))
    if charts:
        cards.append(section("Loss", f'<div class="pair">{"".join(charts)}</div>'))
    title = f"{', '.join(names[:-1])} and {names[-1]}"
    return render_page(title, cards, subtitle="Comparison of runs", lead=lead)


def _result(found: Sequence[ScoreDifference], first: str) -> str:
    """Return in a sentence on which tasks a run is better or worse than the first."""
    if not found:
        return f"It has no samples in common with {first}, so no scores can be compared."
    said = {
        verdict: [each.task for each in found if each.verdict == verdict]
        for verdict in ("better", "worse", "no clear difference")
    }
    parts = [f"{verdict} on {', '.join(tasks)}" for verdict, tasks in said.items() if tasks]
    return f"Against {first}: {'; '.join(parts)}."


def _table(rows: Sequence[Difference], names: list[str]) -> str:
    return table(["", *names], [[row.name, *row.values] for row in rows], prose=True)
