"""Explain a TrainJob that failed, waits, or has lost its launcher."""

import datetime
from collections.abc import Iterator
from typing import Any

from tuneline.errors import ClusterError, CredentialsError
from tuneline.pipelines.doctor.finding import FAILED, ORPHAN, QUEUED, Finding, explained, finding
from tuneline.pipelines.doctor.log_errors import find_error
from tuneline.pipelines.kube import Kube
from tuneline.pods import QUEUE_LABEL, RUN_LABEL
from tuneline.runtime.failures.causes import find_cause
from tuneline.runtime.kfp_run import Attempt
from tuneline.runtime.kubernetes_client import true_conditions
from tuneline.runtime.pod_ending import ending_of_pod
from tuneline.train.trainjob.client import JOBSET_LABEL
from tuneline.train.trainjob.manifest import CONTAINER, HEARTBEAT

ORPHAN_SECONDS = 600.0
"""Age of the last heartbeat from which the launcher of a TrainJob counts as lost."""


def examine_trainjobs(kube: Kube, run_id: str) -> list[Finding]:
    """Return the problems of a run's TrainJobs; none if they may not be listed."""
    try:
        jobs = kube.trainjobs(f"{RUN_LABEL}={run_id}")
    except (CredentialsError, ClusterError):
        return []
    return [found for job in jobs for found in _examine(kube, job)]


def _examine(kube: Kube, job: dict[str, Any]) -> Iterator[Finding]:
    now = true_conditions(job)
    name = job["metadata"]["name"]
    if "Complete" in now:
        return
    if "Failed" in now:
        parts = filter(None, (now["Failed"].get(key) for key in ("reason", "message")))
        message = f"trainjob {name}: {': '.join(parts)}"
        yield _of_pods(kube, name) or finding("train", find_cause(message) or FAILED, message)
    elif "Suspended" in now:
        queue = job["metadata"].get("labels", {}).get(QUEUE_LABEL, "unknown")
        since = now["Suspended"].get("lastTransitionTime")
        yield finding("train", QUEUED, f"trainjob {name}, LocalQueue {queue}, since {since}")
    else:
        beat = job["metadata"].get("annotations", {}).get(HEARTBEAT)
        if beat and _age_seconds(beat) > ORPHAN_SECONDS:
            yield finding("train", ORPHAN, f"trainjob {name}, last heartbeat at {beat}")


def _age_seconds(time: str) -> float:
    then = datetime.datetime.fromisoformat(time)
    return (datetime.datetime.now(datetime.UTC) - then).total_seconds()


def _of_pods(kube: Kube, name: str) -> Finding | None:
    """Return why the first pod of a failed TrainJob failed; None if no pod tells."""
    for pod in kube.pods(f"{JOBSET_LABEL}={name}"):
        if pod.get("status", {}).get("phase") != "Failed":
            continue
        ending = ending_of_pod(pod)
        pod_name = pod["metadata"]["name"]
        attempt = Attempt(
            step="train",
            state="failed",
            pod=pod_name,
            reason=ending.reason,
            exit_code=ending.exit_code,
            message=ending.message,
            ending=ending.ending,
        )
        log = kube.log(pod_name, CONTAINER)
        found = find_error("train", log) if log and ending.reason in ("", "Error") else None
        return found or explained(attempt)
    return None
