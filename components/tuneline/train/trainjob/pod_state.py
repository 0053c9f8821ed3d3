"""What befell a job's pod, or keeps it from starting, as Kubernetes' own objects say it."""

from typing import Any

IMAGE_REASONS = ("ImagePullBackOff", "ErrImagePull", "InvalidImageName")
CONFIG_REASON = "CreateContainerConfigError"


def disruption(pod: Any) -> str | None:
    """Say why the cluster took the pod away: a drain, a preemption, a node that is gone."""
    for each in pod.status.conditions or []:
        if each.type == "DisruptionTarget" and each.status == "True":
            return str(each.reason)
    return None


def memory_kill(pod: Any) -> str | None:
    """Return the memory limit of a container that was killed for reaching it."""
    for state in pod.status.container_statuses or []:
        if state.state.terminated and state.state.terminated.reason == "OOMKilled":
            for container in pod.spec.containers:
                if container.name == state.name and container.resources:
                    return (container.resources.limits or {}).get("memory", "not set")
            return "not set"
    return None


def obstacle(pod: Any) -> tuple[str, str] | None:
    """Return the reason, and the words for it, why a pod has not started; None: nothing is said."""
    for state in pod.status.container_statuses or []:
        waiting = state.state.waiting
        if waiting and waiting.reason in (*IMAGE_REASONS, CONFIG_REASON):
            return waiting.reason, f"{waiting.reason}: {waiting.message or 'no message'}"
    for each in pod.status.conditions or []:
        if each.type == "PodScheduled" and each.status == "False":
            return str(each.reason), f"{each.reason}: {each.message or 'no message'}"
    return None
