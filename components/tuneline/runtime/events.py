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
    part: str = ""
    """What the execution is about if a step is executed several times: base, q4_k_m ..."""
    status: Literal["running", "finished", "failed"] = "running"
    seconds: float | None = None
    """Duration in seconds; None until the step ends."""
    done: int | None = None
    """Number of finished units of work, from the last progress event."""
    total: int | None = None
    """Total number of units of work, from the last progress event."""
    note: str = ""
    """Remark of the last progress event, e.g. the loss."""
    first_progress: tuple[float, int] | None = None
    """Time of the first progress event, and units of work that were finished then."""
    last_progress: float | None = None
    """Time of the last progress event."""
    kind: str = ""
    """Class name of the error of a failed step."""
    message: str = ""
    """Message of the error of a failed step."""

    @property
    def name(self) -> str:
        """Name of the step with what it is about, e.g. evaluate base."""
        return f"{self.step} {self.part}".strip()

    def seconds_left(self, now: float) -> float | None:
        """Return the time that the rest of the work takes at the present rate; None if unknown.

        The time before the first progress, in which a step loads models, does not count.
        """
        if self.status != "running" or self.first_progress is None or self.last_progress is None:
            return None
        since, done_before = self.first_progress
        done, total = self.done or 0, self.total or 0
        if done <= done_before or done >= total:
            return None
        rate = (self.last_progress - since) / (done - done_before)
        waited = now - self.last_progress
        if rate < 0 or waited < 0:
            return None  # The clock was set back meanwhile.
        left = rate * (total - done) - waited
        return left if left >= 1 else None


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

    Events name the step and the part that it is about but not which of its runs, so an end event is
    assigned to the oldest run of the part that has not ended.
    """
    runs: list[StepRun] = []
    for event in events:
        name, part = event["step"], event.get("part", "")
        if event["event"] == "started":
            runs.append(StepRun(name, event["time"], part))
            continue
        open_runs = (run for run in runs if run.status == "running")
        run = next((run for run in open_runs if (run.step, run.part) == (name, part)), None)
        if run is None:
            run = StepRun(name, event["time"], part)
            runs.append(run)
        if event["event"] == "progress":
            run.done, run.total = event.get("done"), event.get("total")
            run.note = event.get("note", "")
            run.last_progress = event["time"]
            run.first_progress = run.first_progress or (event["time"], run.done or 0)
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
