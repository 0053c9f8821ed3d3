"""Explain the end of a run in a short Markdown text, from its final status and its events.

This step is the exit handler of the run, and if an exit handler fails, it hides the failure that it
should explain. Problems with reading or writing files are therefore mentioned in the text or the
log, and never raised.
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
) -> Diagnosis:
    """Explain why a run failed and what to change, or list what a successful run did.

    Args:
        state: final state in KFP: SUCCEEDED, FAILED or CANCELLED.
        task: name of the failed task; often KFP names only the group of the exit handler.
        message: error message of KFP.
        events_path: events file. Default: the file that TUNELINE_EVENTS names, if it is set.
        summary_path: Markdown file to write. Default: none.
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
            logger.error("cannot write the diagnosis: %s\n%s", error, diagnosis.markdown)
    if not diagnosis.succeeded:
        logger.error("%s: %s %s", diagnosis.step or task, diagnosis.cause, diagnosis.advice)
    return diagnosis


def _read_runs(path: str | None) -> tuple[list[StepRun], str]:
    """Return the runs of the steps, and a remark if events are missing or unreadable."""
    if not path:
        return [], "TUNELINE_EVENTS was not set, so there are no events and no times."
    try:
        text = Path(path).read_bytes().decode("utf-8", errors="replace")
    except OSError as error:
        return [], f"The events in {path} cannot be read: {error.strerror or error}."
    events, unreadable = parse_events(text)
    remark = ""
    if unreadable:
        remark = f"{unreadable} of {unreadable + len(events)} lines of {path} cannot be read."
    return [run for run in step_runs(events) if run.step != OWN_STEP], remark


def _success(runs: list[StepRun], remark: str) -> Diagnosis:
    seconds = sum(run.seconds or 0 for run in runs)
    num_finished = sum(run.status == "finished" for run in runs)
    tasks = "task" if num_finished == 1 else "tasks"
    cause = f"{num_finished} {tasks} finished and took {duration(seconds)} in total."
    if not runs:
        cause = "All tasks finished."
    lines = ["# The run succeeded", "", cause, "", *_table(runs), *_remark(remark)]
    return Diagnosis(True, None, cause, "", "\n".join(lines).rstrip() + "\n")


def _failure(state: str, task: str, message: str, runs: list[StepRun], remark: str) -> Diagnosis:
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
        status: str = "not finished" if run.status == "running" else run.status
        if run.status != "finished" and run.total:
            status += f" at {run.done} of {run.total}"
        rows.append(f"| {_text(run.step)} | {status} | {duration(run.seconds)} |")
    return [*rows, ""]


def _remark(remark: str) -> list[str]:
    return [f"*{_text(remark)}*", ""] if remark else []


def _text(text: str) -> str:
    """Return text on one line, with the characters escaped that Markdown would interpret."""
    return re.sub(r"([\\`*_|<>\[\]])", r"\\\1", " ".join(text.split()))
