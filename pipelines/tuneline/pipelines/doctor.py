"""Explain a failed run from what Kubernetes kept of it: cause, evidence, what to change.

Looked at in this order, and a pod's first fault is the one that is told: its conditions and
container states, which say what the cluster did to it; its events; the last lines of its log, which
say what the step itself ran into. Pods that are gone leave the workflow's own messages.
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
"""A step's own container, in its pod and in those of a TrainJob."""
ORPHAN_SECONDS = 600.0
"""A launcher that lives notes so more often."""
FAILED_PHASES = ("Failed", "Error")

_BY_NAME = {cause.name: cause for cause in CAUSES}
_QUOTA = Cause(
    "quota",
    "exceeded quota",
    "The namespace's quota is used up.",
    "Wait for other runs to end, ask for less in placement, or have the quota raised; `kubectl "
    "describe resourcequota` shows what is in use.",
)
_QUEUED = Cause(
    "queued",
    "",
    "The pod waits in its queue; nothing is wrong.",
    "Wait: Kueue lets it in when there is room. `kubectl get workloads` shows its place.",
)
_CONFIG = Cause(
    "container config",
    "",
    "The pod refers to something that is not in the namespace.",
    "Make the secret or config map that the evidence names, or take it out of placement.",
)
_ORPHAN = Cause(
    "orphan",
    "",
    "Nobody looks after the TrainJob, and its GPUs are in use.",
    "`kubectl delete trainjob NAME`, unless its launcher is about to come back; the next run goes "
    "on from the checkpoint.",
)
_HELD = Cause(
    "gate held",
    "",
    "Nothing failed: the gate held the model back, so it was not published.",
    "The report's table of scores says which task was not better, or got worse; more or better "
    "data, or gate.max_regression and gate.target_tasks, decide.",
)
_NCCL = Cause(
    "nccl",
    r"nccl (error|timeout|watchdog)|ncclsystemerror|ncclinternalerror|watchdog caught collective",
    "The GPUs lost touch with each other.",
    "Give the pod a larger placement.shared_memory; if it comes back look for another rank's "
    "error, which is often the first, and for a GPU with errors (nvidia-smi -q).",
)


@dataclass(frozen=True)
class Finding:
    """One fault of one step."""

    step: str
    cause: str
    why: str
    evidence: str
    advice: str


def examine(kube: Kube, run_id: str) -> list[Finding]:
    """Return what is wrong with a run, or has it wait; nothing where nothing is.

    Raises:
        ClusterError: the cluster cannot be reached.
        CredentialsError: it does not let these credentials see pods.
    """
    selector = f"{RUN_LABEL}={run_id}"
    pods = kube.pods(selector)
    jobs = _trainjobs(kube, selector)
    for job in jobs:
        known = {pod.metadata.name for pod in pods}
        of_job = kube.pods(f"{JOBSET_LABEL}={job['metadata']['name']}")
        pods += [pod for pod in of_job if pod.metadata.name not in known]
    findings = [found for pod in pods for found in _pod(kube, pod)]
    findings += [found for job in jobs for found in _job(job)]
    told = {found.evidence for found in findings}
    with_pod = {found.step for found in findings}
    for step, message in _messages(kube, selector):
        if step not in with_pod and message not in told:
            findings += _from_text(step, message)
    if not findings:
        findings += [found for pod in pods for found in _held(kube, pod)]
    return findings


def _pod(kube: Kube, pod: Any) -> Iterator[Finding]:
    status = pod.status
    if status.phase == "Succeeded":
        return
    step = _step(pod)
    conditions = {each.type: each for each in status.conditions or []}
    states = [each for each in status.container_statuses or [] if each.name in CONTAINERS]
    own = states[0].name if states else CONTAINERS[0]
    ended = next((each.state.terminated for each in states if each.state.terminated), None)
    waiting = next((each.state.waiting for each in states if each.state.waiting), None)
    disrupted, scheduled = conditions.get("DisruptionTarget"), conditions.get("PodScheduled")
    if ended and ended.reason == "OOMKilled":
        limits = next(
            (each.resources.limits or {} for each in pod.spec.containers if each.name == own), {}
        )
        words = f"container {own}: OOMKilled, memory limit {limits.get('memory', 'not set')}"
        yield _finding(step, _BY_NAME["host memory"], words)
    elif status.reason == "Evicted" or disrupted:
        words = status.message or (disrupted and f"{disrupted.reason}: {disrupted.message}") or ""
        full = re.search(_BY_NAME["disk"].pattern, words, re.I)
        yield _finding(step, _BY_NAME["disk" if full else "evicted"], words or "Evicted")
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
        said = [e.message for e in kube.events(pod.metadata.name) if "image" in (e.message or "")]
        words = said[-1] if said else waiting.message or waiting.reason
        yield _finding(step, _BY_NAME["image"], words)
    elif waiting and waiting.reason == "CreateContainerConfigError":
        yield _finding(step, _CONFIG, waiting.message or waiting.reason)
    elif status.phase in FAILED_PHASES and ended:
        yield from _from_log(kube, pod, own, step, ended)


def _from_log(kube: Kube, pod: Any, container: str, step: str, ended: Any) -> Iterator[Finding]:
    text = kube.log(pod.metadata.name, container)
    own = re.findall(rf"^\S+: ({'|'.join(OWN_ERRORS)}): (.+)$", text, re.M)
    if own:
        kind, message = own[-1]
        words = mask_within(f"{kind}: {message}")
        yield Finding(step, kind, mask_within(message), words, RUN_AGAIN)
        return
    found = list(_from_text(step, text)) if text else []
    if found:
        yield from found
        return
    words = f"exit code {ended.exit_code}{'' if text else ', and no log is left'}"
    yield from _from_text(step, words) or [
        Finding(step, "unknown", "The step ended by itself.", words, "Read its log's last lines.")
    ]


def _from_text(step: str, text: str) -> list[Finding]:
    """Explain a text; a long one is quoted by the line that gives the cause away."""
    special = next((each for each in (_QUOTA, _NCCL) if re.search(each.pattern, text, re.I)), None)
    cause = special or find_cause(text)
    if cause is None:
        return []
    lines = [line for line in text.splitlines() if re.search(cause.pattern, line, re.I)]
    return [_finding(step, cause, lines[-1] if lines else text)]


def _trainjobs(kube: Kube, selector: str) -> list[dict[str, Any]]:
    try:
        return kube.trainjobs(selector)
    except Refused:
        return []


def _job(job: dict[str, Any]) -> Iterator[Finding]:
    conditions = job.get("status", {}).get("conditions", [])
    now = {each["type"]: each for each in conditions if each["status"] == "True"}
    name = job["metadata"]["name"]
    if "Complete" in now:
        return
    if "Failed" in now:
        words = ": ".join(filter(None, (now["Failed"].get(key) for key in ("reason", "message"))))
        yield from _from_text("train", f"trainjob {name}: {words}")
        return
    if "Suspended" in now:
        queue = job["metadata"].get("labels", {}).get(QUEUE_LABEL, "unknown")
        since = now["Suspended"].get("lastTransitionTime")
        yield _finding("train", _QUEUED, f"trainjob {name}, LocalQueue {queue}, since {since}")
        return
    beat = job["metadata"].get("annotations", {}).get(HEARTBEAT)
    if beat and _age(beat) > ORPHAN_SECONDS:
        yield _finding("train", _ORPHAN, f"trainjob {name}, last looked after at {beat}")


def _age(moment: str) -> float:
    then = datetime.datetime.fromisoformat(moment)
    return (datetime.datetime.now(datetime.UTC) - then).total_seconds()


def _messages(kube: Kube, selector: str) -> list[tuple[str, str]]:
    """Return step and message of the workflow's failed nodes."""
    try:
        workflows = kube.workflows(selector)
    except Refused:
        # Pods say more; on Kubeflow with profiles people often see nothing else.
        return []
    return [
        (node.get("displayName", ""), " ".join(node["message"].split()))
        for workflow in workflows
        for node in workflow.get("status", {}).get("nodes", {}).values()
        if node.get("phase") in FAILED_PHASES and node.get("message")
    ]


def _held(kube: Kube, pod: Any) -> Iterator[Finding]:
    if _step(pod) == "gate" and pod.status.phase == "Succeeded":
        said = re.findall(
            r"tuneline\.gate\.run: (hold: .+)$", kube.log(pod.metadata.name, CONTAINERS[0]), re.M
        )
        if said:
            yield _finding("gate", _HELD, said[-1])


def _step(pod: Any) -> str:
    labels, annotations = pod.metadata.labels or {}, pod.metadata.annotations or {}
    return labels.get(STEP_LABEL) or annotations.get(NODE_ANNOTATION) or pod.metadata.name


def _finding(step: str, cause: Cause, evidence: str) -> Finding:
    text = mask_within(" ".join(evidence.split()))
    return Finding(step, cause.name, cause.why, text[:400], cause.advice)
