"""The explanation of a run as Markdown."""

from collections.abc import Sequence
from datetime import datetime

from tuneline.html.markdown import code_block, escape_markdown
from tuneline.html.units import duration
from tuneline.runtime.events import StepRun
from tuneline.runtime.kfp_run import Attempt
from tuneline.runtime.pod_ending import RUN_STOPPED

_NOT_STARTED = "not started"
_STATES = {
    **{"cached": "from the cache", "skipped": "not needed", "unknown": "no pod"},
    # The exit handler writes the table when nothing else will start any more.
    "waiting": _NOT_STARTED,
}


def paragraph(title: str, text: str) -> list[str]:
    """Return a paragraph with a bold title; no line if the text is empty."""
    return [f"**{title}:** {escape_markdown(text)}", ""] if text else []


def quote(title: str, text: str) -> list[str]:
    """Return text as it is, in a block of code."""
    return [title, "", code_block(text.strip()), ""]


def remark(text: str) -> list[str]:
    """Return a remark in italics; no line if the text is empty."""
    return [f"*{escape_markdown(text)}*", ""] if text else []


def events_table(runs: Sequence[StepRun]) -> list[str]:
    """Return the table of the steps of a local run."""
    rows = []
    for run in runs:
        status: str = "not finished" if run.status == "running" else run.status
        if run.status != "finished" and run.total:
            status += f" at {run.done} of {run.total}"
        rows.append((run.name, status, duration(run.seconds)))
    return _table(("step", "status", "time"), rows)


def attempts_table(attempts: Sequence[Attempt]) -> list[str]:
    """Return the table of the steps of a run on a cluster: one row per attempt."""
    rows = []
    for attempt in attempts:
        state: str = _STATES.get(attempt.state, attempt.state)
        if attempt.reason == RUN_STOPPED:
            state = _NOT_STARTED
        elif attempt.reason and attempt.reason != "Error":
            state += f" ({attempt.reason})"
        elif attempt.ending is not None and attempt.ending.error:
            state += f" ({attempt.ending.error})"
        name = attempt.step if attempt.number == 1 else f"{attempt.step}, try {attempt.number}"
        rows.append((name, state, duration(_seconds(attempt))))
    return _table(("step", "status", "time"), rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    if not rows:
        return []
    lines = [f"| {' | '.join(head)} |", "| --- | --- | ---: |"]
    lines += [
        f"| {' | '.join(escape_markdown(cell) for cell in texts)} | {time} |"
        for *texts, time in rows
    ]
    return [*lines, ""]


def _seconds(attempt: Attempt) -> float | None:
    is_over = attempt.started and attempt.ended
    if attempt.state == "cached" or attempt.reason == RUN_STOPPED or not is_over:
        return None
    started, ended = (datetime.fromisoformat(each) for each in (attempt.started, attempt.ended))
    return (ended - started).total_seconds()
