"""Why a pod of a TrainJob failed or does not start, according to its Kubernetes status."""

from typing import Any

IMAGE_REASONS = ("ImagePullBackOff", "ErrImagePull", "InvalidImageName")
CONFIG_REASON = "CreateContainerConfigError"


def disruption(pod: Any) -> str | None:
    """Return why the cluster removed a pod, such as a drain; None if the pod was not removed."""
    for condition in pod.status.conditions or []:
        if condition.type == "DisruptionTarget" and condition.status == "True":
            return str(condition.reason)
    return None


def memory_kill(pod: Any) -> str | None:
    """Return the memory limit of a container that was killed for exceeding it, or None."""
    for status in pod.status.container_statuses or []:
        if status.state.terminated and status.state.terminated.reason == "OOMKilled":
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
        if waiting and waiting.reason in (*IMAGE_REASONS, CONFIG_REASON):
            return waiting.reason, f"{waiting.reason}: {waiting.message or 'no message'}"
    for condition in pod.status.conditions or []:
        if condition.type == "PodScheduled" and condition.status == "False":
            text = f"{condition.reason}: {condition.message or 'no message'}"
            return str(condition.reason), text
    return None
