"""submit, status, logs and cancel: the real kfp.Client against a server on localhost.

No cluster was there: what a real API server accepts beyond its specification is not tested.
"""

import datetime
import json
import os
import re
import socket
import subprocess
import sys
import uuid
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from tuneline.errors import ClusterError, CredentialsError, RecipeError, UserError
from tuneline.pipelines.cli.main import app
from tuneline.pipelines.kfp_client import runs

START = datetime.datetime(2026, 11, 24, 3, 0, tzinfo=datetime.UTC)


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


def tuneline(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


def run_id_of(result: Result) -> str:
    assert result.exit_code == 0, result.output + repr(result.exception)
    match = re.search(r"tuneline status (\S+)", result.output)
    assert match
    return match[1]


def task(name: str, number: int, seconds: int, **values: Any) -> dict[str, Any]:
    """A task as the API gives it: Argo's node id, and the pods of its children."""
    start = START + datetime.timedelta(seconds=number)
    return {
        "task_id": f"line-abc-{number}",
        "display_name": name,
        "state": "SUCCEEDED",
        "start_time": start.isoformat(),
        "end_time": (start + datetime.timedelta(seconds=seconds)).isoformat(),
        **values,
    }


def pod(number: int, kind: str = "impl") -> dict[str, str]:
    return {"pod_name": f"line-abc-system-container-{kind}-{number}"}


def add_run(server: Any, name: str, tasks: list[dict[str, Any]], **values: Any) -> str:
    run_id = str(uuid.uuid4())
    server.runs[run_id] = {
        "run_id": run_id,
        "display_name": name,
        "state": "RUNNING",
        "created_at": START.isoformat(),
        "run_details": {"task_details": tasks},
        **values,
    }
    return run_id


TASKS = [
    {**task("line-abc", 0, 99), "task_id": "line-abc"},
    task("root-driver", 1, 1),
    task("train-driver", 2, 3, child_tasks=[pod(2, "driver")]),
    # A retried task: its executor has two pods.
    task("train", 10, 500, child_tasks=[pod(11, "executor")]),
    task("executor", 11, 400, child_tasks=[pod(12), pod(13)]),
    task("fetch", 5, 42, child_tasks=[pod(6)]),
    task("gate", 20, 0, child_tasks=[pod(21, "driver")], state="SKIPPED"),
]


def test_submit_sends_what_was_compiled(kfp_server: Any) -> None:
    result = tuneline(
        "submit", "demo", "--name", "first", "--service-account", "tuneline-runner",
        "--pipeline-root", "s3://bucket/runs", "--set", "train.max_steps=7",
    )  # fmt: skip
    run_id = run_id_of(result)
    assert kfp_server.writes() == ["POST /apis/v2beta1/experiments", "POST /apis/v2beta1/runs"]
    (experiment,) = kfp_server.experiments.values()
    assert experiment["display_name"] == "demo"
    body = kfp_server.requests[-1][2]
    spec = body.pop("pipeline_spec")
    assert body == {
        "experiment_id": experiment["experiment_id"],
        "display_name": "first",
        "service_account": "tuneline-runner",
        "runtime_config": {"parameters": {}, "pipeline_root": "s3://bucket/runs"},
    }
    inputs = spec["pipeline_spec"]["root"]["inputDefinitions"]["parameters"]
    assert json.loads(inputs["train_config"]["defaultValue"])["max_steps"] == 7
    executors = spec["platform_spec"]["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    assert executors["exec-train"]["securityContext"]["runAsNonRoot"] is True
    assert kfp_server.runs[run_id]["state"] == "PENDING"
    assert "publish_to dir:published is a directory inside a pod" in result.output


def test_submit_twice_is_two_runs_in_one_experiment(kfp_server: Any) -> None:
    first = run_id_of(tuneline("submit", "demo"))
    second = run_id_of(tuneline("submit", "demo", "--no-cache"))
    assert len(kfp_server.experiments) == 1
    cached = []
    for run_id in (first, second):
        pipeline = kfp_server.runs[run_id]["pipeline_spec"]["pipeline_spec"]
        dags = [part["dag"] for part in pipeline["components"].values() if "dag" in part]
        tasks = [task for dag in [pipeline["root"]["dag"], *dags] for task in dag["tasks"].values()]
        cached.append(sum(task.get("cachingOptions", {}) != {} for task in tasks))
    assert cached[0] > 10
    assert cached[1] == 0


@pytest.mark.parametrize("kfp_server", [{"multi_user": True}], indirect=True)
def test_a_namespace_is_passed_on(kfp_server: Any) -> None:
    run_id = run_id_of(tuneline("submit", "demo", "--namespace", "team-a", "--name", "mine"))
    (experiment,) = kfp_server.experiments.values()
    assert experiment["namespace"] == "team-a"
    result = tuneline("status", "--namespace", "team-a")
    assert run_id in result.output
    assert run_id not in tuneline("status", "--namespace", "team-b").output
    assert "Namespace is empty" in str(tuneline("status").exception)


def test_a_recipe_with_a_token_in_it_is_not_sent(kfp_server: Any) -> None:
    token = "hf_" + "abcdefgHIJKLMNOPqrstuvwxyz123456789"
    result = tuneline("submit", "demo", "--set", f"description={token}")
    assert isinstance(result.exception, RecipeError)
    assert "secret-value" in str(result.exception)
    assert token not in str(result.exception)
    assert kfp_server.writes() == []


@pytest.mark.parametrize("option", ["--name", "--pipeline-root"])
@pytest.mark.parametrize("text", ["s3://run {{=1+1}}", "s3://$(HOME)"])
def test_a_name_that_argo_would_replace_is_not_sent(
    kfp_server: Any, option: str, text: str
) -> None:
    for command in (["submit"], ["schedule", "--every", "1h"]):
        result = tuneline(*command, "demo", option, text)
        assert isinstance(result.exception, UserError)
        assert f"{option} '{text}' contains" in str(result.exception)
    assert kfp_server.writes() == []


def test_status_shows_the_steps(kfp_server: Any) -> None:
    failed = task("merge", 30, 5, state="FAILED", error={"code": 2, "message": "disk full"})
    run_id = add_run(kfp_server, "line", [*TASKS, failed], error={"message": "a task failed"})
    for name in (run_id, "line"):
        result = tuneline("status", name)
        lines = [line.split() for line in result.output.splitlines()]
        assert ["train", "SUCCEEDED", "500"] in lines
        assert ["fetch", "SUCCEEDED", "42"] in lines
        assert ["merge", "FAILED", "5", "disk", "full"] in lines
        assert "error: a task failed" in result.output
        assert "driver" not in result.output and "executor" not in result.output


def test_a_name_means_its_newest_run(kfp_server: Any) -> None:
    add_run(kfp_server, "line", [task("fetch", 1, 1)])
    newest = add_run(kfp_server, "line", [task("train", 1, 1)])
    client = runs.connect(None)
    assert runs.find_run(client, "line").run_id == newest


@pytest.mark.parametrize("version", ["v1alpha1", "v2beta1"])
def test_logs_are_those_of_the_steps_own_pods(kfp_server: Any, version: str) -> None:
    run_id = add_run(kfp_server, "line", TASKS)
    kfp_server.log_version = version
    for number, text in ((6, "fetched\n"), (12, "out of memory"), (13, "loss 1.2\n")):
        kfp_server.logs[run_id, pod(number)["pod_name"]] = text
    assert tuneline("logs", "line", "fetch").output == "fetched\n"
    assert tuneline("logs", "line", "train").output.splitlines() == [
        f"--- {pod(12)['pod_name']}",
        "out of memory",
        f"--- {pod(13)['pod_name']}",
        "loss 1.2",
    ]


@pytest.mark.parametrize(
    ("step", "says"),
    [
        ("trian", "has no step 'trian': it has fetch, train, gate"),
        (
            "gate",
            "step 'gate' of run line has no pod: it is still waiting, or its result "
            "came from the cache",
        ),
        ("fetch", "answered 500: Failed to read logs for run"),
    ],
)
def test_logs_that_are_not_there(kfp_server: Any, step: str, says: str) -> None:
    add_run(kfp_server, "line", TASKS)
    assert says in str(tuneline("logs", "line", step).exception)


def test_cancel_ends_a_run_once(kfp_server: Any) -> None:
    run_id = add_run(kfp_server, "line", TASKS)
    assert tuneline("cancel", "line").exit_code == 0
    assert kfp_server.writes() == [f"POST /apis/v2beta1/runs/{run_id}:terminate"]
    kfp_server.runs[run_id]["state"] = "SUCCEEDED"
    assert "has ended already: SUCCEEDED" in str(tuneline("cancel", run_id).exception)


@pytest.mark.parametrize("state", ["FAILED", "CANCELED"])
def test_resume_runs_again_what_failed(kfp_server: Any, state: str) -> None:
    run_id = add_run(kfp_server, "line", TASKS, state=state)
    done = tuneline("resume", "line")
    assert done.output == f"run line: resumed\nfollow it with: tuneline status {run_id}\n"
    assert kfp_server.writes() == [f"POST /apis/v2beta1/runs/{run_id}:retry"]
    # It runs now: asking once more is a mistake, and changes nothing.
    again = tuneline("resume", run_id)
    assert isinstance(again.exception, UserError)
    assert "run line is RUNNING: only a run that is FAILED or CANCELED" in str(again.exception)
    assert len(kfp_server.writes()) == 1


def test_no_such_run(kfp_server: Any) -> None:
    assert "no run 'line': there are none yet" in str(tuneline("status", "line").exception)
    add_run(kfp_server, "other", [])
    error = tuneline("cancel", str(uuid.uuid4())).exception
    assert isinstance(error, UserError)
    assert "the newest are other" in str(error)


@pytest.mark.parametrize(
    ("status", "kind", "says"),
    [
        (401, CredentialsError, r"cannot identify you \(401: token expired\): log in again"),
        (403, CredentialsError, r"denies this request \(403: token expired\): name one of"),
        (503, ClusterError, "answered 503: token expired"),
    ],
)
def test_refusals_are_sentences(
    kfp_server: Any, status: int, kind: type[Exception], says: str
) -> None:
    kfp_server.refuse = (status, "token expired")
    with pytest.raises(kind, match=says):
        runs.connect(None)
    # Once, not again and again for 25 seconds.
    assert len(kfp_server.requests) == 1


def test_a_login_page_is_told_from_the_api(kfp_server: Any) -> None:
    kfp_server.page = "<html>log in</html>"
    with pytest.raises(CredentialsError, match="perhaps a login page"):
        runs.connect(None)


def test_a_host_where_nobody_answers(kfp_server: Any) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        host = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ClusterError, match=f"reached at {host} .*refused.*: check"):
            runs.connect(host)
    with pytest.raises(ClusterError, match=r"reached at https://nowhere\.invalid"):
        runs.connect("nowhere.invalid")


def test_a_server_that_goes_away(kfp_server: Any) -> None:
    client = runs.connect(None)
    client.get_kfp_healthz()
    kfp_server.__exit__()
    with pytest.raises(ClusterError, match="cannot be reached at 127.0.0.1"):
        runs.recent_runs(client)
    kfp_server.__exit__ = lambda *_: None


def test_no_host_at_all(kfp_server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KFP_ENDPOINT")
    monkeypatch.delenv("KUBECONFIG", raising=False)
    with pytest.raises(UserError, match="no host: give --host URL or set KFP_ENDPOINT"):
        runs.connect(None)
    assert runs.connect(kfp_server.host).get_kfp_healthz().multi_user is False


def test_the_token_comes_from_the_environment(
    kfp_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KFP_TOKEN", "abc.def")
    run_id = add_run(kfp_server, "line", TASKS)
    kfp_server.logs[run_id, pod(6)["pod_name"]] = "fetched\n"
    assert tuneline("logs", "line", "fetch").exit_code == 0
    assert set(kfp_server.tokens) == {"Bearer abc.def"}


def test_an_error_is_one_line_and_an_exit_code(kfp_server: Any) -> None:
    command = [sys.executable, "-m", "tuneline.pipelines.cli.main", "status", "absent"]
    done = subprocess.run(
        command, env=dict(os.environ), capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr == "error: no run 'absent': there are none yet\n"
    assert done.stdout == ""
