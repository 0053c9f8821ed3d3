"""Conclude how a run on a cluster ended, from the attempts of its steps.

The state that KFP 2.17 passes to an exit handler does not tell: it is COMPLETE after a good run,
FAILED after a failed one, and RUNNING after a cancelled run and after a run that came from the
cache. It only counts where Kubernetes says nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tuneline.errors import StoppedError
from tuneline.runtime.failures.attempt_causes import explain_attempt
from tuneline.runtime.failures.causes import Explanation
from tuneline.runtime.kfp_run import Attempt, group_phase, is_cancelled
from tuneline.runtime.pod_ending import POD_DELETED, RUN_STOPPED

Kind = Literal["succeeded", "held", "failed", "cancelled", "unknown"]

_CANCEL_ADVICE = "`tuneline resume RUN` runs the steps again that had not finished."
_UNKNOWN_ADVICE = "`tuneline status RUN` shows the state of each step."


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    kind: Kind
    cause: str
    """Why, in full sentences; after success, what was published."""
    advice: str = ""
    """What to change; "" after success."""
    step: str | None = None
    """The step that failed, if there is one."""


def conclude(
    attempts: Sequence[Attempt], workflow: dict[str, Any] | None = None, state: str = ""
) -> Outcome:
    """Return how a run ended, while its exit handler runs.

    Args:
        attempts: Attempts of all steps.
        workflow: The run's workflow; None if it could not be read.
        state: What KFP passes to the exit handler.
    """
    line = [attempt for attempt in attempts if not attempt.is_on_exit]
    last = list({attempt.path: attempt for attempt in line}.values())
    phase = group_phase(workflow) if workflow is not None else ""
    failed = sorted(
        (attempt for attempt in last if attempt.state == "failed"),
        key=lambda attempt: (_was_stopped(attempt), attempt.ended or "9"),
    )
    if phase == "Succeeded" or (not phase and _is_complete(last, state)):
        return _good(last)
    # Without the workflow: KFP says RUNNING, and the only steps that failed were stopped.
    was_running = state == "RUNNING" and bool(failed) and all(map(_was_stopped, failed))
    if is_cancelled(workflow) if workflow is not None else was_running:
        return _cancelled(last, failed)
    if failed:
        explanation = explain_attempt(failed[0])
        return Outcome("failed", explanation.cause, explanation.advice, failed[0].step)
    return _unclear(last, phase, state)


def _is_complete(last: Sequence[Attempt], state: str) -> bool:
    """Return whether the run was good, if its workflow could not be read."""
    if state in ("COMPLETE", "SUCCEEDED"):
        return True
    # Every run has a report, and it never comes from the cache. Publish runs beside it.
    steps = {attempt.step: attempt for attempt in last}
    report = steps.get("report")
    if report is None or report.state != "succeeded":
        return False
    is_held = report.ending is not None and report.ending.result == "hold"
    if "publish" in steps and steps["publish"].state == "unknown" and not is_held:
        return False
    good = ("succeeded", "cached", "skipped", "unknown")
    return all(attempt.state in good for attempt in last)


def _was_stopped(attempt: Attempt) -> bool:
    """Return whether an attempt was stopped, and so perhaps because of another's failure."""
    if attempt.reason == RUN_STOPPED:
        return True
    if attempt.ending is not None and attempt.ending.error:
        return attempt.ending.error == StoppedError.__name__
    return attempt.exit_code == StoppedError.exit_code


def _good(last: Sequence[Attempt]) -> Outcome:
    endings = {attempt.step: attempt.ending for attempt in last if attempt.ending is not None}
    verdict = endings.get("gate") or endings.get("report")
    if verdict is not None and verdict.result == "hold":
        return Outcome(
            "held",
            f"The gate did not promote the model: {verdict.text.rstrip('.')}.",
            "Read the report. More or better data, or other settings of train, may help; "
            "`gate` in the recipe says what is asked of the model.",
            "gate",
        )
    if any(each.state == "skipped" and each.step in ("publish", "promoted") for each in last):
        return Outcome("held", "The gate did not promote the model.", "Read the report.", "gate")
    published = endings.get("publish")
    if published is not None and published.text:
        return Outcome("succeeded", f"Published: {published.text}.")
    if verdict is not None and verdict.text:
        return Outcome("succeeded", f"The gate promoted the model: {verdict.text.rstrip('.')}.")
    return Outcome("succeeded", "All steps finished.")


def _cancelled(last: Sequence[Attempt], failed: Sequence[Attempt]) -> Outcome:
    cause = "Somebody cancelled the run."
    stopped = [attempt.step for attempt in failed if attempt.exit_code == StoppedError.exit_code]
    if stopped:
        cause += f" That stopped {', '.join(stopped)}."
    waiting = [
        attempt.step
        for attempt in last
        if attempt.reason == RUN_STOPPED or attempt.state == "waiting"
    ]
    if waiting:
        cause += f" At that time, {', '.join(waiting)} had not started."
    own = [each for each in failed if not _was_stopped(each) and each.reason != POD_DELETED]
    if own:
        explanation = explain_attempt(own[0])
        cause += f" Before that, {own[0].step} had failed: {explanation.cause}"
        return Outcome("cancelled", cause, explanation.advice, own[0].step)
    return Outcome("cancelled", cause, _CANCEL_ADVICE)


def _unclear(last: Sequence[Attempt], phase: str, state: str) -> Outcome:
    """Return the outcome if no step is known to have failed, and no step says that all is well."""
    waiting = next((each for each in last if each.state in ("waiting", "running")), None)
    where = ""
    if waiting is not None:
        where = f" {waiting.step} was {waiting.state}."
        if waiting.reason:
            where += f" {explain_attempt(waiting).cause}"
    if phase in ("Failed", "Error") or state == "FAILED":
        explanation = Explanation(
            f"A step failed, but its pod is gone, so that nothing says why.{where}",
            "Read the logs, which KFP keeps: `tuneline doctor RUN`.",
        )
        return Outcome("failed", explanation.cause, explanation.advice)
    cause = f"No step is known to have failed.{where}"
    if not phase:
        cause += (
            " Without the nodes of its workflow, nobody knows whether the run was cancelled or "
            "came from the cache."
        )
    return Outcome("unknown", cause, _UNKNOWN_ADVICE)
