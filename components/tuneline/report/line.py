"""The steps of the line, as stages of its picture."""

from collections.abc import Mapping

from tuneline.html.flow import Stage, Status
from tuneline.runtime.events import StepRun

# Name and what it waits for. The main way comes first, so that it takes the first lane.
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
# Steps that are not drawn: they look at the line, they are not part of it.
OUTSIDE = ("report", "diagnose")
# Small steps that come before a stage count as its beginning.
WITHIN = {"plan": "fetch", "look-up-model": "fetch", "look-up-data": "prepare"}


def stages(
    known: Mapping[str, tuple[Status, float | None, str]], rest: Status = "not run"
) -> list[Stage]:
    """Return all stages, with (status, seconds, detail) of the known ones."""
    return [Stage(name, *known.get(name, (rest, None, "")), after=after) for name, after in LINE]


def stages_of_runs(runs: list[StepRun]) -> list[Stage]:
    """Return the stages of a run that is over, from its events."""
    grouped: dict[str, list[StepRun]] = {}
    merged = False
    for run in runs:
        if run.step in OUTSIDE:
            continue
        grouped.setdefault(_stage_of(run, merged=merged), []).append(run)
        merged = merged or (run.step == "merge" and run.status == "finished")
    known: dict[str, tuple[Status, float | None, str]] = {}
    for name, group in grouped.items():
        status: Status = "finished" if all(run.status == "finished" for run in group) else "failed"
        seconds = [run.seconds for run in group if run.seconds is not None]
        last = group[-1]
        detail = f"{len(group)} tasks" if len(group) > 1 else ""
        if last.status != "finished" and last.total:
            detail = f"{last.done} of {last.total}"
        known[name] = (status, sum(seconds) if seconds else None, detail)
    return stages(known)


def _stage_of(run: StepRun, *, merged: bool) -> str:
    if run.step.startswith(("convert", "measure-importance", "quantize")):
        return "quantize"
    if run.step == "evaluate":
        # Both evaluations are one step; its progress says which. Before a note there is only
        # the order: nothing tuned can be measured before the merge.
        label = run.note.partition(":")[0]
        if label not in ("base", "tuned"):
            label = "tuned" if merged else "base"
        return f"evaluate {label}"
    return WITHIN.get(run.step, run.step)
