"""doctor: each fault as Kubernetes and KFP show it, read over HTTP, and what the person is told.

The servers are those of tests/support with the unmodified clients. The runs of RECORDED are those
of a real cluster (tests/support/kfp_runs.py). What is in FAULTS did not happen there: conditions,
states and messages are worded as in the Kubernetes, Argo and Kueue sources.
"""

import os
import time
import uuid
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from kfp_runs import put_recorded
from typer.testing import CliRunner

from tuneline.errors import ClusterError, CredentialsError, UserError
from tuneline.pipelines import kube, kube_api
from tuneline.pipelines.cli.main import app
from tuneline.pipelines.doctor.examine import examine
from tuneline.pipelines.doctor.finding import Finding
from tuneline.pipelines.doctor.log_errors import find_error
from tuneline.pipelines.kfp_client.connection import connect
from tuneline.pipelines.kfp_client.progress import progress_of
from tuneline.pipelines.run_view import view
from tuneline.runtime.failures.causes import find_cause
from tuneline.runtime.kfp_run import NODE_NAME

LOGS = Path(__file__).parents[1] / "data" / "kfp-2.17" / "logs"
RUN = str(uuid.UUID(int=7))
POD = "line-abc-system-container-impl-42"
NODE = "line-abc(0).root(0).exit-handler-1(0).{}(0).executor(0)"


def put_pod(server: Any, step: str = "train", **status: Any) -> None:
    labels = {"pipeline/runid": RUN, "app.kubernetes.io/component": step,
              "kueue.x-k8s.io/queue-name": "team"}  # fmt: skip
    annotations = {NODE_NAME: NODE.format(step)}
    limits = {"limits": {"memory": "64Gi"}}
    server.put(
        "pods",
        POD,
        metadata={"labels": labels, "annotations": annotations},
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
    "evicted for its disk": (
        {"reason": "Evicted", "message": "Pod ephemeral local storage usage exceeds the total "
                                         "limit of containers 200Gi."}, None,
        "Evicted", "limit of containers 200Gi", "scratch_size",
    ),
    "evicted for the node's memory": (
        {"reason": "Evicted", "message": "The node was low on resource: memory."}, None,
        "Evicted", "low on resource: memory", "memory_request",
    ),
    "node without disk": (
        {"reason": "Evicted", "message": "The node was low on resource: ephemeral-storage. "
                                         "Threshold quantity: 10Gi, available: 9Gi."}, None,
        "Evicted", "low on resource: ephemeral-storage", "scratch_size",
    ),
    "preempted": (
        condition("DisruptionTarget", "True", "PreemptionByScheduler",
                  "default-scheduler: preempting to accommodate a higher priority pod"), None,
        "PreemptionByScheduler", "higher priority", "tuneline resume",
    ),
    "no node fits": (
        {"phase": "Pending",
         **condition("PodScheduled", "False", "Unschedulable", UNSCHEDULABLE)}, None,
        "Unschedulable", "1 Insufficient nvidia.com/gpu", "placement.num_accelerators",
    ),
    "waits in its queue": (
        {"phase": "Pending", **condition("PodScheduled", "False", "SchedulingGated")}, None,
        "queued", "LocalQueue team", "Kueue admits the pod",
    ),
    "image not found": (
        {"phase": "Pending", **main_state(waiting={"reason": "ImagePullBackOff",
                                                   "message": "Back-off pulling image"})}, None,
        "ImagePullBackOff", "Back-off pulling image", "make images",
    ),
    "secret missing": (
        {"phase": "Pending", **main_state(waiting={
            "reason": "CreateContainerConfigError", "message": 'secret "wandb" not found'})}, None,
        "CreateContainerConfigError", 'secret "wandb" not found', "Create the secret",
    ),
    "bad rows": (
        exited(1), "INFO tuneline: started\nprepare: DataError: 31 of 90 rows were rejected\n",
        "DataError", "31 of 90 rows were rejected", "run the recipe again",
    ),
    "GPU memory": (
        exited(1), "[rank0]: Traceback (most recent call last):\n[rank0]:   File \"a.py\", line 3\n"
                   "[rank0]: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB\n",
        "gpu memory", "Tried to allocate 2 GiB", "micro_batch_size",
    ),
    "NCCL": (
        exited(1), "x\n[rank1]: Watchdog caught collective operation timeout: WorkNCCL(SeqNum=9)\n",
        "nccl", "Watchdog caught collective", "shared_memory",
    ),
    "killed without a word": (
        exited(137), None, "exit code 137", "exit code 137", "logs RUN",
    ),
    "log with a token": (
        exited(1), "Traceback (most recent call last):\n  File \"a.py\", line 3, in f\n"
                   "HfHubHTTPError: 401 Unauthorized for hf_abcdefghijklmnopqrstuvwxyz01234567\n",
        "token", "401 Unauthorized for", "HF_TOKEN",
    ),
    "nothing known": (
        exited(3), "a line\n", "exit code 3", "exit code 3", "logs RUN",
    ),
}  # fmt: skip


def look() -> list[Finding]:
    return examine(view(RUN, kube=kube.Kube("kubeflow")))


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


def test_the_events_name_a_config_map_that_is_missing(kube_server: Any) -> None:
    waiting = main_state(waiting={"reason": "ContainerCreating"})
    put_pod(kube_server, phase="Pending", **waiting)
    assert look() == []
    said = 'MountVolume.SetUp failed for volume "ca" : configmap "company-ca" not found'
    kube_server.put("events", "e", involvedObject={"name": POD}, message=said)
    (found,) = look()
    assert (found.cause, found.evidence) == ("volume not mounted", said)
    assert "placement.ca_bundle" in found.advice
    kube_server.forbidden.add("list events")
    assert look() == []


# What is told of a recorded run: step, cause, a part of the evidence; None if nothing is wrong.
RECORDED: dict[str, tuple[str, str, str] | None] = {
    "probe-data-error": ("work", "DataError", "31 of 90 rows"),
    "probe-memory": ("work", "OOMKilled", "memory limit 256Mi"),
    "probe-disk": ("work", "Evicted", "exceeds the limit"),
    "probe-killed": ("work", "exit code 1", "exit code 1"),
    "probe-crash": ("work", "KeyError", "KeyError: 'answer'"),
    "probe-image": ("work", "ContainerNotStarted", "image h1/absent:0"),
    "probe-time-limit": ("work", "DeadlineExceeded", "longer than the specified deadline"),
    "probe-waits-for-quota": ("work", "ExceededQuota", "exceeded quota: h1-probe, requested"),
    "probe-cancelled": ("run", "cancelled", "stopped: work"),
    "probe-hold": ("gate", "gate held", "hold: "),
    "probe-good": None,
    "probe-good-from-cache": None,
    "probe-pod-deleted": None,
}


@pytest.mark.parametrize("name", RECORDED)
def test_what_is_told_of_a_recorded_run(kube_server: Any, name: str) -> None:
    run_id = put_recorded(kube_server, name)
    found = examine(view(run_id, kube=kube.Kube("kubeflow")))
    told = RECORDED[name]
    if told is None:
        assert found == []
        return
    # Each pod is explained once, and the exit handler is not blamed.
    (only,) = found
    assert (only.step, only.cause) == told[:2]
    assert told[2] in only.evidence


def test_people_who_may_not_see_workflows_see_the_pods(kube_server: Any) -> None:
    # On Kubeflow this is often so.
    run_id = put_recorded(kube_server, "probe-memory")
    kube_server.forbidden.add("list workflows")
    (found,) = examine(view(run_id, kube=kube.Kube("kubeflow")))
    assert (found.step, found.cause) == ("work", "OOMKilled")


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
    assert (found.step, found.cause) == ("train", "nccl")
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
    assert examine(view(str(uuid.UUID(int=8)), kube=kube.Kube("kubeflow"))) == []
    assert examine(view(RUN, kube=kube.Kube("elsewhere"))) == []


def test_a_right_that_is_missing_is_named(kube_server: Any) -> None:
    kube_server.forbidden.add("list pods")
    with pytest.raises(CredentialsError, match="refuses to show pods in namespace kubeflow"):
        look()


def test_an_api_that_is_away(kube_server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kube_api, "BACKOFF_SECONDS", 0.001)
    put_pod(kube_server, **exited(137, "OOMKilled"))
    kube_server.down = 4
    assert [found.cause for found in look()] == ["OOMKilled"]
    kube_server.down = 99
    with pytest.raises(ClusterError, match="answered 503 when asked for pods"):
        look()


def tuneline(*arguments: str) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, arguments)


def put_failed(server: Any, log: str) -> str:
    """Put the recorded failed run into KFP's server, with the archived log of its failed step."""
    run = server.replay("failed")
    details = connect(None).get_run(run["run_id"])
    (attempt,) = next(
        step.attempts
        for step in progress_of(details, details.pipeline_spec)
        if step.name == "sleeper"
    )
    server.logs[run["run_id"], attempt.pod] = log
    return str(run["run_id"])


def test_the_command_takes_an_id_or_a_name(kube_server: Any, kfp_server: Any) -> None:
    run_id = put_failed(kfp_server, "sleeper: DataError: 31 of 90 rows were rejected\n")
    for name in (run_id, "h2-fail"):
        done = tuneline("doctor", name)
        assert done.exit_code == 0, done.output
        assert done.output.startswith("sleeper: DataError\n  why: 31 of 90 rows were rejected\n")
        assert "note: the run's pods and workflow are deleted" in done.output


def test_the_morning_after_the_archived_log_tells(kube_server: Any, kfp_server: Any) -> None:
    run_id = put_failed(kfp_server, LOGS.joinpath("oom.log").read_text())
    assert "sleeper: host memory\n" in tuneline("doctor", run_id).output
    kfp_server.logs.clear()
    output = tuneline("doctor", run_id).output
    assert "sleeper: unknown\n  why: The step failed, and nothing is left that tells why." in output


def test_diagnose_told_what_only_the_pods_knew(kube_server: Any, kfp_server: Any) -> None:
    run = kfp_server.replay("failed")
    run["pipeline_spec"]["pipeline_spec"]["root"]["dag"]["tasks"]["bye"]["taskInfo"]["name"] = (
        "diagnose"
    )
    details = connect(None).get_run(run["run_id"])
    steps = {step.name: step for step in progress_of(details, details.pipeline_spec)}
    # As the cluster logged it for a run whose image was missing; its step has no log at all.
    kfp_server.logs[run["run_id"], steps["diagnose"].attempts[0].pod] = (
        "[KFP Executor 2026-11-27 11:25:40,335 INFO]: Got executor_input:\n"
        "[KFP Executor 2026-11-27 11:25:51,297 ERROR]: sleeper: The step's container did not "
        "start within the time limit (image h1/absent:0). Push the images.\n"
    )
    output = tuneline("doctor", run["run_id"]).output
    assert "sleeper: diagnose\n" in output
    assert "seen: The step's container did not start within the time limit (image h1" in output


def test_one_of_both_is_enough(
    kube_server: Any, kfp_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = put_failed(kfp_server, "sleeper: DataError: 31 of 90 rows were rejected\n")
    kubeconfig = os.environ["KUBECONFIG"]
    monkeypatch.setenv("KUBECONFIG", "/nowhere")
    output = tuneline("doctor", run_id).output
    assert "sleeper: DataError\n" in output and "set KUBECONFIG" in output
    monkeypatch.setenv("KUBECONFIG", kubeconfig)
    monkeypatch.delenv("KFP_ENDPOINT")
    recorded_id = put_recorded(kube_server, "probe-memory")
    output = tuneline("doctor", recorded_id).output
    assert "note: Kubeflow Pipelines is not asked" in output and "work: OOMKilled\n" in output
    monkeypatch.setenv("KUBECONFIG", "/nowhere")
    assert isinstance(tuneline("doctor", recorded_id).exception, UserError)


@pytest.mark.parametrize("path", sorted(LOGS.glob("*.log")), ids=lambda path: path.stem)
def test_what_the_platform_prints_is_no_error(path: Path) -> None:
    """Logs of real steps and drivers: only the line that ended the step counts."""
    told = {
        "data-error": "DataError",
        "oom": "host memory",
    }
    found = find_error("step", path.read_text())
    assert (found.cause if found else None) == told.get(path.stem)
    platform = [line for line in path.read_text().splitlines() if not line.startswith("[KFP E")]
    lines = [line for line in platform if "exit status 137" not in line]
    assert [line for line in lines if find_cause(line)] == []
