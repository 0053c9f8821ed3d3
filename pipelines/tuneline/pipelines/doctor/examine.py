"""Find the problems of a run, and the reasons why it waits.

Of each step, the last attempt is explained, once. The sources are examined in this order: what
Kubernetes did to the pod; what the step left in its termination message; the step's log. After KFP
has deleted the pods, the archived logs are left, of which diagnose's log tells the causes that only
the pods knew.
"""

import re
from typing import Any

from tuneline.pipelines.doctor.finding import (
    BY_NAME,
    CANCELLED,
    GONE,
    HELD,
    UNKNOWN,
    Finding,
    finding,
)
from tuneline.pipelines.doctor.log_errors import find_error
from tuneline.pipelines.doctor.pods import explain_reason
from tuneline.pipelines.doctor.trainjobs import examine_trainjobs
from tuneline.pipelines.kfp_client.progress import Progress
from tuneline.pipelines.lint.secrets import mask_within
from tuneline.pipelines.run_view import RunView
from tuneline.pipelines.step_logs import read
from tuneline.runtime.causes import RUN_AGAIN
from tuneline.runtime.kfp_run import Attempt

LOG_LINES = 1000
"""Lines at the end of a log in which the error is looked for."""
ENDED_EARLY = ("failed", "cancelled")


def examine(view: RunView, client: Any = None) -> list[Finding]:
    """Return the problems of a run and the reasons why it waits; an empty list if there are none.

    Args:
        view: the run.
        client: connection to KFP's API, for archived logs; None: it is out of reach.
    """
    failed = [step for step in view.steps if step.state == "failed"]
    waiting = [step for step in view.steps if step.state in ("waiting", "running")]
    # The exit handler fails because of itself, never because of the run.
    failed.sort(key=lambda step: bool(step.attempts and step.attempts[-1].is_on_exit))
    findings = [_failure(view, client, step) for step in failed]
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
    found = _from_reason(view, attempt)
    if found is not None:
        return found
    if attempt.ending is not None and attempt.ending.error:
        kind, text = attempt.ending.error, mask_within(attempt.ending.text)
        advice = mask_within(attempt.ending.advice) or RUN_AGAIN
        return Finding(step.name, kind, text, f"{kind}: {text}", advice)
    log = read(view, client, attempt, lines=LOG_LINES)
    found = find_error(step.name, log) if log else None
    if found is not None:
        return found
    if attempt.exit_code in (137, 143):
        cause = BY_NAME["host memory" if attempt.exit_code == 137 else "terminated"]
        return finding(step.name, cause, f"exit code {attempt.exit_code}")
    told = _told_by_diagnose(view, client, step.name) if not attempt.reason else None
    if told is not None:
        return told
    if log is None and attempt.exit_code is None:
        return finding(step.name, GONE, f"no log of pod {attempt.pod}")
    code = f"exit code {attempt.exit_code}" if attempt.exit_code is not None else "its log"
    last = (log or "").strip().splitlines()[-1:] or ["no log is left"]
    return finding(step.name, UNKNOWN, f"{code}; {last[0]}")


def _from_reason(view: RunView, attempt: Attempt) -> Finding | None:
    pod = next((pod for pod in view.pods if pod["metadata"]["name"] == attempt.pod), None)
    return explain_reason(
        attempt.step, attempt.reason, attempt.message, pod=pod, kube=view.kube
    )


def _obstacle(view: RunView, step: Progress) -> Finding | None:
    """Return why a step waits; None if nothing holds it up."""
    if not step.attempts:
        return None
    return _from_reason(view, step.attempts[-1])


def _told_by_diagnose(view: RunView, client: Any, step: str) -> Finding | None:
    """Return what the run's own exit handler logged about a step while the pods were there."""
    for handler in view.steps:
        if handler.name != "diagnose" or not handler.attempts:
            continue
        log = read(view, client, handler.attempts[-1], lines=LOG_LINES) or ""
        pattern = rf"tuneline\.diagnose\.run: {re.escape(step)}: (.+)$"
        said = re.findall(pattern, log, re.M)
        if said:
            return finding(step, UNKNOWN, f"diagnose said: {said[-1]}")
    return None


def _verdict(view: RunView, client: Any, step: Progress) -> Finding | None:
    """Return a finding if the step is the gate and its verdict is to hold the model."""
    if step.name != "gate" or step.state != "succeeded":
        return None
    last = step.attempts[-1]
    if last.ending is not None and last.ending.result:
        held = last.ending.result == "hold"
        return finding("gate", HELD, f"hold: {last.ending.text}") if held else None
    log = read(view, client, last, lines=LOG_LINES) or ""
    verdicts = re.findall(r"(?:\]: |INFO tuneline\.gate\.run: )(hold: .+)$", log, re.M)
    return finding("gate", HELD, verdicts[-1]) if verdicts else None
