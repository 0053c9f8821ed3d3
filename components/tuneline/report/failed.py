"""The page of a run that ended before its report."""

from html import escape
from typing import Any

from tuneline.html.page import (
    Cell,
    badge,
    banner,
    facts,
    line_diagram,
    paragraph,
    render_page,
    section,
    table,
)
from tuneline.html.units import duration
from tuneline.report.line import OUTSIDE, stages_of_runs
from tuneline.runtime.events import StepRun, failed_run, step_runs
from tuneline.runtime.failures.causes import RUN_AGAIN, explain


def render_failed(recipe_name: str, events: list[dict[str, Any]]) -> str:
    """Return the page: the step that failed, the cause, and what to try next.

    Args:
        recipe_name: name of the recipe.
        events: the events in the events file, which runtime/step.py writes.
    """
    runs = [run for run in step_runs(events) if run.step not in OUTSIDE or run.status == "failed"]
    failed = failed_run(runs)
    explanation = explain(failed)
    if failed is None and runs:
        heading = "The run ended without a report"
        text = "All steps that started have finished, but the report is missing. See the run's log."
        advice = RUN_AGAIN
    else:
        heading = f"Failed at {failed.name}" if failed else "Failed before the first step"
        text, advice = explanation.cause, explanation.advice
    finished = [run for run in runs if run.status == "finished"]
    spent = sum(run.seconds or 0 for run in runs)
    cards = [
        section(
            "Steps of the run",
            line_diagram(stages_of_runs(runs)),
            note=f"{len(finished)} tasks finished; they took {duration(spent)}.",
        ),
        section(
            "What to try next",
            f'<div class="pair"><div>{paragraph(advice)}</div>{_about(failed)}</div>',
        ),
    ]
    if runs:
        cards.append(section("Tasks", _steps(runs)))
    return render_page(recipe_name, cards, lead=banner(heading, text, "bad"))


def _about(run: StepRun | None) -> str:
    if run is None:
        return ""
    pairs = [("Step", run.name), ("Time", duration(run.seconds))]
    if run.kind:
        pairs.append(("Type of error", Cell(f"<code>{escape(run.kind)}</code>")))
    if run.total:
        pairs.append(("Reached", f"{run.done} of {run.total} {run.note}".strip()))
    alone = Cell(f"<code>python -m tuneline.{_module(run.step)} --help</code>")
    pairs.append(("Run the step alone", alone))
    return facts(pairs)


def _module(step: str) -> str:
    return "quantize" if step.startswith(("convert", "quantize")) else step


def _steps(runs: list[StepRun]) -> str:
    rows = []
    for run in runs:
        tone, status = {
            "finished": ("good", "finished"),
            "failed": ("bad", "failed"),
            "running": ("bad", "not finished"),
        }[run.status]
        unfinished = run.status != "finished" and run.total
        reached = f"{run.done} of {run.total}" if unfinished else ""
        rows.append([run.name, badge(status, tone), reached, duration(run.seconds)])
    return table(["step", "status", "reached", "time"], rows, numeric=[2, 3])
