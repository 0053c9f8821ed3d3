"""status and logs: the commands against the answers of KFP 2.17 and of Kubernetes.

The runs are recorded (tests/support/servers/kfp_server.py, tests/support/kfp_runs.py).
"""

import base64
import gzip
import json
from typing import Any

import pytest
from click.testing import Result
from kfp_runs import put_recorded, recorded
from typer.testing import CliRunner

from tuneline.errors import ClusterError, UserError
from tuneline.pipelines import step_logs
from tuneline.pipelines.cli.main import app
from tuneline.pipelines.kfp_client import runs
from tuneline.pipelines.kfp_client.connection import connect
from tuneline.pipelines.kfp_client.progress import Progress
from tuneline.pipelines.kube import Kube
from tuneline.pipelines.run_view import joined, view
from tuneline.runtime.kfp_run import Attempt

GPTQ = "tuneline-demo-sz7cb-metadata-0-2-retry-system-container-impl-673383166"
BASE = "tuneline-demo-sz7cb-metadata-0-2-retry-system-container-impl-173275339"
TUNED = "tuneline-demo-sz7cb-metadata-0-2-retry-system-container-impl-1686764526"


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def no_kube(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", "/nowhere")


def tuneline(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


def put_pod(server: Any, run: dict[str, Any], name: str, **status: Any) -> None:
    server.put("pods", name, metadata={"labels": {"pipeline/runid": run["run_id"]}}, status=status)


def test_status_names_the_steps_as_the_recipe_does(kfp_server: Any, no_kube: None) -> None:
    run = kfp_server.replay("demo-running")
    for name in (run["run_id"], run["display_name"]):
        result = tuneline("status", name)
        lines = [line.split() for line in result.output.splitlines()]
        assert ["train", "succeeded", "1", "3", "min", "37", "s"] in lines
        assert ["quantize-gguf", "q4_k_m", "waiting"] in lines
        assert len(lines) == 22, "a header, 19 steps and a note"
        assert "driver" not in result.output and "executor" not in result.output
        assert "it cannot be reached or does not show the run's pods" in result.output


def test_status_shows_causes_that_kubernetes_knows(kfp_server: Any, kube_server: Any) -> None:
    run = kfp_server.replay("failed")
    put_recorded(kube_server, "probe-memory", run_id=run["run_id"])
    output = tuneline("status", "h2-fail").output
    assert "h2-fail: failed, created 2026-11-27" in output
    (line,) = (line for line in output.splitlines() if line.lstrip().startswith("work "))
    assert line.split()[:3] == ["work", "failed", "1"]
    assert "OOMKilled, exit code 1, memory limit 256Mi" in line


def test_the_list_names_a_cancelled_run(kfp_server: Any, no_kube: None) -> None:
    run = kfp_server.replay("cancelled")
    # As long as the name that KFP gives to a run of a schedule; wider than 80 columns with the ID.
    run["display_name"] = name = "e2e-fin2-schedule-110824286xb6-18-3860792278"
    (line,) = (line for line in tuneline("status").output.splitlines() if run["run_id"] in line)
    assert line.split()[:2] == [name, "cancelled"]


def test_status_names_steps_that_a_cancel_kept_from_starting(
    kfp_server: Any, no_kube: None
) -> None:
    run = kfp_server.replay("cancelled")
    lines = [line.split() for line in tuneline("status", run["run_id"]).output.splitlines()]
    assert ["after", "not", "started"] in lines
    (driver,) = (
        each for each in run["run_details"]["task_details"] if each["display_name"] == "bye-driver"
    )
    driver |= {"state": "RUNNING", "end_time": "0001-01-01T00:00:00Z"}
    lines = [line.split() for line in tuneline("status", run["run_id"]).output.splitlines()]
    assert ["after", "not", "started"] in lines and ["bye", "not", "started"] in lines


def test_a_step_of_an_ended_run_waits_for_nothing() -> None:
    driver = [Attempt(step="after", state="waiting", started="2026-11-27T11:01:30Z")]
    for state in ("waiting", "not started"):
        (after,) = joined([Progress("after", state)], driver, cancelled=True)
        assert (after.state, after.seconds) == (state, None)


@pytest.mark.parametrize("version", ["v1alpha1", "v2beta1"])
def test_archived_logs_by_the_names_of_steps(kfp_server: Any, no_kube: None, version: str) -> None:
    run = kfp_server.replay("demo-running")
    kfp_server.log_version = version
    for pod, text in ((BASE, "base\n"), (TUNED, "tuned"), (GPTQ, "gptq\n")):
        kfp_server.logs[run["run_id"], pod] = text
    name = run["display_name"]
    assert tuneline("logs", name, "evaluate", "base").output == "base\n"
    assert tuneline("logs", name, "gptq-4bit").output == "gptq\n"
    assert tuneline("logs", name, "evaluate").output.splitlines() == [
        f"--- evaluate base, attempt 1 (succeeded): {BASE}",
        "base",
        f"--- evaluate tuned, attempt 1 (running): {TUNED}",
        "tuned",
    ]


def test_attempts_are_told_apart(kfp_server: Any, no_kube: None) -> None:
    run = kfp_server.replay("pod-deleted")
    details = connect(None).get_run(run["run_id"])
    (sleeper,) = step_logs.choose(view(run["run_id"], client=None, run=details), "sleeper")
    for number, attempt in enumerate(sleeper.attempts, start=1):
        kfp_server.logs[run["run_id"], attempt.pod] = f"second {number}\n"
    assert tuneline("logs", run["run_id"], "sleeper").output.splitlines() == [
        f"--- sleeper, attempt 1 (failed): {sleeper.attempts[0].pod}",
        "second 1",
        f"--- sleeper, attempt 2 (succeeded): {sleeper.attempts[1].pod}",
        "second 2",
    ]


@pytest.mark.parametrize(
    ("step", "says"),
    [
        ("trian", "has no step 'trian': it has plan, look-up-data, look-up-model, fetch, prepare"),
        ("gate", "has no log to show: step 'gate' is waiting"),
        ("fetch", r"there is no log of tuneline-demo-sz7cb-.*-1706068936 \(succeeded\): KFP has"),
    ],
)
def test_logs_that_are_not_there(kfp_server: Any, no_kube: None, step: str, says: str) -> None:
    run = kfp_server.replay("demo-running")
    error = tuneline("logs", run["run_id"], step).exception
    with pytest.raises(Exception, match=says):
        raise error or AssertionError("no error")


def test_the_log_of_a_running_pod_comes_from_kubernetes(kfp_server: Any, kube_server: Any) -> None:
    run = kfp_server.replay("demo-running")
    put_pod(kube_server, run, TUNED, phase="Running")
    kube_server.logs[TUNED, "main"] = "step 1\nstep 2\n"
    assert tuneline("logs", run["run_id"], "evaluate", "tuned").output == "step 1\nstep 2\n"


def test_a_log_is_followed_over_its_attempts(
    kfp_server: Any, kube_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_logs, "POLL_SECONDS", 0.01)
    run_id = kfp_server.replay("pod-deleted")["run_id"]
    client = connect(None)

    def look() -> Any:
        return view(run_id, client=client, run=client.get_run(run_id), kube=Kube("kubeflow"))

    (sleeper,) = step_logs.choose(look(), "sleeper")
    for number, attempt in enumerate(sleeper.attempts, start=1):
        put_pod(kube_server, {"run_id": run_id}, attempt.pod, phase="Running")
        kube_server.logs[attempt.pod, "main"] = f"line {number}\nlast"
    assert list(step_logs.follow(look, sleeper)) == [
        *("line 1", "last", step_logs.heading(sleeper.attempts[1]), "line 2", "last"),
    ]


def test_following_needs_kubernetes_and_one_step(kfp_server: Any, no_kube: None) -> None:
    run = kfp_server.replay("demo-running")
    error = tuneline("logs", run["run_id"], "evaluate", "--follow").exception
    assert "--follow takes one step: name evaluate base or evaluate tuned" in str(error)
    error = tuneline("logs", run["run_id"], "train", "--follow").exception
    assert "--follow needs Kubernetes" in str(error)


def test_resume_lets_the_exit_handler_run_again(kfp_server: Any, kube_server: Any) -> None:
    run = kfp_server.replay("failed")
    put_recorded(kube_server, "probe-memory", run_id=run["run_id"])
    output = tuneline("resume", run["run_id"]).output
    assert "resumed, from" in output and "does not run diagnose again" not in output
    (kept,) = (each for (kind, *_), each in kube_server.objects.items() if kind == "workflows")
    names = [node["name"] for node in kept["status"]["nodes"].values()]
    assert names and not [name for name in names if ".onExit" in name]
    nodes = [
        each["metadata"]["annotations"]["workflows.argoproj.io/node-name"]
        for (kind, *_), each in kube_server.objects.items()
        if kind == "pods"
    ]
    assert nodes and not [name for name in nodes if ".onExit" in name]


def test_resume_says_if_nobody_diagnoses_again(kfp_server: Any, kube_server: Any) -> None:
    kube_server.forbidden.add("patch workflows")
    run = kfp_server.replay("failed")
    output = tuneline("resume", run["run_id"]).output
    assert f"`tuneline doctor {run['run_id']}` explains it" in output
    assert not [each for each in kube_server.requests if each.startswith(("PATCH", "DELETE"))]


def test_a_workflow_that_is_too_large_is_not_resumed(kfp_server: Any, kube_server: Any) -> None:
    pods, workflow = recorded("probe-memory")
    run = kfp_server.replay("failed")
    workflow["metadata"]["labels"]["pipeline/runid"] = run["run_id"]
    nodes = workflow["status"].pop("nodes")
    next(iter(nodes.values()))["inputs"] = {"parameters": [{"name": "x", "value": "y" * 1_600_000}]}
    packed = gzip.compress(json.dumps(nodes).encode())
    workflow["status"]["compressedNodes"] = base64.b64encode(packed).decode()
    kube_server.put("workflows", workflow["metadata"]["name"], **workflow)
    error = tuneline("resume", run["run_id"]).exception
    assert isinstance(error, UserError)
    assert "submit the recipe again; finished steps are taken from the cache" in str(error)
    assert kfp_server.writes() == []


def test_kfp_says_that_a_workflow_is_too_large(kfp_server: Any, no_kube: None) -> None:
    run = kfp_server.replay("failed")
    details = connect(None).get_run(run["run_id"])
    client = connect(None)
    # As KFP 2.17 answered for a workflow of 2 MiB.
    message = "rpc error: code = ResourceExhausted desc = trying to send message larger than max"
    kfp_server.refuse = (500, f"Failed to retry a run: {message} (2190747 vs. 2097152)")
    with pytest.raises(UserError, match="submit the recipe again"):
        runs.resume(client, details)
    kfp_server.refuse = (500, "Failed to retry a run: the database is unreachable")
    with pytest.raises(ClusterError, match="the database is unreachable"):
        runs.resume(client, details)
