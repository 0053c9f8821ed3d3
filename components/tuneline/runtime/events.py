"""Read the events that step.py appends, as runs of steps.

A step that was killed leaves a start without an end; that is a fact to show, not an error.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal


@dataclass
class StepRun:
    """One run of a step; the same step may run several times, two at a time."""

    step: str
    started: float
    """Seconds since the epoch."""
    status: Literal["running", "finished", "failed"] = "running"
    seconds: float | None = None
    done: int | None = None
    total: int | None = None
    note: str = ""
    kind: str = ""
    """Class of the error."""
    message: str = ""


def parse_events(text: str) -> tuple[list[dict[str, Any]], int]:
    """Return the events in JSON Lines text, and how many lines were not events."""
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
    """Return the runs of all steps in the order of their starts.

    Events name a step, not a run of it, so ends go to the oldest run that is still open.
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
    """Return the run that ended the line: the first that failed, else the last cut off."""
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
