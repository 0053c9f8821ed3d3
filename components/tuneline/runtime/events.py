"""Reconstruct runs of steps from the events that step.py appends to the events file.

A step that was killed has a start event but no end event, and is reported as a running step.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal


@dataclass
class StepRun:
    """One execution of a step; a step may be executed several times, also concurrently."""

    step: str
    started: float
    """Time of the start, in seconds since the epoch."""
    status: Literal["running", "finished", "failed"] = "running"
    seconds: float | None = None
    """Duration in seconds; None until the step ends."""
    done: int | None = None
    """Number of finished units of work, from the last progress event."""
    total: int | None = None
    """Total number of units of work, from the last progress event."""
    note: str = ""
    """Remark of the last progress event, e.g. the loss."""
    kind: str = ""
    """Class name of the error of a failed step."""
    message: str = ""
    """Message of the error of a failed step."""


def parse_events(text: str) -> tuple[list[dict[str, Any]], int]:
    """Return the events in JSON Lines text and the number of lines that are not events."""
    events, unreadable = [], 0
    for line in text.splitlines():
        if not line.strip():
            continue
        try:
            event = json.loads(line)
        except ValueError:
            unreadable += 1
            continue
        if _is_event(event):
            events.append(event)
        else:
            unreadable += 1
    return events, unreadable


def step_runs(events: Iterable[dict[str, Any]]) -> list[StepRun]:
    """Return the runs of all steps, ordered by their start.

    Events name the step but not which of its runs, so an end event is assigned to the oldest run of
    the step that has not ended.
    """
    runs: list[StepRun] = []
    for event in events:
        name = event["step"]
        if event["event"] == "started":
            runs.append(StepRun(name, event["time"]))
            continue
        run = next((run for run in runs if run.step == name and run.status == "running"), None)
        if run is None:
            run = StepRun(name, event["time"])
            runs.append(run)
        if event["event"] == "progress":
            run.done, run.total = event.get("done"), event.get("total")
            run.note = event.get("note", "")
        elif event["event"] in ("finished", "failed"):
            run.status = event["event"]
            run.seconds = event.get("seconds")
            run.kind, run.message = event.get("kind", ""), event.get("message", "")
    return runs


def failed_run(runs: list[StepRun]) -> StepRun | None:
    """Return the first run that failed; if none failed, the last run that did not end, or None."""
    failed = [run for run in runs if run.status == "failed"]
    cut_off = [run for run in runs if run.status == "running"]
    return failed[0] if failed else cut_off[-1] if cut_off else None


def _is_event(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("step"), str)
        and isinstance(value.get("event"), str)
        and isinstance(value.get("time"), int | float)
    )
