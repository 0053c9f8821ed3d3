"""Find the problems of a run, and the reasons why it waits.

Of each step, the last attempt is explained, once: by what Kubernetes did to its pod and what the
step left in its termination message, else by the error in its log. After KFP has deleted the pods,
the archived logs are left, of which diagnose's log tells the causes that only the pods knew.
"""

import re
from typing import Any

from tuneline.pipelines.doctor.finding import (
    CANCELLED,
    GONE,
    HELD,
    NOT_MOUNTED,
    QUEUED,
    TOLD,
    Finding,
    explained,
    finding,
)
from tuneline.pipelines.doctor.log_errors import find_error
from tuneline.pipelines.doctor.trainjobs import examine_trainjobs
from tuneline.pipelines.kfp_client.progress import Progress
from tuneline.pipelines.kube_api import Refused
from tuneline.pipelines.run_view import RunView
from tuneline.pipelines.step_logs import read
from tuneline.pods import QUEUE_LABEL
from tuneline.runtime.kfp_run import DRIVER_FAILED, Attempt
from tuneline.runtime.pod_ending import IMAGE_REASONS

LOG_LINES = 1000
"""Lines at the end of a log in which the error is looked for."""


def examine(view: RunView, client: Any = None) -> list[Finding]:
    """Return the problems of a run and the reasons why it waits; an empty list if there are none.

    Args:
        view: the run.
        client: connection to KFP's API, for archived logs; None: it is out of reach.
    """
    failed = [step for step in view.steps if step.state == "failed"]
    # The exit handler fails because of itself, never because of the run.
    failed.sort(key=lambda step: bool(step.attempts and step.attempts[-1].is_on_exit))
    findings = [_failure(view, client, step) for step in failed]
    waiting = [step for step in view.steps if step.state in ("waiting", "running")]
    findings += [found for step in waiting if (found := _obstacle(view, step)) is not None]
    if view.kube is not None:
        findings += examine_trainjobs(view.kube, view.run_id)
    if view.state in ("cancelled", "cancelling"):
        stopped = [step.name for step in view.steps if step.state == "cancelled"]
        evidence = f"stopped: {', '.join(stopped)}" if stopped else "no step was running"
        findings.append(finding("run", CANCELLED, evidence))
    if not findings:
        findings += [found for step in view.steps if (found := _verdict(view, client, step))]
    return findings


def _failure(view: RunView, client: Any, step: Progress) -> Finding:
    """Return why a step failed."""
    if not step.attempts:
        return finding(step.name, GONE, "KFP lists no pod of the step")
    attempt = step.attempts[-1]
    is_told = attempt.ending is not None and bool(attempt.ending.error)
    if is_told or attempt.reason not in ("", "Error", DRIVER_FAILED):
        return explained(attempt, _pull_error(view, attempt))
    log = read(view, client, attempt, lines=LOG_LINES)
    found = find_error(step.name, log) if log else None
    if found is not None:
        return found
    if attempt.exit_code is not None or attempt.message:
        return explained(attempt)
    told = _told_by_diagnose(view, client, step.name)
    return told or finding(step.name, GONE, f"no error in a log of pod {attempt.pod}")


def _obstacle(view: RunView, step: Progress) -> Finding | None:
    """Return why a step waits; None if nothing holds it up."""
    attempt = step.attempts[-1] if step.attempts else None
    if attempt is None:
        return None
    if not attempt.reason:
        said = _mount_error(view, attempt) if step.state == "waiting" else ""
        return finding(step.name, NOT_MOUNTED, said) if said else None
    if attempt.reason == "SchedulingGated":
        labels = (_pod(view, attempt) or {}).get("metadata", {}).get("labels", {})
        return finding(step.name, QUEUED, f"LocalQueue {labels.get(QUEUE_LABEL, 'unknown')}")
    return explained(attempt, _pull_error(view, attempt))


def _pod(view: RunView, attempt: Attempt) -> dict[str, Any] | None:
    return next((pod for pod in view.pods if pod["metadata"]["name"] == attempt.pod), None)


def _pull_error(view: RunView, attempt: Attempt) -> str:
    """Return what the events say about an image that cannot be pulled; "" if they do not."""
    if attempt.reason not in IMAGE_REASONS:
        return ""
    return _last_event(view, attempt, "Failed to pull image")


def _mount_error(view: RunView, attempt: Attempt) -> str:
    """Return what the events say about a volume that cannot be mounted; "" if they do not."""
    return _last_event(view, attempt, "MountVolume.SetUp failed")


def _last_event(view: RunView, attempt: Attempt, beginning: str) -> str:
    """Return the last event about a pod whose message begins with some words, or ""."""
    if view.kube is None or not attempt.pod:
        return ""
    try:
        messages = [event.get("message", "") for event in view.kube.events(attempt.pod)]
    except Refused:
        return ""
    return next((text for text in messages[::-1] if text.startswith(beginning)), "")


def _told_by_diagnose(view: RunView, client: Any, step: str) -> Finding | None:
    """Return what the run's own exit handler logged about a step while the pods were there."""
    for handler in view.steps:
        if handler.name != "diagnose" or not handler.attempts:
            continue
        log = read(view, client, handler.attempts[-1], lines=LOG_LINES) or ""
        said = re.findall(rf"^\[KFP Executor [^]]*ERROR\]: {re.escape(step)}: (.+)$", log, re.M)
        if said:
            return finding(step, TOLD, said[-1])
    return None


def _verdict(view: RunView, client: Any, step: Progress) -> Finding | None:
    """Return a finding if the step is the gate and its verdict is to hold the model."""
    if step.name != "gate" or not step.attempts:
        return None
    last = step.attempts[-1]
    if last.ending is not None and last.ending.result:
        held = last.ending.result == "hold"
        return finding("gate", HELD, f"hold: {last.ending.text}") if held else None
    log = read(view, client, last, lines=LOG_LINES) or ""
    verdicts = re.findall(
        r"(?:^\[KFP Executor [^]]*INFO\]: |tuneline\.gate\.run: )(hold: .+)$", log, re.M
    )
    return finding("gate", HELD, verdicts[-1]) if verdicts else None
