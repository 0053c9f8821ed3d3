"""Explain a failed or waiting run from its pods: cause, evidence, what to change.

Of each pod, the first problem found is reported. The sources are examined in this order: the pod's
conditions and container states, which show what the cluster did to the pod; the pod's events; the
end of the pod's log, which shows what the step reported. For deleted pods, the messages of the Argo
workflow are used.
"""

import datetime
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tuneline.pipelines.kube import Kube, Refused
from tuneline.pipelines.lint.secrets import mask_within
from tuneline.pods import QUEUE_LABEL, RUN_LABEL, STEP_LABEL
from tuneline.runtime.causes import CAUSES, OWN_ERRORS, RUN_AGAIN, Cause, find_cause
from tuneline.train.trainjob.client import JOBSET_LABEL
from tuneline.train.trainjob.manifest import CONTAINER as NODE
from tuneline.train.trainjob.manifest import HEARTBEAT

NODE_ANNOTATION = "workflows.argoproj.io/node-name"
CONTAINERS = ("main", NODE)
"""Names of the container that runs a step: in a pod of KFP, and in a pod of a TrainJob."""
ORPHAN_SECONDS = 600.0
"""Age of the last heartbeat from which the launcher of a TrainJob counts as lost."""
FAILED_PHASES = ("Failed", "Error")

_BY_NAME = {cause.name: cause for cause in CAUSES}
_QUOTA = Cause(
    "quota",
    "exceeded quota",
    "The namespace's quota is used up.",
    "Wait for other runs to end, request less in placement, or have the quota raised; `kubectl "
    "describe resourcequota` shows the current use.",
)
_QUEUED = Cause(
    "queued",
    "",
    "The pod is waiting in its queue; nothing is wrong.",
    "Wait: Kueue admits the pod when capacity is free. `kubectl get workloads` shows its position.",
)
_CONFIG = Cause(
    "container config",
    "",
    "The pod refers to a secret or config map that does not exist in the namespace.",
    "Create the secret or config map that the evidence names, or remove it from placement.",
)
_ORPHAN = Cause(
    "orphan",
    "",
    "The TrainJob has lost its launcher but still occupies its GPUs.",
    "Run `kubectl delete trainjob NAME`, unless its launcher is about to restart; the next run "
    "resumes from the checkpoint.",
)
_HELD = Cause(
    "gate held",
    "",
    "Nothing failed: the gate held the model, so it was not published.",
    "The table of scores in the report shows which task did not improve or got worse. Train on "
    "more or better data, or change gate.max_regression or gate.target_tasks.",
)
_NCCL = Cause(
    "nccl",
    r"nccl (error|timeout|watchdog)|ncclsystemerror|ncclinternalerror|watchdog caught collective",
    "The GPUs lost their connection to each other.",
    "Set a larger placement.shared_memory. If the error returns, look for an earlier error of "
    "another rank, and for a GPU that reports errors (nvidia-smi -q).",
)


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


def examine(kube: Kube, run_id: str) -> list[Finding]:
    """Return the problems of a run and the reasons why it waits; an empty list if there are none.

    Raises:
        ClusterError: the cluster is unreachable.
        CredentialsError: these credentials may not list pods.
    """
    selector = f"{RUN_LABEL}={run_id}"
    pods = kube.pods(selector)
    jobs = _trainjobs(kube, selector)
    for job in jobs:
        names = {pod.metadata.name for pod in pods}
        job_pods = kube.pods(f"{JOBSET_LABEL}={job['metadata']['name']}")
        pods += [pod for pod in job_pods if pod.metadata.name not in names]
    findings = [finding for pod in pods for finding in _examine_pod(kube, pod)]
    findings += [finding for job in jobs for finding in _examine_job(job)]
    evidence = {finding.evidence for finding in findings}
    steps = {finding.step for finding in findings}
    for step, message in _workflow_messages(kube, selector):
        if step not in steps and message not in evidence:
            findings += _from_text(step, message)
    if not findings:
        findings += [finding for pod in pods for finding in _gate_verdict(kube, pod)]
    return findings


def _examine_pod(kube: Kube, pod: Any) -> Iterator[Finding]:
    status = pod.status
    if status.phase == "Succeeded":
        return
    step = _step_of(pod)
    conditions = {condition.type: condition for condition in status.conditions or []}
    states = [state for state in status.container_statuses or [] if state.name in CONTAINERS]
    container = states[0].name if states else CONTAINERS[0]
    ended = next((state.state.terminated for state in states if state.state.terminated), None)
    waiting = next((state.state.waiting for state in states if state.state.waiting), None)
    disrupted, scheduled = conditions.get("DisruptionTarget"), conditions.get("PodScheduled")
    if ended and ended.reason == "OOMKilled":
        resources = next(
            (spec.resources for spec in pod.spec.containers if spec.name == container), None
        )
        limit = ((resources and resources.limits) or {}).get("memory", "not set")
        message = f"container {container}: OOMKilled, memory limit {limit}"
        yield _finding(step, _BY_NAME["host memory"], message)
    elif status.reason == "Evicted" or disrupted:
        message = status.message or (disrupted and f"{disrupted.reason}: {disrupted.message}") or ""
        is_disk = re.search(_BY_NAME["disk"].pattern, message, re.I)
        yield _finding(step, _BY_NAME["disk" if is_disk else "evicted"], message or "Evicted")
    elif status.reason == "DeadlineExceeded":
        yield _finding(step, _BY_NAME["timeout"], status.message or status.reason)
    elif scheduled and scheduled.status == "False":
        if scheduled.reason == "SchedulingGated":
            queue = (pod.metadata.labels or {}).get(QUEUE_LABEL, "unknown")
            yield _finding(
                step, _QUEUED, f"LocalQueue {queue}, since {scheduled.last_transition_time}"
            )
        else:
            yield _finding(step, _BY_NAME["unschedulable"], scheduled.message or scheduled.reason)
    elif waiting and waiting.reason in ("ImagePullBackOff", "ErrImagePull", "InvalidImageName"):
        messages = [event.message or "" for event in kube.events(pod.metadata.name)]
        about_image = [message for message in messages if "image" in message]
        message = about_image[-1] if about_image else waiting.message or waiting.reason
        yield _finding(step, _BY_NAME["image"], message)
    elif waiting and waiting.reason == "CreateContainerConfigError":
        yield _finding(step, _CONFIG, waiting.message or waiting.reason)
    elif status.phase in FAILED_PHASES and ended:
        yield from _from_log(kube, pod, container, step, ended)


def _from_log(kube: Kube, pod: Any, container: str, step: str, ended: Any) -> Iterator[Finding]:
    text = kube.log(pod.metadata.name, container)
    own_errors = re.findall(rf"^\S+: ({'|'.join(OWN_ERRORS)}): (.+)$", text, re.M)
    if own_errors:
        kind, message = own_errors[-1]
        evidence = mask_within(f"{kind}: {message}")
        yield Finding(step, kind, mask_within(message), evidence, RUN_AGAIN)
        return
    findings = _from_text(step, text) if text else []
    if findings:
        yield from findings
        return
    evidence = f"exit code {ended.exit_code}{'' if text else ', and no log is left'}"
    why, advice = "The step exited with an error.", "Read the last lines of its log."
    yield from _from_text(step, evidence) or [Finding(step, "unknown", why, evidence, advice)]


def _from_text(step: str, text: str) -> list[Finding]:
    """Explain a message or a log; the evidence is the last line that matches the cause."""
    special = (cause for cause in (_QUOTA, _NCCL) if re.search(cause.pattern, text, re.I))
    cause = next(special, None) or find_cause(text)
    if cause is None:
        return []
    lines = [line for line in text.splitlines() if re.search(cause.pattern, line, re.I)]
    return [_finding(step, cause, lines[-1] if lines else text)]


def _trainjobs(kube: Kube, selector: str) -> list[dict[str, Any]]:
    try:
        return kube.trainjobs(selector)
    except Refused:
        return []


def _examine_job(job: dict[str, Any]) -> Iterator[Finding]:
    conditions = job.get("status", {}).get("conditions", [])
    now = {cond["type"]: cond for cond in conditions if cond["status"] == "True"}
    name = job["metadata"]["name"]
    if "Complete" in now:
        return
    if "Failed" in now:
        parts = filter(None, (now["Failed"].get(key) for key in ("reason", "message")))
        yield from _from_text("train", f"trainjob {name}: {': '.join(parts)}")
        return
    if "Suspended" in now:
        queue = job["metadata"].get("labels", {}).get(QUEUE_LABEL, "unknown")
        since = now["Suspended"].get("lastTransitionTime")
        yield _finding("train", _QUEUED, f"trainjob {name}, LocalQueue {queue}, since {since}")
        return
    heartbeat = job["metadata"].get("annotations", {}).get(HEARTBEAT)
    if heartbeat and _age_seconds(heartbeat) > ORPHAN_SECONDS:
        yield _finding("train", _ORPHAN, f"trainjob {name}, last heartbeat at {heartbeat}")


def _age_seconds(time: str) -> float:
    then = datetime.datetime.fromisoformat(time)
    return (datetime.datetime.now(datetime.UTC) - then).total_seconds()


def _workflow_messages(kube: Kube, selector: str) -> list[tuple[str, str]]:
    """Return the step name and the message of each failed node of the Argo workflow."""
    try:
        workflows = kube.workflows(selector)
    except Refused:
        # On Kubeflow with profiles, users may often list pods but not workflows.
        return []
    return [
        (node.get("displayName", ""), " ".join(node["message"].split()))
        for workflow in workflows
        for node in workflow.get("status", {}).get("nodes", {}).values()
        if node.get("phase") in FAILED_PHASES and node.get("message")
    ]


def _gate_verdict(kube: Kube, pod: Any) -> Iterator[Finding]:
    """Yield a finding if this is the gate's pod and its verdict is to hold the model."""
    if _step_of(pod) == "gate" and pod.status.phase == "Succeeded":
        log = kube.log(pod.metadata.name, CONTAINERS[0])
        verdicts = re.findall(r"tuneline\.gate\.run: (hold: .+)$", log, re.M)
        if verdicts:
            yield _finding("gate", _HELD, verdicts[-1])


def _step_of(pod: Any) -> str:
    labels, annotations = pod.metadata.labels or {}, pod.metadata.annotations or {}
    return str(labels.get(STEP_LABEL) or annotations.get(NODE_ANNOTATION) or pod.metadata.name)


def _finding(step: str, cause: Cause, evidence: str) -> Finding:
    text = mask_within(" ".join(evidence.split()))
    return Finding(step, cause.name, cause.why, text[:400], cause.advice)
