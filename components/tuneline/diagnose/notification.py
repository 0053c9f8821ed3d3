"""Send the outcome of a run on a cluster to the webhooks of its recipe."""

import datetime
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from tuneline.diagnose.outcome import Kind, Outcome
from tuneline.notify import NotifyConfig
from tuneline.notify.config import Event
from tuneline.notify.message import Message, decode_scores
from tuneline.notify.send import send
from tuneline.runtime.kfp_run import Attempt
from tuneline.runtime.parameter_text import decode_list, list_in_words
from tuneline.runtime.redaction import redacted

_EVENTS: dict[Kind, Event] = {
    "succeeded": "promoted",
    "held": "held",
    "failed": "failed",
    "cancelled": "cancelled",
    # Nobody knows, so somebody should look.
    "unknown": "failed",
}


@dataclass(frozen=True)
class About:
    """What a message says of a run besides how it ended."""

    webhooks: Sequence[NotifyConfig] = ()
    run_name: str = ""
    recipe_name: str = ""
    target: str = ""
    """Where the run publishes."""


def tell(about: About, outcome: Outcome, attempts: Sequence[Attempt]) -> list[str]:
    """Send the outcome of a run to the webhooks; return a sentence per webhook that failed."""
    report = next(
        (each.ending for each in reversed(attempts) if each.step == "report" and each.ending), None
    )
    is_decided = outcome.kind in ("succeeded", "held")
    verdict = report.text if report is not None and is_decided else ""
    links = {"details": f"tuneline status {shlex.quote(about.run_name)}"}
    if outcome.kind == "succeeded":
        links["published to"] = redacted(list_in_words(decode_list(about.target)))
    message = Message(
        event=_EVENTS[outcome.kind],
        run=about.run_name,
        recipe=about.recipe_name,
        text=verdict or outcome.cause,
        scores=decode_scores(report.scores) if report is not None else [],
        links=links,
        step=outcome.step or "" if outcome.kind == "failed" else "",
        cause=outcome.cause,
        advice=outcome.advice,
        seconds=_seconds(attempts),
    )
    return send(about.webhooks, message)


def _seconds(attempts: Sequence[Attempt]) -> float | None:
    """Return the time from the start of the first attempt to now; None if there is none."""
    started = min((each.started for each in attempts if each.started), default=None)
    if started is None:
        return None
    try:
        begun = datetime.datetime.fromisoformat(started)
        return round((datetime.datetime.now(datetime.UTC) - begun).total_seconds(), 1)
    except (ValueError, TypeError):
        return None
