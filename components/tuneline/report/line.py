"""The data of the report's pipeline diagram: the stages, and the state of each stage in a run."""

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
    ("gate", ("evaluate tuned", "evaluate base", "quantize")),
    ("publish", ("gate",)),
    ("evaluate base", ("prepare",)),
    ("quantize", ("merge",)),
)
"""Each stage of the pipeline diagram, with the stages that it waits for. The stages of the main
path come first, so that the diagram shows them in its top row. steps.py assigns each step to a
stage, except `evaluate`, which runs twice and has a stage for the base and for the tuned model."""
OUTSIDE = tuple(name for name, step in STEPS.items() if step.stage is None)
"""Steps that the diagram does not show, because they only describe the run."""


def stages(states: Mapping[str, tuple[Status, float | None, str]]) -> list[Stage]:
    """Return all stages; `states` has the status, seconds and detail of the stages that ran."""
    not_run: tuple[Status, None, str] = ("not run", None, "")
    return [Stage(name, *states.get(name, not_run), after=after) for name, after in LINE]


def stages_of_runs(runs: list[StepRun]) -> list[Stage]:
    """Return the stages of a run that has ended, from the events of its steps."""
    grouped: dict[str, list[StepRun]] = {}
    for run in runs:
        if run.step in OUTSIDE:
            continue
        grouped.setdefault(stage_of(run), []).append(run)
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


def stage_of(run: StepRun) -> str:
    """Return the stage that an execution of a step is a part of; the step's name if it has none."""
    if run.step == "evaluate":
        return run.name
    step = STEPS.get(run.step)
    return step.stage if step and step.stage else run.step
