"""The picture of the line: its stages, and the state of each stage in a run."""

from collections.abc import Mapping

from tuneline.html.flow import Stage, Status
from tuneline.runtime.events import StepRun
from tuneline.steps import STEPS

LINE: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("fetch", ()),
    ("prepare", ("fetch",)),
    ("train", ("prepare",)),
    ("merge", ("train",)),
    ("evaluate tuned", ("merge",)),
    ("gate", ("evaluate tuned", "evaluate base")),
    ("publish", ("gate", "quantize")),
    ("evaluate base", ("prepare",)),
    ("quantize", ("merge",)),
)
"""Each stage with the stages that it waits for. The main path is first, so that it gets the first
lane. Which steps make up a stage is in steps.py; `evaluate` runs once per model."""
OUTSIDE = tuple(name for name, step in STEPS.items() if step.stage is None)
"""Steps that are not drawn: they describe the line and are not part of it."""


def stages(states: Mapping[str, tuple[Status, float | None, str]]) -> list[Stage]:
    """Return all stages of the picture, from status, seconds and detail of those that ran."""
    not_run: tuple[Status, None, str] = ("not run", None, "")
    return [Stage(name, *states.get(name, not_run), after=after) for name, after in LINE]


def stages_of_runs(runs: list[StepRun]) -> list[Stage]:
    """Return the stages of a run that has ended, from the events of its steps."""
    grouped: dict[str, list[StepRun]] = {}
    merged = False
    for run in runs:
        if run.step in OUTSIDE:
            continue
        grouped.setdefault(_stage_of(run, merged=merged), []).append(run)
        merged = merged or (run.step == "merge" and run.status == "finished")
    states: dict[str, tuple[Status, float | None, str]] = {}
    for name, group in grouped.items():
        status: Status = "finished" if all(run.status == "finished" for run in group) else "failed"
        seconds = [run.seconds for run in group if run.seconds is not None]
        last = group[-1]
        detail = f"{len(group)} tasks" if len(group) > 1 else ""
        if last.status != "finished" and last.total:
            detail = f"{last.done} of {last.total}"
        states[name] = (status, sum(seconds) if seconds else None, detail)
    return stages(states)


def _stage_of(run: StepRun, *, merged: bool) -> str:
    if run.step == "evaluate":
        # Both evaluations are the same step, and its progress notes name the model. Before the
        # first note only the order tells them apart: the tuned model exists after the merge.
        label = run.note.partition(":")[0]
        if label not in ("base", "tuned"):
            label = "tuned" if merged else "base"
        return f"evaluate {label}"
    step = STEPS.get(run.step)
    return step.stage if step and step.stage else run.step
