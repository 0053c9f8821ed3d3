"""The page of a comparison: scores, what differs, and the curves over each other."""

from collections.abc import Sequence

from tuneline.html.charts import line_chart
from tuneline.html.page import paragraph, render_page, section, table
from tuneline.html.units import number, signed
from tuneline.pipelines.compare.differences import (
    Difference,
    ScoreDifference,
    figures,
    recipe_differences,
    remarks,
)
from tuneline.pipelines.compare.finished import FinishedRun

SCORE_COLUMNS = (
    "task",
    "metric",
    "first",
    "second",
    "difference",
    "95 % interval",
    "samples",
    "result",
)


def score_row(found: ScoreDifference) -> list[str]:
    """Return the cells of a comparison of two scores, in the order of SCORE_COLUMNS."""
    samples = str(found.num_common)
    if found.num_samples != (found.num_common, found.num_common):
        samples += f" of {found.num_samples[0]} and {found.num_samples[1]}"
    return [
        found.task,
        found.metric,
        number(found.first),
        number(found.second),
        signed(found.difference),
        f"[{signed(found.interval[0])}, {signed(found.interval[1])}]",
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
    cards = []
    for run, (found, remark) in zip(runs[1:], scores, strict=True):
        # Tables of prose are stacked on a phone, where the others would hide columns.
        parts = [table(SCORE_COLUMNS, [score_row(each) for each in found], prose=True)]
        parts += [paragraph(remark, muted=True)] if remark else []
        note = (
            f"first is {first}, second {run.name}; tuned models, on the samples that both runs "
            "have; a positive difference is better"
        )
        cards.append(section(f"{run.name} against {first}", *parts, note=note))
    differing = recipe_differences(runs)
    cards.append(
        section("What differs in the recipes", _table(differing, names))
        if differing
        else section("What differs in the recipes", paragraph("nothing"))
    )
    said = [paragraph(remark, muted=True) for remark in remarks(runs)]
    cards.append(section("What came of it", _table(figures(runs), names), *said))
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
            cards.append(section(title, line_chart(series, x_label="step", y_label="loss")))
    title = f"{', '.join(names[:-1])} and {names[-1]}"
    return render_page(title, cards, subtitle="Comparison of runs")


def _table(rows: Sequence[Difference], names: list[str]) -> str:
    return table(["", *names], [[row.name, *row.values] for row in rows], prose=True)
