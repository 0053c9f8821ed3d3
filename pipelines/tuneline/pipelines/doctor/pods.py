"""Explain what Kubernetes did to a pod, or why it does not start it."""

import re
from typing import Any

from tuneline.pipelines.doctor.finding import (
    BY_NAME,
    CONFIG,
    QUEUED,
    Finding,
    finding,
)
from tuneline.pipelines.kube import Kube
from tuneline.pods import QUEUE_LABEL
from tuneline.runtime.causes import find_cause

_CAUSES = {
    "OOMKilled": "host memory",
    "Evicted": "evicted",
    "DeadlineExceeded": "timeout",
    "PodDeleted": "evicted",
    "Preempting": "evicted",
    "PreemptionByScheduler": "evicted",
    "TerminationByKubelet": "evicted",
    "DeletionByTaintManager": "evicted",
    "EvictionByEvictionAPI": "evicted",
    "DeletionByPodGC": "evicted",
    "NodeLost": "evicted",
    "NodeShutdown": "evicted",
    "Terminated": "evicted",
    "ErrImagePull": "image",
    "ImagePullBackOff": "image",
    "InvalidImageName": "image",
    "ErrImageNeverPull": "image",
    "ImageInspectError": "image",
    "Unschedulable": "unschedulable",
    "ExceededQuota": "quota",
    "LimitRange": "limit range",
    "Forbidden": "forbidden",
}
"""Causes by the reason of a pod or of Argo's node."""


def explain_reason(
    step: str, reason: str, message: str, *, pod: dict[str, Any] | None, kube: Kube | None
) -> Finding | None:
    """Return what a reason of Kubernetes means; None if it says nothing about the cause.

    Args:
        step: name of the step.
        reason: reason of the pod or of Argo's node.
        message: message beside the reason.
        pod: the pod; None if it is gone.
        kube: Kubernetes, for the pod's events; None: it is out of reach.
    """
    text = f"{reason}: {message}" if message else reason
    if reason == "OOMKilled":
        return finding(step, BY_NAME["host memory"], f"OOMKilled, memory limit {_limit(pod)}")
    if reason == "SchedulingGated":
        queue = (pod or {}).get("metadata", {}).get("labels", {}).get(QUEUE_LABEL, "unknown")
        return finding(step, QUEUED, f"LocalQueue {queue}, since {_gated_since(pod)}")
    if reason in ("CreateContainerConfigError", "CreateContainerError"):
        return finding(step, CONFIG, message or reason)
    name = _CAUSES.get(reason)
    if name == "evicted" and re.search(BY_NAME["disk"].pattern, message, re.I):
        name = "disk"
    if name == "image" and pod is not None and kube is not None:
        events = [each.get("message", "") for each in kube.events(pod["metadata"]["name"])]
        pulls = [each for each in events if each.startswith("Failed to pull image")]
        message = pulls[-1] if pulls else message
        return finding(step, BY_NAME[name], message or reason)
    if name is None:
        cause = find_cause(message)
        return finding(step, cause, text) if cause is not None else None
    return finding(step, BY_NAME[name], message if name in ("quota", "unschedulable") else text)


def _limit(pod: dict[str, Any] | None) -> str:
    """Return the memory limit of the step's container."""
    for container in (pod or {}).get("spec", {}).get("containers", []):
        if container["name"] in ("main", "node"):
            limit = container.get("resources", {}).get("limits", {}).get("memory")
            return str(limit or "not set")
    return "unknown, because the pod is gone"


def _gated_since(pod: dict[str, Any] | None) -> str:
    conditions = (pod or {}).get("status", {}).get("conditions", [])
    times = [each.get("lastTransitionTime") for each in conditions if each["type"] == "PodScheduled"]
    return str(next(iter(times), None) or "unknown")
