"""Turn a run's final status and its events into a short Markdown text.

An exit handler that fails hides the failure it was to explain, so what cannot be read is said in
the text and never raised.
"""

import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path

from tuneline.html.units import duration
from tuneline.runtime.causes import explain
from tuneline.runtime.events import StepRun, failed_run, parse_events, step_runs
from tuneline.runtime.step import EVENTS_VARIABLE

logger = logging.getLogger(__name__)

SUCCEEDED = "SUCCEEDED"
OWN_STEP = "diagnose"


@dataclass(frozen=True)
class Diagnosis:
    """What a run came to."""

    succeeded: bool
    step: str | None
    """The step that failed, where known."""
    cause: str
    advice: str
    markdown: str


def run(
    *,
    state: str,
    task: str = "",
    message: str | None = None,
    events_path: str | None = None,
    summary_path: str | None = None,
) -> Diagnosis:
    """Diagnose a run that ended.

    Args:
        state: KFP's final state: SUCCEEDED, FAILED or CANCELLED.
        task: name of the task that the status is of; often only the exit handler's group.
        message: the platform's error message.
        events_path: the events file; default: what TUNELINE_EVENTS names, if anything.
        summary_path: where to write the Markdown; default: nowhere.
    """
    runs, remark = _read_runs(events_path or os.environ.get(EVENTS_VARIABLE))
    if state == SUCCEEDED:
        diagnosis = _success(runs, remark)
    else:
        diagnosis = _failure(state, task, message or "", runs, remark)
    if summary_path:
        try:
            Path(summary_path).parent.mkdir(parents=True, exist_ok=True)
            Path(summary_path).write_text(diagnosis.markdown, encoding="utf-8")
        except OSError as error:
            logger.error("the diagnosis could not be written: %s\n%s", error, diagnosis.markdown)
    if not diagnosis.succeeded:
        logger.error("%s: %s %s", diagnosis.step or task, diagnosis.cause, diagnosis.advice)
    return diagnosis


def _read_runs(path: str | None) -> tuple[list[StepRun], str]:
    """Return the runs of the steps, and a remark on what could not be read."""
    if not path:
        return [], "No events were kept (TUNELINE_EVENTS was not set), so times are not known."
    try:
        text = Path(path).read_bytes().decode("utf-8", errors="replace")
    except OSError as error:
        return [], f"The events in {path} could not be read: {error.strerror or error}."
    events, unreadable = parse_events(text)
    remark = ""
    if unreadable:
        remark = f"{unreadable} of {unreadable + len(events)} lines of {path} could not be read."
    return [run for run in step_runs(events) if run.step != OWN_STEP], remark


def _success(runs: list[StepRun], remark: str) -> Diagnosis:
    known = sum(run.seconds or 0 for run in runs)
    num_finished = sum(run.status == "finished" for run in runs)
    steps = "step" if num_finished == 1 else "steps"
    cause = f"The line ran to its end: {num_finished} {steps}, {duration(known)} of work."
    if not runs:
        cause = "The line ran to its end."
    lines = ["# The run succeeded", "", cause, "", *_table(runs), *_remark(remark)]
    return Diagnosis(True, None, cause, "", "\n".join(lines).rstrip() + "\n")


def _failure(state: str, task: str, message: str, runs: list[StepRun], remark: str) -> Diagnosis:
    cancelled = state == "CANCELLED"
    failed = failed_run(runs)
    # Locally KFP says only that its own group failed; that is no news.
    if re.fullmatch(r"Task exit-handler-\d+ failed\.", message.strip()):
        message = ""
    if cancelled and (failed is None or failed.status != "failed"):
        cause, advice = "The run was cancelled.", "Run the recipe again: finished steps are cached."
    else:
        explanation = explain(failed, message)
        cause, advice = explanation.cause, explanation.advice
    name = failed.step if failed else task if task and "exit-handler" not in task else None
    heading = f"# The run {'was cancelled' if cancelled else 'failed'}"
    if name:
        heading += f" at {_text(name)}"
    lines = [heading, "", f"**Why:** {_text(cause)}", "", f"**What to change:** {advice}", ""]
    if message and message not in cause:
        quoted = message.strip().replace("```", "'''")
        lines += ["KFP says:", "", "```", quoted, "```", ""]
    lines += [*_table(runs), *_remark(remark)]
    return Diagnosis(False, name, cause, advice, "\n".join(lines).rstrip() + "\n")


def _table(runs: list[StepRun]) -> list[str]:
    if not runs:
        return []
    rows = ["| step | status | time |", "| --- | --- | ---: |"]
    for run in runs:
        status: str = "did not end" if run.status == "running" else run.status
        if run.status != "finished" and run.total:
            status += f" at {run.done} of {run.total}"
        rows.append(f"| {_text(run.step)} | {status} | {duration(run.seconds)} |")
    return [*rows, ""]


def _remark(remark: str) -> list[str]:
    return [f"*{_text(remark)}*", ""] if remark else []


def _text(text: str) -> str:
    """Return text that Markdown shows as it is, on one line."""
    return re.sub(r"([\\`*_|<>\[\]])", r"\\\1", " ".join(text.split()))
