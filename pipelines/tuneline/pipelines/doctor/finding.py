"""A finding, and the causes that only the cluster can show."""

from dataclasses import dataclass

from tuneline.runtime.failures.attempt_causes import explain_attempt
from tuneline.runtime.failures.cause_table import CAUSES, Cause
from tuneline.runtime.kfp_run import Attempt
from tuneline.runtime.secrets import mask_within

MAX_EVIDENCE = 400
"""Longest evidence, in characters."""


@dataclass(frozen=True)
class Finding:
    """A problem of one step."""

    step: str
    cause: str
    """Short name of the cause, e.g. host memory."""
    why: str
    """What the cause means, as a sentence."""
    evidence: str
    """Text from the cluster or the log that shows the cause, with credentials masked."""
    advice: str
    """What to change."""


BY_NAME = {cause.name: cause for cause in CAUSES}
QUEUED = Cause(
    "queued",
    "",
    "The pod is waiting in its queue; nothing is wrong.",
    "Wait: Kueue admits the pod when capacity is free. `kubectl get workloads` shows its position.",
)
NOT_MOUNTED = Cause(
    "volume not mounted",
    "",
    "The pod waits for a volume that cannot be mounted.",
    "Create the ConfigMap (placement.ca_bundle), the secret or the claim that the message names, "
    "or correct placement.",
)
ORPHAN = Cause(
    "orphan",
    "",
    "The TrainJob has lost its launcher but still occupies its GPUs.",
    "Run `kubectl delete trainjob NAME`, unless its launcher is about to restart; the next run "
    "resumes from the checkpoint.",
)
HELD = Cause(
    "gate held",
    "",
    "Nothing failed: the gate held the model, so it was not published.",
    "The table of scores in the report shows which task did not improve or got worse. Train on "
    "more or better data, or change gate.max_regression or gate.target_tasks.",
)
CANCELLED = Cause(
    "cancelled",
    "",
    "Somebody cancelled the run; KFP calls it failed.",
    "`tuneline resume RUN` runs the steps that were stopped again; train continues from its last "
    "checkpoint.",
)
FAILED = Cause("failed", "", "The TrainJob failed.", "Read the log of train.")
TOLD = Cause(
    "diagnose",
    "",
    "The run's exit handler said why, while the pods were there.",
    "The evidence says what to change.",
)
GONE = Cause(
    "unknown",
    "",
    "The step failed, and nothing is left that tells why.",
    "Run the recipe again and call `tuneline doctor` within an hour of the failure, before KFP "
    "deletes the pods.",
)


def explained(attempt: Attempt, evidence: str = "") -> Finding:
    """Return the finding of what Kubernetes, Argo and the step itself say about an attempt.

    Args:
        attempt: the attempt.
        evidence: text that shows the cause; "": what the attempt has.
    """
    explanation = explain_attempt(attempt)
    code = f"exit code {attempt.exit_code}" if attempt.exit_code is not None else ""
    ending = attempt.ending
    if ending is not None and ending.error:
        name, text = ending.error, f"{ending.error}: {ending.text}"
    else:
        name = attempt.reason if attempt.reason not in ("", "Error") else code or "unknown"
        text = ", ".join(part for part in (attempt.reason, code, attempt.message) if part)
    cause = Cause(name, "", mask_within(explanation.cause), mask_within(explanation.advice))
    return finding(attempt.step, cause, evidence or text)


def finding(step: str, cause: Cause, evidence: str) -> Finding:
    """Return the finding of a cause; the evidence is cut to one line, without credentials."""
    text = mask_within(" ".join(evidence.split()))
    return Finding(step, cause.name, cause.why, text[:MAX_EVIDENCE], cause.advice)
