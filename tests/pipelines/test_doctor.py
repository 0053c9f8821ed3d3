"""doctor: each fault as Kubernetes shows it, read over HTTP, against what the person is told.

The server is tests/support/kube_server.py with the unmodified client. Conditions, states and
messages are worded as in the Kubernetes, Argo and Kueue sources; no cluster was there.
"""

import time
import uuid
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from tuneline.errors import ClusterError, CredentialsError
from tuneline.pipelines import kube
from tuneline.pipelines.cli.main import app
from tuneline.pipelines.doctor import Finding, examine

RUN = str(uuid.UUID(int=7))
POD = "line-abc-system-container-impl-42"


def put_pod(server: Any, step: str = "train", **status: Any) -> None:
    labels = {"pipeline/runid": RUN, "app.kubernetes.io/component": step}
    limits = {"limits": {"memory": "64Gi"}}
    server.put(
        "pods",
        POD,
        metadata={"labels": labels},
        spec={"containers": [{"name": "wait"}, {"name": "main", "resources": limits}]},
        status={"phase": "Failed", **status},
    )


def main_state(**state: Any) -> dict[str, Any]:
    common = {"name": "main", "image": "tuneline/train:0.1.0", "imageID": "", "ready": False}
    return {"containerStatuses": [{**common, "restartCount": 0, "state": state}]}


def exited(code: int, reason: str = "Error") -> dict[str, Any]:
    return main_state(terminated={"exitCode": code, "reason": reason})


def condition(kind: str, status: str, reason: str, message: str = "") -> dict[str, Any]:
    return {
        "conditions": [{"type": kind, "status": status, "reason": reason, "message": message,
                        "lastTransitionTime": "2026-11-24T03:00:00Z"}]
    }  # fmt: skip


UNSCHEDULABLE = (
    "0/4 nodes are available: 1 Insufficient nvidia.com/gpu, 3 node(s) didn't match Pod's node "
    "affinity/selector."
)

# What is seen: status of the pod, and its log. What is told: cause, a part of the evidence, a part
# of the advice.
FAULTS: dict[str, tuple[dict[str, Any], str | None, str, str, str]] = {
    "killed for memory": (
        exited(137, "OOMKilled"), None,
        "host memory", "OOMKilled, memory limit 64Gi", "more memory",
    ),
    "evicted for its disk": (
        {"reason": "Evicted", "message": "Pod ephemeral local storage usage exceeds the total "
                                         "limit of containers 200Gi."}, None,
        "disk", "limit of containers 200Gi", "larger volume",
    ),
    "evicted for the node's memory": (
        {"reason": "Evicted", "message": "The node was low on resource: memory."}, None,
        "evicted", "low on resource: memory", "Run the recipe again",
    ),
    "preempted": (
        condition("DisruptionTarget", "True", "PreemptionByScheduler",
                  "default-scheduler: preempting to accommodate a higher priority pod"), None,
        "evicted", "PreemptionByScheduler", "Run the recipe again",
    ),
    "no node fits": (
        {"phase": "Pending",
         **condition("PodScheduled", "False", "Unschedulable", UNSCHEDULABLE)}, None,
        "unschedulable", "1 Insufficient nvidia.com/gpu", "placement.num_accelerators",
    ),
    "waits in its queue": (
        {"phase": "Pending", **condition("PodScheduled", "False", "SchedulingGated")}, None,
        "queued", "2026-11-24 03:00:00", "Kueue admits the pod",
    ),
    "image not found": (
        {"phase": "Pending", **main_state(waiting={"reason": "ImagePullBackOff",
                                                   "message": "Back-off pulling image"})}, None,
        "image", "Back-off pulling image", "make images",
    ),
    "secret missing": (
        {"phase": "Pending", **main_state(waiting={
            "reason": "CreateContainerConfigError", "message": 'secret "wandb" not found'})}, None,
        "container config", 'secret "wandb" not found', "Create the secret",
    ),
    "too slow": (
        {"reason": "DeadlineExceeded",
         "message": "Pod was active on the node longer than the specified deadline"}, None,
        "timeout", "longer than the specified deadline", "time limit",
    ),
    "bad rows": (
        exited(2), "INFO tuneline: started\nprepare: DataError: 31 of 90 rows were rejected\n",
        "DataError", "31 of 90 rows were rejected", "run the recipe again",
    ),
    "GPU memory": (
        exited(1), "step 12\ntorch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB\n",
        "gpu memory", "Tried to allocate 2 GiB", "micro_batch_size",
    ),
    "NCCL": (
        exited(1), "x\n[rank1]: Watchdog caught collective operation timeout: WorkNCCL(SeqNum=9)\n",
        "nccl", "Watchdog caught collective", "shared_memory",
    ),
    "killed without a word": (
        exited(137), None, "host memory", "exit code 137, and no log is left", "more memory",
    ),
    "log with a token": (
        exited(1), "401 Unauthorized for hf_abcdefghijklmnopqrstuvwxyz01234567\n",
        "token", "401 Unauthorized for", "HF_TOKEN",
    ),
    "nothing known": (
        exited(3), "a line\n", "unknown", "exit code 3", "last lines",
    ),
}  # fmt: skip


def look() -> list[Finding]:
    return examine(kube.Kube("kubeflow"), RUN)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_told_with_cause_evidence_and_change(kube_server: Any, fault: str) -> None:
    status, log, cause, evidence, advice = FAULTS[fault]
    put_pod(kube_server, **status)
    if log is not None:
        kube_server.logs[POD, "main"] = log
    (found,) = look()
    assert (found.step, found.cause) == ("train", cause)
    assert evidence in found.evidence
    assert advice.lower() in found.advice.lower()
    assert "hf_abcdefghijklmnop" not in found.evidence + found.why


def test_the_events_say_more_of_an_image(kube_server: Any) -> None:
    put_pod(kube_server, phase="Pending", **main_state(waiting={"reason": "ErrImagePull"}))
    said = 'Failed to pull image "r/train:9": manifest unknown'
    kube_server.put("events", "e", involvedObject={"name": POD}, message=said)
    (found,) = look()
    assert found.evidence == said


def test_a_quota_leaves_no_pod_but_a_message(kube_server: Any) -> None:
    said = (
        'pods "x" is forbidden: exceeded quota: tuneline, requested: requests.nvidia.com/gpu=1, '
        "used: requests.nvidia.com/gpu=8, limited: requests.nvidia.com/gpu=8"
    )
    nodes = {"a": {"displayName": "train", "phase": "Error", "message": said},
             "b": {"displayName": "fetch", "phase": "Succeeded"}}  # fmt: skip
    labels = {"pipeline/runid": RUN}
    kube_server.put("workflows", "line-abc", metadata={"labels": labels}, status={"nodes": nodes})
    (found,) = look()
    assert (found.step, found.cause, found.evidence) == ("train", "quota", said)
    # People on Kubeflow often may not see workflows: then the pods have to do.
    kube_server.forbidden.add("list workflows")
    assert look() == []


def put_job(server: Any, **parts: Any) -> None:
    labels = {"pipeline/runid": RUN, "kueue.x-k8s.io/queue-name": "team"}
    beat = {"tuneline.dev/heartbeat": parts.pop("beat", "2026-01-01T00:00:00Z")}
    metadata = {"labels": labels, "annotations": beat}
    server.put("trainjobs", "tuneline-train-1", metadata=metadata, **parts)


def test_a_trainjob_that_waits_in_its_queue(kube_server: Any) -> None:
    put_job(kube_server, status=condition("Suspended", "True", "Suspended", "no quota"))
    (found,) = look()
    assert (found.step, found.cause) == ("train", "queued")
    assert found.evidence == (
        "trainjob tuneline-train-1, LocalQueue team, since 2026-11-24T03:00:00Z"
    )


def test_a_trainjob_that_nobody_looks_after(kube_server: Any) -> None:
    put_job(kube_server)
    (found,) = look()
    assert found.cause == "orphan"
    assert "last heartbeat at 2026-01-01T00:00:00Z" in found.evidence
    put_job(kube_server, beat=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))
    assert look() == []
    put_job(kube_server, status=condition("Complete", "True", "JobsCompleted"))
    assert look() == []


def test_the_pods_of_a_trainjob_are_looked_at(kube_server: Any) -> None:
    put_job(kube_server, status=condition("Failed", "True", "JobsFailed", "a job failed"))
    said = "x\n[rank9]: Watchdog caught collective operation timeout: WorkNCCL(SeqNum=9)\n"
    ended = {"terminated": {"exitCode": 1, "reason": "Error"}}
    state = {"name": "node", "image": "i", "imageID": "", "ready": False, "restartCount": 0}
    labels = {"jobset.sigs.k8s.io/jobset-name": "tuneline-train-1",
              "app.kubernetes.io/component": "train-node"}  # fmt: skip
    kube_server.put(
        "pods",
        "tuneline-train-1-node-0-1-x",
        metadata={"labels": labels},
        spec={"containers": [{"name": "node"}]},
        status={"phase": "Failed", "containerStatuses": [{**state, "state": ended}]},
    )
    kube_server.logs["tuneline-train-1-node-0-1-x", "node"] = said
    (found,) = look()
    assert (found.step, found.cause) == ("train-node", "nccl")
    kube_server.forbidden.add("list trainjobs")
    assert look() == []


def test_a_gate_that_held_is_no_failure(kube_server: Any) -> None:
    put_pod(kube_server, "gate", phase="Succeeded")
    log = "INFO tuneline.gate.run: hold: arc_easy got worse by 0.031\n"
    kube_server.logs[POD, "main"] = log
    (found,) = look()
    assert (found.cause, found.evidence) == ("gate held", "hold: arc_easy got worse by 0.031")
    kube_server.logs[POD, "main"] = "INFO tuneline.gate.run: promote: better\n"
    assert look() == []


def test_only_the_runs_own_pods_are_looked_at(kube_server: Any) -> None:
    put_pod(kube_server, **exited(137, "OOMKilled"))
    assert examine(kube.Kube("kubeflow"), str(uuid.UUID(int=8))) == []
    assert examine(kube.Kube("elsewhere"), RUN) == []


def test_a_right_that_is_missing_is_named(kube_server: Any) -> None:
    kube_server.forbidden.add("list pods")
    with pytest.raises(CredentialsError, match="refuses to show pods in namespace kubeflow"):
        look()


def test_an_api_that_is_away(kube_server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kube, "BACKOFF_SECONDS", 0.001)
    put_pod(kube_server, **exited(137, "OOMKilled"))
    kube_server.down = 4
    assert [found.cause for found in look()] == ["host memory"]
    kube_server.down = 99
    with pytest.raises(ClusterError, match="answered 503 when asked for pods"):
        look()


def tuneline(*arguments: str) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, arguments)


def test_the_command_takes_an_id_or_a_name(kube_server: Any, kfp_server: Any) -> None:
    put_pod(kube_server, **exited(137, "OOMKilled"))
    kfp_server.runs[RUN] = {"run_id": RUN, "display_name": "nightly", "state": "FAILED"}
    for name in (RUN, "nightly"):
        done = tuneline("doctor", name)
        assert done.exit_code == 0, done.output
        assert done.output.startswith("train: host memory\n  why: ")
        assert "  seen: container main: OOMKilled, memory limit 64Gi\n" in done.output
    kube_server.objects.clear()
    assert f"nothing wrong was found with run {RUN}" in tuneline("doctor", RUN).output
