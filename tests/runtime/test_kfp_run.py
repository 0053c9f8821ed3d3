"""The steps of runs that a real cluster recorded, from pods, from the workflow and from both."""

import base64
import copy
import gzip
import json
from typing import Any

import pytest
from tests.support.kfp_runs import recorded

from tuneline.runtime.kfp_run import (
    NODE_NAME,
    group_phase,
    is_cancelled,
    read_attempts,
    workflow_nodes,
)
from tuneline.runtime.termination import Ending

DEMO = [
    "plan", "look-up-data", "look-up-model", "fetch", "prepare", "train", "evaluate base", "merge",
    "evaluate tuned", "convert-gguf", "quantize-gptq gptq-4bit", "quantize-gguf f16",
    "quantize-gguf q8_0", "quantize-gguf q5_k_m", "quantize-gguf q4_k_m", "gate", "report",
    "publish", "diagnose",
]  # fmt: skip


@pytest.mark.parametrize("source", ["pods", "workflow", "both"])
def test_the_steps_of_the_demo_are_named_as_in_the_recipe(source: str) -> None:
    pods, workflow = recorded("demo-nodes")
    found = read_attempts(
        pods if source != "workflow" else [], workflow if source != "pods" else None
    )
    assert sorted(attempt.step for attempt in found) == sorted(DEMO)
    assert {attempt.state for attempt in found} == {"succeeded"}
    assert {attempt.number for attempt in found} == {1}
    assert [attempt.step for attempt in found if attempt.is_on_exit] == ["diagnose"]
    # The pods have these names, also if only the workflow is known.
    assert {attempt.pod for attempt in found} <= {pod["metadata"]["name"] for pod in pods}


def test_steps_are_named_by_their_own_pods_if_the_drivers_pods_are_gone() -> None:
    pods, _ = recorded("demo-nodes")
    left = [pod for pod in pods if "driver" not in pod["metadata"]["name"]]
    assert len(left) == len(DEMO)
    assert sorted(attempt.step for attempt in read_attempts(left)) == sorted(DEMO)


def test_a_compressed_workflow_is_read_too() -> None:
    _, workflow = recorded("demo-nodes")
    small = copy.deepcopy(workflow)
    nodes = json.dumps(small["status"].pop("nodes")).encode()
    small["status"]["compressedNodes"] = base64.b64encode(gzip.compress(nodes)).decode()
    assert read_attempts([], small) == read_attempts([], workflow)
    assert group_phase(small) == "Succeeded"


@pytest.mark.parametrize(
    ("name", "state", "reason", "exit_code"),
    [
        ("data-error", "failed", "Error", 1),
        ("crash", "failed", "Error", 1),
        ("killed", "failed", "Error", 1),
        ("memory", "failed", "OOMKilled", 1),
        ("time-limit", "failed", "DeadlineExceeded", 143),
        ("disk", "failed", "Evicted", 143),
        ("image", "failed", "ContainerNotStarted", None),
        ("cancelled", "failed", "Error", 143),
        ("cancelled-in-quota", "failed", "RunStopped", None),
        ("good", "succeeded", "", None),
        ("good-from-cache", "cached", "", None),
    ],
)
def test_how_the_one_step_of_a_probe_ended(
    name: str, state: str, reason: str, exit_code: int | None
) -> None:
    work = read_attempts(*recorded(f"probe-{name}"))[0]
    assert (work.step, work.state, work.reason) == ("work", state, reason)
    assert work.exit_code == exit_code


def test_an_exit_handler_that_argo_gave_up_has_succeeded_if_its_pod_has() -> None:
    pods, workflow = recorded("demo-cancelled")
    nodes = {node["name"].split(".")[-1]: node for node in workflow_nodes(workflow)}
    assert nodes["executor(0)"]["phase"] == "Failed"
    states = {each.step: each.state for each in read_attempts(pods, workflow)}
    assert states == {"fetch": "failed", "diagnose": "succeeded"}


def test_an_exit_handler_whose_driver_argo_gave_up_was_stopped() -> None:
    pods, workflow = recorded("demo-cancelled-early")
    (diagnose,) = (each for each in read_attempts(pods, workflow) if each.is_on_exit)
    assert (diagnose.step, diagnose.state, diagnose.reason) == ("diagnose", "failed", "RunStopped")


def test_a_pod_that_runs_is_running_before_argo_notices() -> None:
    pods, workflow = recorded("demo-young-pod")
    assert {node["phase"] for node in workflow_nodes(workflow) if node["type"] == "Pod"} == {
        "Succeeded",  # the driver
        "Pending",
    }
    assert read_attempts([], workflow)[0].state == "waiting"
    assert read_attempts(pods, workflow)[0].state == "running"


@pytest.mark.parametrize("name", ["data-error", "crash", "memory", "disk", "cancelled"])
def test_workflow_and_pod_agree_on_the_reason(name: str) -> None:
    pods, workflow = recorded(f"probe-{name}")
    by_workflow, by_pod = read_attempts([], workflow)[0], read_attempts(pods)[0]
    assert by_workflow.reason == by_pod.reason and by_workflow.pod == by_pod.pod
    assert by_workflow.ending == by_pod.ending


def test_what_a_step_left_is_read_from_its_pod_and_from_argos_message() -> None:
    pods, workflow = recorded("probe-data-error")
    text = "31 of 90 rows were rejected, but at most 1 % may be (token [redacted])"
    expected = Ending(step="prepare", error="DataError", text=text)
    for source in ((pods, None), ([], workflow)):
        assert read_attempts(*source)[0].ending == expected


def test_a_limit_is_told_with_its_value() -> None:
    assert read_attempts(*recorded("probe-memory"))[0].message == "memory limit 256Mi"
    assert read_attempts(*recorded("probe-time-limit"))[0].message.endswith("deadline (40 s)")
    assert read_attempts(*recorded("probe-image"))[0].message == "image h1/absent:0"


def test_attempts_of_a_deleted_pod_are_counted() -> None:
    pods, workflow = recorded("probe-pod-deleted")
    found = [attempt for attempt in read_attempts(pods, workflow) if not attempt.is_on_exit]
    assert [(each.number, each.state, each.reason) for each in found] == [
        (1, "failed", "PodDeleted"), (2, "succeeded", ""),
    ]  # fmt: skip
    # The first pod is gone, so the pods alone know one attempt.
    assert [each.state for each in read_attempts(pods) if not each.is_on_exit] == ["succeeded"]


def test_the_cache_and_a_false_condition() -> None:
    pods, workflow = recorded("probe-hold-from-cache")
    states = {each.step: each.state for each in read_attempts(pods, workflow)}
    assert states == {
        "make-scores": "cached", "make-scores-2": "cached", "gate": "cached",
        "promoted": "skipped", "diagnose": "succeeded",
    }  # fmt: skip
    # Without the workflow, nobody knows why these steps have no pod.
    alone = {each.step: each.state for each in read_attempts(pods)}
    assert alone["gate"] == "unknown" and "promoted" not in alone


def test_a_workflow_whose_nodes_argo_keeps_elsewhere_is_no_source() -> None:
    pods, workflow = recorded("probe-good-from-cache")
    offloaded = copy.deepcopy(workflow)
    offloaded["status"] = {"phase": "Running", "offloadNodeStatusVersion": "fnv:123"}
    assert workflow_nodes(offloaded) == [] and group_phase(offloaded) == ""
    assert read_attempts(pods, offloaded) == read_attempts(pods)


def test_pods_that_are_no_step_are_skipped() -> None:
    pods, workflow = recorded("probe-good")
    # A pod of a TrainJob has the label of the run, but no node of a workflow.
    other: dict[str, Any] = {"metadata": {"name": "x-node-0-0"}, "spec": {}, "status": {}}
    assert read_attempts([*pods, other], workflow) == read_attempts(pods, workflow)


def test_a_driver_that_failed_is_told() -> None:
    pods, _ = recorded("probe-good")
    driver = next(
        pod for pod in pods if ".work-driver" in pod["metadata"]["annotations"][NODE_NAME]
    )
    ended = {"exitCode": 1, "reason": "Error", "message": ""}
    driver["status"] = {
        "phase": "Failed",
        "containerStatuses": [{"name": "main", "state": {"terminated": ended}}],
    }
    (found,) = read_attempts([driver])
    assert (found.step, found.state, found.reason) == ("work", "failed", "Driver")
    assert found.pod == driver["metadata"]["name"]


def test_a_step_that_waits_for_quota_is_told() -> None:
    pods, workflow = recorded("probe-waits-for-quota")
    (work,) = (each for each in read_attempts(pods, workflow) if each.step == "work")
    assert (work.state, work.reason) == ("waiting", "ExceededQuota")
    assert work.message.startswith(
        "exceeded quota: h1-probe, requested: requests.example.com/probe=1"
    )


@pytest.mark.parametrize(
    ("name", "phase", "cancelled"),
    [
        ("good", "Succeeded", False),
        ("data-error", "Failed", False),
        ("cancelled", "Failed", True),
        ("cancelled-in-quota", "Failed", True),
    ],
)
def test_the_workflow_tells_a_cancelled_run_from_a_failed_one(
    name: str, phase: str, cancelled: bool
) -> None:
    _, workflow = recorded(f"probe-{name}")
    assert (group_phase(workflow), is_cancelled(workflow)) == (phase, cancelled)
