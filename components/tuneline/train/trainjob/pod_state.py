"""Why a pod of a TrainJob failed, does not start, or was not created.

The answers are in the status of a pod, and in events about the objects from which pods are made.
"""

import datetime
import re
from collections.abc import Iterable
from typing import Any

from tuneline.placement import quantity_value
from tuneline.runtime.pod_ending import CONFIG_REASONS, IMAGE_REASONS

STUCK_REASONS = (*IMAGE_REASONS, *CONFIG_REASONS)
"""Reasons of a container that occupies its GPUs but does not start."""
REFUSALS = {
    "TrainJob": "TrainJobResourcesCreationFailed",
    "JobSet": "JobCreationFailed",
    "Job": "FailedCreate",
}
"""Reason of the event which says that Kubernetes refused to create a part of an object, by the
object's kind: Trainer creates a JobSet, JobSet a Job, and Kubernetes the pods."""


def disruption(pod: Any) -> str | None:
    """Return why the cluster removed a pod, such as a drain; None if the pod was not removed."""
    for condition in pod.status.conditions or []:
        if condition.type == "DisruptionTarget" and condition.status == "True":
            return str(condition.reason)
    return None


def memory_kill(pod: Any) -> str | None:
    """Return the memory limit of a container that was killed for exceeding it, or None."""
    for status in pod.status.container_statuses or []:
        # The last state, if the runtime lets a container restart.
        ends = [state.terminated for state in (status.state, status.last_state) if state]
        if any(end and end.reason == "OOMKilled" for end in ends):
            for container in pod.spec.containers:
                if container.name == status.name and container.resources:
                    return str((container.resources.limits or {}).get("memory", "not set"))
            return "not set"
    return None


def obstacle(pod: Any) -> tuple[str, str] | None:
    """Return why a pod has not started, as a reason and a text; None if its status has no reason.

    The text contains the reason and the message of Kubernetes.
    """
    for status in pod.status.container_statuses or []:
        waiting = status.state.waiting
        if waiting and waiting.reason in STUCK_REASONS:
            return waiting.reason, f"{waiting.reason}: {waiting.message or 'no message'}"
    for condition in pod.status.conditions or []:
        if condition.type == "PodScheduled" and condition.status == "False":
            text = f"{condition.reason}: {condition.message or 'no message'}"
            return str(condition.reason), text
    return None


def refusal(events: Iterable[Any], name: str) -> str | None:
    """Return why Kubernetes last refused to create a part of a TrainJob, or None.

    Args:
        events: Events of the namespace.
        name: Name of the TrainJob, which is also that of its JobSet, and begins that of its Jobs.
    """
    found = [
        event
        for event in events
        if REFUSALS.get(event.involved_object.kind) == event.reason
        and (event.involved_object.name + "-").startswith(f"{name}-")
    ]
    if not found:
        return None
    message = str(max(found, key=_time_of).message)
    return " ".join(message.rpartition(" is forbidden: ")[2].split())


def exceeds_whole_quota(text: str) -> bool:
    """Return whether a refusal says that more is requested than the quota allows in total."""
    amounts = [
        dict(re.findall(r"([\w./-]+)=([0-9.]+[A-Za-z]*)", part))
        for part in re.findall(r"(?:requested|limited): ([^:]*)(?:, used|$)", text)
    ]
    if len(amounts) != 2:
        return False
    requested, limited = amounts
    return any(
        key in limited and quantity_value(amount) > quantity_value(limited[key])
        for key, amount in requested.items()
    )


def _time_of(event: Any) -> datetime.datetime:
    time: datetime.datetime = (
        event.last_timestamp or event.event_time or event.metadata.creation_timestamp
    )
    return time
