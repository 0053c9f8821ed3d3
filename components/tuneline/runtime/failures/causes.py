"""Likely causes of failures that are not errors of tuneline, and what to change.

A TunelineError already states its cause and what to do next. This module is for failures from
outside a step, e.g. an eviction, and for errors of libraries.
"""

import re
from dataclasses import dataclass

from tuneline import errors
from tuneline.runtime.events import StepRun
from tuneline.runtime.failures.cause_table import CAUSES, Cause

OWN_ERRORS = frozenset(
    name
    for name, value in vars(errors).items()
    if isinstance(value, type) and issubclass(value, errors.TunelineError)
)
"""Names of tuneline's error classes, whose messages state cause and advice."""

RUN_AGAIN = "Fix the cause and run the recipe again: finished steps are taken from the cache."


@dataclass(frozen=True)
class Explanation:
    """Why a step failed and what to change."""

    cause: str
    """What happened, in one sentence; includes the error message of a library or the platform."""
    advice: str
    """What to change, in one sentence."""


def find_cause(text: str, step: str | None = None) -> Cause | None:
    """Return the first cause whose pattern matches the text.

    Args:
        text: what a library or the platform says.
        step: the step that failed; None: it is not known.
    """
    for cause in CAUSES:
        is_of_step = step is None or not cause.steps or step.partition(" ")[0] in cause.steps
        if is_of_step and re.search(cause.pattern, text, re.IGNORECASE):
            return cause
    return None


def explain(run: StepRun | None, message: str = "") -> Explanation:
    """Explain a failure from the events of the failed step and the platform's error message.

    Args:
        run: the step run that `events.failed_run` returned; None: there is none.
        message: the platform's error message, if there is one.
    """
    if run is not None and run.kind in OWN_ERRORS:
        return Explanation(run.message, RUN_AGAIN)
    raised = f"{run.kind}: {run.message}" if run is not None and run.kind else ""
    cause = find_cause(f"{raised}\n{message}", run.step if run is not None else None)
    if cause is not None:
        return Explanation(f"{cause.why} ({_short(raised or message)})", cause.advice)
    if raised:
        return Explanation(
            f"The step raised {_short(raised)}",
            "tuneline does not know this error. Read the traceback in the step's log, and report "
            "it together with the recipe if the recipe is correct.",
        )
    if run is not None:
        reached = f" after {run.done} of {run.total}" if run.total else ""
        return Explanation(
            f"The step ended without an error message{reached}: it was killed, most often because "
            "memory ran out.",
            "Check the pod's last state (OOMKilled, Evicted) or the kernel log. Give the step more "
            "memory, or lower the batch size or prepare.max_seq_length.",
        )
    return Explanation(
        f"The platform reports: {_short(message)}" if message else "No step reported an error.",
        "Read the log of the first failed task in the run's graph.",
    )


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 300 else text[:297] + "..."
