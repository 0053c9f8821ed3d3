"""How a pod of KFP ended or why it does not start, from its status or from Argo's message."""

import re
from dataclasses import dataclass
from typing import Any

from tuneline.runtime.termination import Ending, decode

POD_DELETED = "PodDeleted"
"""Reason of an attempt whose pod was deleted: drained, preempted, or its node was lost."""

DEADLINE = "DeadlineExceeded"
"""Reason of a pod that reached its time limit."""
OUT_OF_MEMORY = "OOMKilled"
"""Reason of a container of which a process was killed at the memory limit."""
MEMORY_LIMIT = "memory limit "
"""Start of the message of a container that was killed at its memory limit; the limit follows."""
RUN_STOPPED = "RunStopped"
"""Reason of a pod that Argo removed before it ran, because the whole run was stopped."""
NOT_STARTED = "ContainerNotStarted"
"""Reason of a pod that reached its deadline before its main container had started."""
STARTING = ("PodInitializing", "ContainerCreating")
"""Reasons of containers that wait for nothing unusual."""
IMAGE_REASONS = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull")
"""Reasons of containers whose image cannot be pulled."""
CONFIG_REASONS = ("CreateContainerConfigError", "CreateContainerError", "RunContainerError")
"""Reasons of containers that cannot be created, e.g. because a secret is missing."""


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
    (RUN_STOPPED, r"^Step exceeded its deadline$|exceeded workflow deadline|workflow shutdown"),
    (DEADLINE, r"active on the node longer than the specified deadline"),
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
    statuses = [*status.get("initContainerStatuses", []), *status.get("containerStatuses", [])]
    states = {each["name"]: each.get("state", {}) for each in statuses}
    main = states.get("main", {})
    ended = main.get("terminated") or {}
    started = ended.get("startedAt") or main.get("running", {}).get("startedAt") or ""
    waiting = [state["waiting"] for state in states.values() if state.get("waiting")]
    unusual = next((each for each in waiting if each.get("reason") not in STARTING), None)
    if unusual is not None:
        return PodEnding(unusual.get("reason", ""), None, unusual.get("message", ""))
    if status.get("reason") == DEADLINE and not started:
        return PodEnding(NOT_STARTED, None, f"image {_container(pod).get('image', '')}")
    # The main container has the last word, also if another one failed.
    failed = [state["terminated"] for state in states.values() if _has_failed(state)]
    last = ended if _has_failed(main) else failed[-1] if failed else {}
    code, ending = last.get("exitCode"), decode(ended.get("message"))
    text = "" if ending else last.get("message", "")
    if last.get("reason") == OUT_OF_MEMORY:
        limit = _container(pod).get("resources", {}).get("limits", {}).get("memory")
        text = f"{MEMORY_LIMIT}{limit}" if limit else ""
    known = [
        status,
        *_conditions(status, "DisruptionTarget", "True"),
        {"reason": last.get("reason", ""), "message": text},
        *_conditions(status, "PodScheduled", "False"),
    ]
    if status.get("reason") == DEADLINE:
        seconds = pod.get("spec", {}).get("activeDeadlineSeconds", 0)
        limit = f"{seconds} s" if seconds < 3600 else f"{seconds / 3600:g} h"
        known[0] = {**status, "message": f"{status.get('message', '')} ({limit})"}
    first: dict[str, Any] = next((each for each in known if each.get("reason")), {})
    return PodEnding(
        first.get("reason", ""),
        code,
        first.get("message", ""),
        ending,
        started,
        ended.get("finishedAt") or "",
    )


def ending_of_message(message: str) -> PodEnding:
    """Return how a pod ended according to the message of Argo's node.

    For a container that ended, Argo writes `main: OOMKilled (exit code 137): TERMINATION MESSAGE`.
    """
    match = re.match(r"[\w-]+: (\w+) \(exit code (\d+)\)(?:: (.*))?$", message, re.DOTALL)
    if match is not None:
        ending = decode(match[3])
        return PodEnding(match[1], int(match[2]), "" if ending else match[3] or "", ending)
    if message in STARTING:
        return PodEnding()
    for reason, pattern in _MESSAGES:
        if re.search(pattern, message):
            return PodEnding(reason, None, re.sub(r"^pods? \S+ is forbidden: ", "", message))
    # A container that waits: `main: ImagePullBackOff: Back-off pulling image ...`.
    match = re.match(r"(?:[\w-]+: )?([A-Z][a-z]+[A-Z]\w+)(?:: (.*))?$", message, re.DOTALL)
    if match is not None:
        return PodEnding(match[1], None, match[2] or "")
    return PodEnding("Error" if message else "", None, message)


def _container(pod: dict[str, Any]) -> dict[str, Any]:
    """Return the specification of the main container."""
    containers: list[dict[str, Any]] = pod.get("spec", {}).get("containers", [])
    return next((each for each in containers if each["name"] == "main"), {})


def _has_failed(state: dict[str, Any]) -> bool:
    return bool((state.get("terminated") or {}).get("exitCode"))


def _conditions(status: dict[str, Any], kind: str, value: str) -> list[dict[str, Any]]:
    return [
        condition
        for condition in status.get("conditions", [])
        if condition["type"] == kind and condition["status"] == value
    ]
