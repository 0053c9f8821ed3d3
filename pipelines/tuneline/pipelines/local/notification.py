"""Send the outcome of a run on this machine to the webhooks of its recipe."""

import time
from collections.abc import Sequence
from pathlib import Path

from tuneline.notify import NotifyConfig
from tuneline.notify.config import Event
from tuneline.notify.message import Message, scores_of
from tuneline.notify.send import send
from tuneline.pipelines.local.report_page import published_of
from tuneline.pipelines.local.run_dir import LocalRun
from tuneline.records.in_words import verdict_sentence
from tuneline.runtime.events import failed_run


def tell(
    webhooks: Sequence[NotifyConfig],
    recipe_name: str,
    run: LocalRun,
    page: Path,
    *,
    failure: str = "",
    stopped: str = "",
) -> list[str]:
    """Send a message about the end of a run; return a sentence per webhook that did not get it.

    Args:
        webhooks: the `notify` section of the recipe.
        recipe_name: name of the recipe.
        run: the run.
        page: its report.
        failure: why the run failed; "" if it did not.
        stopped: who stopped the run; "" if nobody did.
    """
    summary, step = run.summary(), failed_run(run.steps())
    links = {"report": str(page)}
    event: Event = "failed"
    if stopped:
        event, text = "cancelled", f"The run was {stopped}."
    elif failure or summary is None:
        text = failure or "The run ended without a report."
    else:
        event = "promoted" if summary.verdict == "promote" else "held"
        text = verdict_sentence(summary.verdict, summary.reason, summary.comparisons)
        published = published_of(run)
        if published is not None:
            links["published to"] = published.target
    if event in ("failed", "cancelled"):
        links["continue"] = f"tuneline resume {run.name}"
    message = Message(
        event=event,
        run=run.name,
        recipe=recipe_name,
        text=text,
        scores=scores_of(summary.comparisons) if summary is not None else (),
        links=links,
        step=step.name if failure and step is not None else "",
        cause=failure,
        seconds=_seconds(run),
    )
    return send(webhooks, message)


def _seconds(run: LocalRun) -> float | None:
    """Return the time from the start of the first step to now; None if no step has started."""
    started = [step.started for step in run.steps()]
    return round(time.time() - min(started), 1) if started else None
