"""Steps, states and pods of runs, as KFP 2.17 recorded them (tests/data/kfp-2.17/run-*.json).

The recorded pods of the same runs are the reference for the names of the pods.
"""

import datetime
import uuid
from typing import Any

import pytest

from tuneline.pipelines.kfp_client import progress, runs
from tuneline.pipelines.kfp_client.connection import connect
from tuneline.pipelines.kfp_client.graph import graph_of
from tuneline.pipelines.kfp_client.nodes import node_id
from tuneline.pipelines.kfp_client.progress import Progress, progress_of, state_of


def steps_of(server: Any, name: str, **values: Any) -> tuple[Any, list[Progress]]:
    run_id = server.replay(name, **values)["run_id"]
    run = connect(None).get_run(run_id)
    return run, progress_of(run, run.pipeline_spec)


def states(steps: list[Progress]) -> dict[str, str]:
    return {step.name: step.state for step in steps}


def test_a_running_line(kfp_server: Any) -> None:
    run, steps = steps_of(kfp_server, "demo-running")
    assert state_of(run) == "running"
    assert [(step.name, step.state) for step in steps] == [
        ("plan", "succeeded"),
        ("look-up-data", "succeeded"),
        ("look-up-model", "succeeded"),
        ("fetch", "succeeded"),
        ("prepare", "succeeded"),
        ("evaluate base", "succeeded"),
        ("train", "succeeded"),
        ("merge", "succeeded"),
        ("evaluate tuned", "running"),
        ("convert-gguf", "succeeded"),
        ("quantize-gptq gptq-4bit", "running"),
        ("quantize-gguf f16", "waiting"),
        ("quantize-gguf q8_0", "waiting"),
        ("quantize-gguf q5_k_m", "waiting"),
        ("quantize-gguf q4_k_m", "waiting"),
        ("gate", "waiting"),
        ("publish", "waiting"),
        ("report", "waiting"),
        ("diagnose", "waiting"),
    ]
    (train,) = (step for step in steps if step.name == "train")
    # As `kubectl get pods` listed it.
    assert [attempt.pod for attempt in train.attempts] == [
        "tuneline-demo-sz7cb-metadata-0-2-retry-system-container-impl-1435894842"
    ]
    assert train.seconds == 217


def test_an_end_before_the_start_by_another_machines_clock_is_unknown() -> None:
    start = datetime.datetime(2026, 1, 31, tzinfo=datetime.UTC)
    ended = [start + datetime.timedelta(seconds=seconds) for seconds in (-3, 0, 3)]
    assert [Progress("train", "succeeded", (), start, end).seconds for end in ended] == [None, 0, 3]
    later = datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=1)
    assert Progress("train", "running", (), later).seconds is None


def test_a_line_from_the_cache(kfp_server: Any) -> None:
    _, steps = steps_of(kfp_server, "second-from-cache")
    ran = {"plan", "look-up-data", "look-up-model", "report", "publish", "diagnose"}
    assert len(steps) == 19
    for step in steps:
        assert step.state == ("succeeded" if step.name in ran else "from cache")
        assert len(step.attempts) == (step.name in ran)


def test_a_failed_run(kfp_server: Any) -> None:
    run, steps = steps_of(kfp_server, "failed")
    assert state_of(run) == "failed"
    assert states(steps) == {"sleeper": "failed", "bye": "succeeded", "after": "not started"}


def test_a_cancelled_run_is_not_called_failed(kfp_server: Any) -> None:
    run, steps = steps_of(kfp_server, "cancelled")
    assert (run.state, state_of(run)) == ("FAILED", "cancelled")
    assert states(steps) == {"sleeper": "cancelled", "bye": "cancelled", "after": "not started"}
    (after,) = (step for step in steps if step.name == "after")
    assert (after.seconds, after.attempts) == (None, ())


def test_steps_that_kfp_left_as_they_were_when_the_run_was_cancelled(kfp_server: Any) -> None:
    details = kfp_server.replay("cancelled")["run_details"]
    for task in details["task_details"]:
        # The exit handler was given up: KFP has its end, but not that of its pod.
        if task["display_name"] in ("bye-driver", "bye-driver(0)"):
            task |= {"state": "RUNNING", "end_time": "0001-01-01T00:00:00Z"}
    run, steps = steps_of(kfp_server, "cancelled", run_details=details)
    assert not progress.is_frozen(run)
    assert states(steps) == {"sleeper": "cancelled", "bye": "not started", "after": "not started"}
    assert [step.seconds is None for step in steps] == [False, True, True]
    # What was recorded before the cancel says nothing about the rest.
    early = [task for task in details["task_details"] if task["start_time"] < "2026-11-27T11:01"]
    for task in early:
        if task["state"] == "FAILED":
            task |= {"state": "RUNNING", "end_time": "0001-01-01T00:00:00Z"}
    run, steps = steps_of(kfp_server, "cancelled", run_details={"task_details": early})
    assert progress.is_frozen(run)
    assert states(steps) == dict.fromkeys(("sleeper", "bye", "after"), "unknown")


def test_a_pod_that_was_deleted_is_an_attempt(kfp_server: Any) -> None:
    _, steps = steps_of(kfp_server, "pod-deleted")
    sleeper = next(step for step in steps if step.name == "sleeper")
    assert [(each.number, each.state) for each in sleeper.attempts] == [
        (1, "failed"),
        (2, "succeeded"),
    ]
    assert len({each.pod for each in sleeper.attempts}) == 2


def test_what_failed_before_a_resume_waits(kfp_server: Any) -> None:
    run, steps = steps_of(kfp_server, "resumed-young")
    assert state_of(run) == "running"
    # It was cancelled, and its exit handler too.
    assert states(steps) == {"bye": "waiting", "sleeper": "waiting", "after": "waiting"}
    run, steps = steps_of(kfp_server, "resumed")
    assert state_of(run) == "succeeded"
    assert set(states(steps).values()) == {"succeeded"}


def test_a_run_that_kfp_stopped_recording(kfp_server: Any) -> None:
    # The demo's tasks stay like this when Argo compresses its workflow; its state goes on.
    run, steps = steps_of(kfp_server, "demo-running", state="SUCCEEDED")
    assert progress.is_frozen(run)
    assert states(steps)["quantize-gguf q4_k_m"] == "succeeded"
    assert states(steps)["publish"] == "unknown"
    run, steps = steps_of(kfp_server, "demo-running", state="FAILED")
    assert (states(steps)["train"], states(steps)["gate"]) == ("succeeded", "unknown")


def test_a_run_without_tasks(kfp_server: Any) -> None:
    _, steps = steps_of(kfp_server, "running", run_details=None)
    assert states(steps) == {"sleeper": "waiting", "after": "waiting", "bye": "waiting"}


@pytest.mark.parametrize("nested", [True, False])
def test_a_graph_has_the_items_of_a_loop(kfp_server: Any, nested: bool) -> None:
    spec = kfp_server.replay("demo-running")["pipeline_spec"]
    graph = graph_of(spec if nested else spec["pipeline_spec"])
    names = [step.name for step in graph.steps]
    assert names.index("convert-gguf") < names.index("quantize-gguf f16") < names.index("gate")
    (publish,) = (step for step in graph.steps if step.name == "publish")
    assert publish.is_conditional
    assert graph_of(runs.pipeline_of(None, type("Run", (), {
        "pipeline_spec": None, "pipeline_version_reference": None})())).steps == ()  # fmt: skip


def task(workflow: str, name: str, state: str | None, below: list[str]) -> dict[str, Any]:
    """A node as KFP's API lists it: the last part of its name, and the IDs of the nodes below."""
    return {
        "task_id": str(uuid.uuid4()),
        "display_name": name.rpartition("/")[2].removeprefix("."),
        "state": state,
        "start_time": "2026-11-27T10:00:00Z",
        "end_time": "2026-11-27T10:00:20Z",
        "child_tasks": [{"pod_name": node_id(workflow, each.replace("/", ""))} for each in below],
    }


@pytest.mark.parametrize("ran", [True, False])
def test_a_controller_that_adds_no_retries(kfp_server: Any, ran: bool) -> None:
    # Only KFP's installation of Argo has the default. The names are those of KFP's compiler: only
    # the pod of sleeper, which has set_retry, is below a node that counts attempts.
    line = "w/.root/.exit-handler-1"
    edges = {
        "w": ["w/.root-driver"],
        "w/.root-driver": ["w/.root"],
        "w/.root": [f"{line}-driver"],
        f"{line}-driver": [line],
        line: [f"{line}/.sleeper-driver"],
        f"{line}/.sleeper-driver": [f"{line}/.sleeper"],
        f"{line}/.sleeper": [f"{line}/.sleeper/.executor", f"{line}/.after-driver"],
        f"{line}/.after-driver": [f"{line}/.after"],
        f"{line}/.after": [f"{line}/.after/.executor"],
        f"{line}/.sleeper/.executor": [f"{line}/.sleeper/.executor(0)"] if ran else [],
        f"{line}/.sleeper/.executor(0)": [],
        f"{line}/.after/.executor": [],
    }
    skipped = {f"{line}/.sleeper/.executor", f"{line}/.after/.executor"} if not ran else set()
    tasks = [
        task("w", name, "SKIPPED" if name in skipped else "SUCCEEDED", below)
        for name, below in edges.items()
        if ran or not name.endswith("(0)")
    ]
    _, steps = steps_of(kfp_server, "failed", run_details={"task_details": tasks})
    state = "succeeded" if ran else "from cache"
    assert states(steps) == {"sleeper": state, "after": state, "bye": "not started"}
    assert [len(step.attempts) for step in steps] == [ran, ran, 0]
    if ran:
        assert steps[1].attempts[0].pod.startswith("w-system-container-impl-")


def test_importers_are_no_steps() -> None:
    tasks = {"load": {"componentRef": {"name": "comp-load"}, "taskInfo": {"name": "load"}}}
    spec = {
        "root": {"dag": {"tasks": tasks}},
        "components": {"comp-load": {"executorLabel": "exec-load"}},
        "deploymentSpec": {"executors": {"exec-load": {"importer": {}}}},
    }
    assert graph_of(spec).steps == ()
    spec["deploymentSpec"] = {"executors": {"exec-load": {"container": {}}}}
    assert [step.name for step in graph_of(spec).steps] == ["load"]
