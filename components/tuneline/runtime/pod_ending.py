"""How a pod of KFP ended or why it does not start, from its status or from Argo's message."""

import re
from dataclasses import dataclass
from typing import Any

from tuneline.runtime.termination import Ending, decode

POD_DELETED = "PodDeleted"
"""Reason of an attempt whose pod was deleted: drained, preempted, or its node was lost."""

OUT_OF_MEMORY = "OOMKilled"
"""Reason of a container of which a process was killed at the memory limit."""


@dataclass(frozen=True)
class PodEnding:
    """How a pod ended; every field may be empty."""

    reason: str = ""
    """Word of Kubernetes or Argo: OOMKilled, Evicted, DeadlineExceeded, ImagePullBackOff ..."""
    exit_code: int | None = None
    message: str = ""
    """Message of Kubernetes; "" if it is the step's own, which is in `ending`."""
    ending: Ending | None = None
    started: str = ""
    ended: str = ""


_MESSAGES = (
    ("DeadlineExceeded", r"active on the node longer than the specified deadline"),
    ("Evicted", r"The node (was low on resource|had condition)|ephemeral local storage usage"),
    ("Evicted", r"Usage of EmptyDir volume .* exceeds the limit"),
    ("Preempting", r"Preempted"),
    (POD_DELETED, r"^pod deleted$|^Pod was deleted"),
    ("ExceededQuota", r"exceeded quota"),
    ("LimitRange", r"is forbidden: .*(maximum|minimum) .* per (Container|Pod)"),
    ("Forbidden", r"pods? \S+ is forbidden"),
)
"""Reasons in messages of Argo's nodes, for pods that are gone or that were never made."""


def ending_of_pod(pod: dict[str, Any]) -> PodEnding:
    """Return how a pod ended, or why it waits."""
    status = pod.get("status", {})
    ending, code, started, ended, waiting, own = None, None, "", "", ("", ""), ("", "")
    statuses = [*status.get("initContainerStatuses", []), *status.get("containerStatuses", [])]
    # The main container comes last, so that it has the last word.
    for container in sorted(statuses, key=lambda each: each["name"] == "main"):
        state = container.get("state", {})
        terminated = state.get("terminated") or {}
        waits = state.get("waiting") or {}
        if waits.get("reason") not in (None, "PodInitializing", "ContainerCreating"):
            waiting = (waits["reason"], waits.get("message", ""))
        if container["name"] == "main":
            started = terminated.get("startedAt") or state.get("running", {}).get("startedAt") or ""
            ended = terminated.get("finishedAt") or ""
        if terminated.get("exitCode", 0) != 0 or container["name"] == "main":
            ending = decode(terminated.get("message")) or ending
        if terminated.get("exitCode", 0) != 0:
            code = terminated["exitCode"]
            text = "" if decode(terminated.get("message")) else terminated.get("message", "")
            reason = terminated.get("reason", "Error")
            if reason == OUT_OF_MEMORY:
                text = _memory_limit(pod, container["name"])
            own = (reason, text)
    if waiting[0] and not code:
        # Without its image, a pod ends only by its deadline; the image is the cause.
        return PodEnding(waiting[0], None, waiting[1], None, started, ended)
    disrupted = next((c for c in _conditions(status, "DisruptionTarget", "True")), {})
    unscheduled = next((c for c in _conditions(status, "PodScheduled", "False")), {})
    whole = (status.get("reason", ""), status.get("message", ""))
    reasons = [whole, (disrupted.get("reason", ""), disrupted.get("message", "")), own]
    reasons.append((unscheduled.get("reason", ""), unscheduled.get("message", "")))
    reason, message = next((pair for pair in reasons if pair[0]), ("", ""))
    return PodEnding(reason, code, message, ending, started, ended)


def ending_of_message(message: str) -> PodEnding:
    """Return how a pod ended according to the message of Argo's node.

    For a container that ended, Argo writes `main: OOMKilled (exit code 137): TERMINATION MESSAGE`.
    """
    match = re.match(r"[\w-]+: (\w+) \(exit code (\d+)\)(?:: (.*))?$", message, re.DOTALL)
    if match is not None:
        ending = decode(match[3])
        return PodEnding(match[1], int(match[2]), "" if ending else match[3] or "", ending)
    match = re.match(r"[\w-]+: (\w+)(?:: (.*))?$", message, re.DOTALL)
    for reason, pattern in _MESSAGES:
        if re.search(pattern, message):
            return PodEnding(reason, None, message)
    if match is not None:
        return PodEnding(match[1], None, match[2] or "")
    return PodEnding("Error" if message else "", None, message)


def _memory_limit(pod: dict[str, Any], name: str) -> str:
    """Return the memory limit of a container as a short text; "" if it has none."""
    for container in pod.get("spec", {}).get("containers", []):
        if container["name"] == name:
            limit = container.get("resources", {}).get("limits", {}).get("memory")
            return f"memory limit {limit}" if limit else ""
    return ""


def _conditions(status: dict[str, Any], kind: str, value: str) -> list[dict[str, Any]]:
    return [
        condition
        for condition in status.get("conditions", [])
        if condition["type"] == kind and condition["status"] == value
    ]
