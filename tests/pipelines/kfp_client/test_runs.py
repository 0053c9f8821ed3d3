"""submit, cancel, resume: the real kfp.Client against a server on localhost.

Runs are those that KFP 2.17 recorded (tests/support/servers/kfp_server.py).
"""

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
from tuneline.pipelines.cli.cluster import load_for_cluster
from tuneline.pipelines.cli.main import app
from tuneline.pipelines.kfp_client import runs
from tuneline.pipelines.kfp_client.connection import connect
from tuneline.version import VERSION


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("KUBECONFIG", "/nowhere")


def tuneline(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


LOCAL = ("--set", "placement.registry=local")
SUBMIT = ("submit", "demo", *LOCAL)


def run_id_of(result: Result) -> str:
    assert result.exit_code == 0, result.output + repr(result.exception)
    match = re.search(r"tuneline status (\S+)", result.output)
    assert match
    return match[1]


def test_submit_sends_what_was_compiled(kfp_server: Any) -> None:
    result = tuneline(
        *SUBMIT, "--name", "first", "--service-account", "tuneline-runner",
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
    assert inputs["max_steps"]["defaultValue"] == 7
    assert "max_steps" not in json.loads(inputs["train_config"]["defaultValue"])
    executors = spec["platform_spec"]["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    assert executors["exec-train"]["securityContext"]["runAsNonRoot"] is True
    assert kfp_server.runs[run_id]["state"] == "PENDING"
    assert "publish_to dir:published is a directory inside a pod" in result.output


@pytest.mark.parametrize(
    ("target", "claim", "is_lost"),
    [
        ("dir:/cache/published", "model-cache", False),
        ("dir:/cache/published", "null", True),
        ("dir:/cached", "model-cache", True),
        ("my-org/model", "null", False),
    ],
)
def test_a_directory_that_is_deleted_with_the_pod(
    target: str, claim: str, is_lost: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    values = [f"publish_to={target}", f"placement.cache_claim={claim}"]
    load_for_cluster("demo", [*values, "placement.registry=local"])
    assert ("is deleted with the pod" in capsys.readouterr().out) is is_lost


NO_REGISTRY = (
    "demo does not say where the nodes get the images: set placement.registry to the registry to "
    "which you pushed them, e.g. --set placement.registry=registry.example.com/team, or to local "
    "if every node has them as localhost/tuneline/... (`make images` builds them)"
)


@pytest.mark.parametrize("command", [("submit",), ("schedule", "--every", "1h")])
def test_a_run_on_a_cluster_says_where_its_images_are(
    kfp_server: Any, command: tuple[str, ...]
) -> None:
    assert str(tuneline(*command, "demo").exception) == NO_REGISTRY
    assert kfp_server.writes() == []
    done = tuneline(*command, "demo", "--set", "placement.registry=registry.example.com/team")
    assert done.exit_code == 0, done.exception
    pulled = f"images: registry.example.com/team/*:{VERSION}, which the nodes pull\n"
    assert pulled in done.output
    done = tuneline(*command, "demo", *LOCAL)
    assert done.exit_code == 0, done.exception
    assert f"localhost/tuneline/*:{VERSION}, which the nodes must have: they are" in done.output


def test_submit_twice_is_two_runs_in_one_experiment(kfp_server: Any) -> None:
    first = run_id_of(tuneline(*SUBMIT))
    second = run_id_of(tuneline(*SUBMIT, "--no-cache", "all"))
    third = run_id_of(tuneline(*SUBMIT, "--no-cache", "evaluate", "--no-cache", "merge"))
    assert len(kfp_server.experiments) == 1
    cached = []
    for run_id in (first, second, third):
        pipeline = kfp_server.runs[run_id]["pipeline_spec"]["pipeline_spec"]
        dags = [part["dag"] for part in pipeline["components"].values() if "dag" in part]
        tasks = [task for dag in [pipeline["root"]["dag"], *dags] for task in dag["tasks"].values()]
        cached.append(sum(task.get("cachingOptions", {}) != {} for task in tasks))
    assert cached[0] > 10
    assert cached[1] == 0
    assert cached[2] == cached[0] - 5, "merge, evaluate twice, and the two pipelines of exports"


def test_a_step_without_cache_that_the_run_does_not_have(kfp_server: Any) -> None:
    result = tuneline(*SUBMIT, "--no-cache", "tran", "--no-cache", "train-on-nodes")
    assert isinstance(result.exception, UserError)
    words = str(result.exception)
    assert words.startswith("--no-cache names train-on-nodes, tran, but this run has no such step")
    assert "merge, plan, prepare, publish, quantize-gguf, quantize-gptq, report, train, or" in words
    assert kfp_server.writes() == []


@pytest.mark.parametrize("kfp_server", [{"multi_user": True}], indirect=True)
def test_a_namespace_is_passed_on(kfp_server: Any) -> None:
    run_id = run_id_of(tuneline(*SUBMIT, "--namespace", "team-a", "--name", "mine"))
    (experiment,) = kfp_server.experiments.values()
    assert experiment["namespace"] == "team-a"
    result = tuneline("status", "--namespace", "team-a")
    assert run_id in result.output
    assert run_id not in tuneline("status", "--namespace", "team-b").output
    assert "Namespace is empty" in str(tuneline("status").exception)


def test_a_recipe_with_a_token_in_it_is_not_sent(kfp_server: Any) -> None:
    token = "hf_" + "abcdefgHIJKLMNOPqrstuvwxyz123456789"
    result = tuneline(*SUBMIT, "--set", f"description={token}")
    assert isinstance(result.exception, RecipeError)
    assert "secret-value" in str(result.exception)
    assert token not in str(result.exception)
    assert kfp_server.writes() == []


@pytest.mark.parametrize(
    ("option", "text"), [("--name", "s3://run {{=1+1}}"), ("--pipeline-root", "s3://$(HOME)")]
)
def test_a_name_that_argo_would_replace_is_not_sent(
    kfp_server: Any, option: str, text: str
) -> None:
    for command in (["submit"], ["schedule", "--every", "1h"]):
        result = tuneline(*command, "demo", *LOCAL, option, text)
        assert isinstance(result.exception, UserError)
        assert f"{option} '{text}' contains" in str(result.exception)
    assert kfp_server.writes() == []
    for given in ((text, None), ("run", text)):
        with pytest.raises(UserError, match="contains"):
            runs.check_passed_on(*given)


def test_a_name_means_its_newest_run(kfp_server: Any) -> None:
    kfp_server.replay("failed", run_id=str(uuid.uuid4()), display_name="line")
    newest = kfp_server.replay("running", run_id=str(uuid.uuid4()), display_name="line")
    assert runs.find_run(connect(None), "line").run_id == newest["run_id"]


def test_cancel_says_what_it_stops_and_happens_once(kfp_server: Any) -> None:
    run = kfp_server.replay("running")
    writes = [f"POST /apis/v2beta1/runs/{run['run_id']}:terminate"]
    assert "cancellation requested; it stops sleeper\n" in tuneline("cancel", "h2-sleep").output
    assert "is being cancelled already" in tuneline("cancel", "h2-sleep").output
    assert kfp_server.writes() == writes
    ended = kfp_server.replay("cancelled")
    error = tuneline("cancel", ended["run_id"]).exception
    assert "has ended already: it is cancelled" in str(error)
    assert kfp_server.writes() == writes


@pytest.mark.parametrize("name", ["failed", "cancelled"])
def test_resume_runs_again_what_failed(kfp_server: Any, name: str) -> None:
    run = kfp_server.replay(name)
    done = tuneline("resume", run["run_id"])
    assert f"resumed, from sleeper{', bye' if name == 'cancelled' else ''}\n" in done.output
    assert f"follow it with: tuneline status {run['run_id']}\n" in done.output
    assert kfp_server.writes() == [f"POST /apis/v2beta1/runs/{run['run_id']}:retry"]
    # It runs now: asking once more is a mistake, and changes nothing.
    again = tuneline("resume", run["run_id"])
    assert isinstance(again.exception, UserError)
    assert "is running: only a run that failed or was cancelled can" in str(again.exception)
    assert len(kfp_server.writes()) == 1


def test_no_such_run(kfp_server: Any) -> None:
    assert "no run 'line': there are none yet" in str(tuneline("status", "line").exception)
    kfp_server.replay("failed", display_name="other")
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
        connect(None)
    # Once, not again and again for 25 seconds.
    assert len(kfp_server.requests) == 1


def test_a_login_page_is_told_from_the_api(kfp_server: Any) -> None:
    kfp_server.page = "<html>log in</html>"
    with pytest.raises(CredentialsError, match="perhaps a login page"):
        connect(None)


def test_a_host_where_nobody_answers(kfp_server: Any) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        host = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ClusterError, match=f"reached at {host} .*refused.*: check"):
            connect(host)
    with pytest.raises(ClusterError, match=r"reached at https://nowhere\.invalid"):
        connect("nowhere.invalid")


def test_a_server_that_goes_away(kfp_server: Any) -> None:
    client = connect(None)
    client.get_kfp_healthz()
    kfp_server.__exit__()
    with pytest.raises(ClusterError, match="cannot be reached at 127.0.0.1"):
        runs.recent_runs(client)
    kfp_server.__exit__ = lambda *_: None


def test_no_host_at_all(kfp_server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KFP_ENDPOINT")
    monkeypatch.delenv("KUBECONFIG", raising=False)
    with pytest.raises(UserError, match="no host: give --host URL or set KFP_ENDPOINT"):
        connect(None)
    assert connect(kfp_server.host).get_kfp_healthz().multi_user is False


def test_the_token_comes_from_the_environment(
    kfp_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KFP_TOKEN", "abc.def")
    assert tuneline("status").exit_code == 0
    assert set(kfp_server.tokens) == {"Bearer abc.def"}


def test_an_error_is_one_line_and_an_exit_code(kfp_server: Any) -> None:
    command = [sys.executable, "-m", "tuneline.pipelines.cli.main", "status", "absent"]
    done = subprocess.run(
        command, env=dict(os.environ), capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr == "error: no run 'absent': there are none yet\n"
    assert done.stdout == ""
