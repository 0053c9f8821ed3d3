"""Why an attempt of a step failed or waits, and what to change.

What the step itself left comes first. A step that was killed leaves nothing; then the reason of the
kubelet or of Argo tells, and at last the exit code.
"""

import re

from tuneline.errors import StoppedError
from tuneline.runtime.failures.cause_table import CAUSES
from tuneline.runtime.failures.causes import RUN_AGAIN, Explanation, find_cause
from tuneline.runtime.kfp_run import DRIVER_FAILED, Attempt
from tuneline.runtime.pod_ending import (
    CONFIG_REASONS,
    DEADLINE,
    IMAGE_REASONS,
    MEMORY_LIMIT,
    NOT_STARTED,
    OUT_OF_MEMORY,
    POD_DELETED,
    RUN_STOPPED,
)
from tuneline.runtime.termination import STARTED
from tuneline.steps import STEPS

_ADVICE = {cause.name: cause.advice for cause in CAUSES}
_DISRUPTIONS = (
    POD_DELETED,
    "Preempting",
    "PreemptionByScheduler",
    "DeletionByTaintManager",
    "DeletionByPodGC",
    "EvictionByEvictionAPI",
    "TerminationByKubelet",
    "NodeLost",
    "NodeShutdown",
    "Terminated",
)
"""Reasons for which KFP starts a pod again, because the pod vanished with its node's consent."""
_RESUME = "`tuneline resume RUN` runs the failed steps again; train resumes from its checkpoint."


def explain_attempt(attempt: Attempt) -> Explanation:
    """Explain why an attempt failed, or why it waits."""
    ending, reason, message = attempt.ending, attempt.reason, _sentence(attempt.message)
    if reason == DRIVER_FAILED:
        return Explanation(
            f"KFP's driver could not start the step: {message}",
            f"Read the log of pod {attempt.pod}. If KFP's services were unavailable: {_RESUME}",
        )
    stopped = ending is not None and ending.error == StoppedError.__name__
    if stopped and (by_reason := _by_reason(attempt, reason, message)):
        return by_reason
    if ending is not None and ending.error:
        explained = Explanation(_sentence(ending.text), ending.advice or RUN_AGAIN)
        if reason != OUT_OF_MEMORY:
            return explained
        killed = _killed_for_memory(attempt)
        return Explanation(f"{explained.cause} Before that: {killed.cause}", killed.advice)
    if reason == OUT_OF_MEMORY:
        return _killed_for_memory(attempt)
    if ending is not None and ending.result != STARTED and attempt.exit_code:
        return Explanation(
            f"The step finished, but KFP's launcher then failed (exit code {attempt.exit_code}): "
            "most often it could not store the step's outputs.",
            f"Read the end of the log of pod {attempt.pod}, and check the object store. {_RESUME}",
        )
    return _by_reason(attempt, reason, message) or _by_exit_code(attempt, message)


def _by_reason(attempt: Attempt, reason: str, message: str) -> Explanation | None:
    key = _placement_key(attempt)
    if reason == RUN_STOPPED:
        return Explanation(
            "The run was stopped before the step's pod ran.",
            "If the pod had waited for long, the events of the namespace say why: `tuneline doctor "
            "RUN`.",
        )
    if reason == NOT_STARTED:
        return Explanation(
            f"The step's container did not start within the time limit ({attempt.message}): most "
            "often its image cannot be pulled, or a volume cannot be mounted.",
            _ADVICE["image"],
        )
    if reason == DEADLINE:
        return Explanation(
            f"The step reached its time limit. {message}".rstrip(),
            f"Raise {key}.timeout_hours, or lower train.max_steps or evaluate.limit. {_RESUME}",
        )
    if reason in IMAGE_REASONS:
        return Explanation(f"The step's image cannot be pulled. {message}", _ADVICE["image"])
    if reason in CONFIG_REASONS:
        return Explanation(
            f"The step's container cannot be created. {message}",
            "Create the secret, the claim or the ConfigMap that the message names, or correct "
            "placement.",
        )
    if reason == "ExceededQuota":
        return Explanation(
            f"The namespace's quota leaves no room for the step's pod. {message}",
            f"Lower {key}.cpu_request and {key}.memory_request, wait until other runs have ended, "
            "or ask for a larger quota.",
        )
    if reason in ("LimitRange", "Forbidden"):
        return Explanation(
            f"Kubernetes refused the step's pod. {message}",
            f"Change what the message names, in {key} or in the namespace.",
        )
    if reason == "Unschedulable":
        return Explanation(f"No node can take the step's pod. {message}", _ADVICE["unschedulable"])
    if reason in _DISRUPTIONS:
        return Explanation(
            "The step's pod was deleted: its node was drained or lost, the pod was preempted, or "
            f"somebody deleted it ({reason}).",
            f"KFP starts such a pod again by itself, up to a limit. After that: {_RESUME}",
        )
    if reason == "Evicted":
        if re.search(r"EmptyDir|ephemeral|disk", message, re.IGNORECASE):
            return Explanation(
                f"The step's pod was evicted, because it wrote too much to its disk. {message}",
                "Raise placement.scratch_size, or list fewer formats in quantize.gguf.",
            )
        return Explanation(
            f"The step's pod was evicted, and KFP does not retry an evicted pod. {message}",
            f"Raise {key}.memory_request to what the step uses, so that other pods are evicted "
            f"first. {_RESUME}",
        )
    return None


def _by_exit_code(attempt: Attempt, message: str) -> Explanation:
    code = attempt.exit_code
    if code == 143:
        return Explanation(
            "The step was stopped by a signal (SIGTERM), as after a cancel or when a node is "
            "drained.",
            f"If nobody cancelled the run: {_RESUME}",
        )
    if code is not None and attempt.ending is not None:
        return Explanation(
            f"The step was killed by a signal, and could leave no message (exit code {code}): most "
            "often memory ran out on the node.",
            f"Raise {_placement_key(attempt)}.memory_request. {_RESUME}",
        )
    if code is not None:
        return Explanation(
            f"The step did not begin (exit code {code}): KFP's launcher could not load its inputs, "
            f"or its image lacks a package. {message}".rstrip(),
            f"Read the log: `tuneline logs RUN {attempt.step!r}`.",
        )
    if message:
        cause = find_cause(message, attempt.step)
        return Explanation(message, cause.advice if cause else RUN_AGAIN)
    return Explanation(
        "Nothing says why: the pod is gone.",
        f"Read the log, which KFP keeps: `tuneline logs RUN {attempt.step!r}`.",
    )


def _killed_for_memory(attempt: Attempt) -> Explanation:
    limit = attempt.message.removeprefix(MEMORY_LIMIT)
    limit = f" ({limit})" if limit else ""
    return Explanation(
        f"A process of the step was killed because the container reached its memory limit{limit}.",
        f"Raise {_placement_key(attempt)}.memory_limit, or lower prepare.max_seq_length or the "
        "batch size.",
    )


def _placement_key(attempt: Attempt) -> str:
    """Return the part of the recipe that places the step."""
    name = attempt.step.partition(" ")[0]
    return f"placement.steps.{name if name in STEPS else 'STEP'}"


def _sentence(text: str) -> str:
    """Return text on one line that ends in a full stop; "" stays ""."""
    text = " ".join(text.split())
    return text if not text or text[-1] in ".!?" else f"{text}."
