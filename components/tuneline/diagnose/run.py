"""Explain the end of a run in a short Markdown text.

On a cluster, the outcome comes from Kubernetes (outcome.py); on one machine, from KFP's final
status and from the events of the steps.

This step is the exit handler of the run, and if an exit handler fails, it hides the failure that it
should explain. Problems with reading or writing are therefore mentioned in the text or the log, and
never raised.
"""

import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path

from tuneline.diagnose.cluster import ClusterRun, read_own_run
from tuneline.diagnose.notification import About, tell
from tuneline.diagnose.outcome import Outcome, conclude
from tuneline.diagnose.text import (
    attempts_table,
    events_table,
    paragraph,
    quote,
    remark,
)
from tuneline.html.markdown import escape_markdown
from tuneline.html.units import duration
from tuneline.runtime.events import StepRun, failed_run, parse_events, step_runs
from tuneline.runtime.failures.causes import explain
from tuneline.runtime.kfp_run import read_attempts
from tuneline.runtime.step import EVENTS_VARIABLE
from tuneline.runtime.termination import Ending, leave
from tuneline.seals import seal_page

logger = logging.getLogger(__name__)

SUCCEEDED = "SUCCEEDED"
OWN_STEP = "diagnose"

_HEADINGS = {
    "succeeded": "The run succeeded",
    "held": "The run finished, and the gate held the model back",
    "failed": "The run failed",
    "cancelled": "The run was cancelled",
    "unknown": "The run has ended",
}


@dataclass(frozen=True)
class Diagnosis:
    """Explanation of the end of a run."""

    succeeded: bool
    step: str | None
    """The step that failed, if it is known."""
    cause: str
    advice: str
    """What to change; "" after success."""
    markdown: str
    """The explanation as Markdown."""


def run(
    *,
    state: str,
    task: str = "",
    message: str | None = None,
    events_path: str | None = None,
    summary_path: str | None = None,
    about: About | None = None,
) -> Diagnosis:
    """Explain why a run failed and what to change, or list what a successful run did.

    Args:
        state: final state in KFP: SUCCEEDED, FAILED or CANCELLED. On a cluster it only counts where
            Kubernetes cannot be read.
        task: name of the failed task; often KFP names only the group of the exit handler.
        message: error message of KFP.
        events_path: events file. Default: the file that TUNELINE_EVENTS names, if it is set.
        summary_path: Markdown file to write. Default: none.
        about: the webhooks to tell, on a cluster. Default: none. On one machine, the command line
            tells them, because it outlives the steps.
    """
    events_path = events_path or os.environ.get(EVENTS_VARIABLE)
    found = None if events_path else read_own_run()
    if found is not None:
        diagnosis = _on_cluster(found, state, message or "", about or About())
    else:
        runs, note = _read_runs(events_path)
        if state == SUCCEEDED:
            diagnosis = _success(runs, note)
        else:
            diagnosis = _failure(state, task, message or "", runs, note)
    if summary_path:
        try:
            Path(summary_path).parent.mkdir(parents=True, exist_ok=True)
            Path(summary_path).write_text(seal_page(diagnosis.markdown), encoding="utf-8")
        except OSError as error:
            logger.error("cannot write the diagnosis: %s\n%s", error, diagnosis.markdown)
    if not diagnosis.succeeded:
        logger.error("%s: %s %s", diagnosis.step or task, diagnosis.cause, diagnosis.advice)
    return diagnosis


def _on_cluster(found: ClusterRun, state: str, message: str, about: About) -> Diagnosis:
    remarks = list(found.remarks)
    try:
        attempts = read_attempts(found.pods, found.workflow)
        outcome = conclude(attempts, found.workflow, state)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        # Another version of Argo or KFP may write its objects in another form.
        logger.exception("cannot understand the objects of this run")
        remarks.append(f"The objects of this run could not be read ({type(error).__name__}).")
        attempts, outcome = [], conclude([], None, state)
    heading = _HEADINGS[outcome.kind]
    if outcome.kind == "failed" and outcome.step:
        heading += f" at {escape_markdown(outcome.step)}"
    title = "What happened" if outcome.kind in ("succeeded", "unknown") else "Why"
    lines = [f"# {heading}", "", *paragraph(title, outcome.cause)]
    lines += paragraph("What to change", outcome.advice)
    if message and message not in outcome.cause:
        lines += quote("KFP says:", message)
    if found.deleted_jobs:
        jobs = escape_markdown(", ".join(found.deleted_jobs))
        lines += [f"Deleted, because nobody followed it: {jobs}.", ""]
    lines += attempts_table([attempt for attempt in attempts if not attempt.is_on_exit])
    _leave(outcome)
    remarks += tell(about, outcome, attempts)
    for each in remarks:
        lines += remark(each)
    return Diagnosis(
        outcome.kind in ("succeeded", "held"),
        outcome.step,
        outcome.cause,
        outcome.advice,
        "\n".join(lines).rstrip() + "\n",
    )


def _leave(outcome: Outcome) -> None:
    where = f" at {outcome.step}" if outcome.step and outcome.kind == "failed" else ""
    leave(Ending(step=OWN_STEP, result=outcome.kind + where, text=outcome.cause))


def _read_runs(path: str | None) -> tuple[list[StepRun], str]:
    """Return the runs of the steps, and a remark if events are missing or unreadable."""
    if not path:
        return [], "TUNELINE_EVENTS was not set, so there are no events and no times."
    try:
        text = Path(path).read_bytes().decode("utf-8", errors="replace")
    except OSError as error:
        return [], f"The events in {path} cannot be read: {error.strerror or error}."
    events, unreadable = parse_events(text)
    note = ""
    if unreadable:
        note = f"{unreadable} of {unreadable + len(events)} lines of {path} cannot be read."
    return [run for run in step_runs(events) if run.step != OWN_STEP], note


def _success(runs: list[StepRun], note: str) -> Diagnosis:
    seconds = sum(run.seconds or 0 for run in runs)
    num_finished = sum(run.status == "finished" for run in runs)
    tasks = "task" if num_finished == 1 else "tasks"
    cause = f"{num_finished} {tasks} finished and took {duration(seconds)} in total."
    if not runs:
        cause = "All tasks finished."
    lines = [f"# {_HEADINGS['succeeded']}", "", cause, "", *events_table(runs), *remark(note)]
    return Diagnosis(True, None, cause, "", "\n".join(lines).rstrip() + "\n")


def _failure(state: str, task: str, message: str, runs: list[StepRun], note: str) -> Diagnosis:
    cancelled = state == "CANCELLED"
    failed = failed_run(runs)
    # After a local run, KFP's message says only that the group of the exit handler failed, which
    # explains nothing.
    if re.fullmatch(r"Task exit-handler-\d+ failed\.", message.strip()):
        message = ""
    if cancelled and (failed is None or failed.status != "failed"):
        cause, advice = "The run was cancelled.", "Run the recipe again; finished steps are cached."
    else:
        explanation = explain(failed, message)
        cause, advice = explanation.cause, explanation.advice
    known_task = task if "exit-handler" not in task else ""
    name = failed.step if failed else known_task or None
    heading = f"# {_HEADINGS['cancelled' if cancelled else 'failed']}"
    if name:
        heading += f" at {escape_markdown(name)}"
    lines = [heading, "", *paragraph("Why", cause), *paragraph("What to change", advice)]
    if message and message not in cause:
        lines += quote("KFP says:", message)
    lines += [*events_table(runs), *remark(note)]
    return Diagnosis(False, name, cause, advice, "\n".join(lines).rstrip() + "\n")
