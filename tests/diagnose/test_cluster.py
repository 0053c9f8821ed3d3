"""The exit handler in a pod: real client, recorded objects, a server on localhost."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.notify.webhook_server import WebhookServer
from tests.support.kfp_runs import recorded
from tests.support.servers.kube_server import KubeServer
from tests.support.small_records import new_comparison

from tuneline.diagnose import cluster
from tuneline.diagnose.notification import About, tell
from tuneline.diagnose.outcome import Outcome
from tuneline.diagnose.run import Diagnosis, run
from tuneline.notify import NotifyConfig
from tuneline.notify.message import encode_scores, scores_of
from tuneline.pods import POD_NAME_VARIABLE, RUN_LABEL, STEP_LABEL
from tuneline.runtime.kfp_run import Attempt
from tuneline.runtime.step import EVENTS_VARIABLE
from tuneline.runtime.termination import PATH_VARIABLE, Ending, decode

MANIFESTS = Path(__file__).parents[2] / "manifests"


class World:
    """A cluster with one recorded run, and the exit handler's pod."""

    def __init__(self, kube: KubeServer, log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.kube, self.log, self._monkeypatch = kube, log, monkeypatch
        self.run_id = ""

    def load(self, name: str) -> None:
        pods, workflow = recorded(name)
        for pod in pods:
            self.put("pods", pod)
            if pod["metadata"]["labels"].get(STEP_LABEL) == "diagnose":
                self._monkeypatch.setenv(POD_NAME_VARIABLE, pod["metadata"]["name"])
        self.put("workflows", workflow)
        self.run_id = workflow["metadata"]["labels"][RUN_LABEL]

    def put(self, plural: str, body: dict[str, Any]) -> None:
        self.kube.put(plural, body["metadata"]["name"], **body)

    def put_job(self, name: str, run_id: str, **status: Any) -> None:
        labels = {RUN_LABEL: run_id}
        self.kube.put("trainjobs", name, metadata={"labels": labels}, status=status)

    def jobs(self) -> list[str]:
        return sorted(name for plural, _, name in self.kube.objects if plural == "trainjobs")

    def diagnose(self, state: str = "FAILED") -> Diagnosis:
        return run(state=state, task="exit-handler-1")


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    log = tmp_path / "termination-log"
    log.touch()
    monkeypatch.setenv(PATH_VARIABLE, str(log))
    monkeypatch.delenv(EVENTS_VARIABLE, raising=False)
    monkeypatch.setenv("NAMESPACE", "kubeflow")
    monkeypatch.setattr(cluster, "_NUM_RETRIES", 1)
    with KubeServer() as kube:
        monkeypatch.setenv("KUBECONFIG", str(kube.write_kubeconfig(tmp_path / "kubeconfig")))
        yield World(kube, log, monkeypatch)


def test_a_failed_run(world: World) -> None:
    world.load("probe-memory")
    found = world.diagnose()
    assert (found.succeeded, found.step) == (False, "work")
    assert found.markdown.startswith("# The run failed at work\n")
    assert "**Why:** A process of the step was killed" in found.markdown
    assert "| work | failed (OOMKilled) | " in found.markdown
    left = decode(world.log.read_text())
    assert left is not None and left.result == "failed at work" and "256Mi" in left.text


def test_a_run_from_the_cache_is_good_although_kfp_calls_it_running(world: World) -> None:
    world.load("probe-good-from-cache")
    found = world.diagnose("RUNNING")
    assert found.succeeded and found.markdown.startswith("# The run succeeded\n")
    assert "| work | from the cache | - |" in found.markdown


def test_a_pod_that_was_made_again_has_two_rows(world: World) -> None:
    world.load("probe-pod-deleted")
    text = world.diagnose("COMPLETE").markdown
    assert "| work | failed (PodDeleted) |" in text and "| work, try 2 | succeeded |" in text


def test_a_held_run(world: World) -> None:
    world.load("probe-hold")
    found = world.diagnose("COMPLETE")
    assert found.succeeded and found.step == "gate"
    assert found.markdown.startswith("# The run finished, and the gate held the model back\n")


def test_the_webhooks_are_told_how_the_run_ended(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    webhooks = [NotifyConfig(webhook="MINE"), NotifyConfig(webhook="OTHER", events=("failed",))]
    about = About(webhooks, run_name="nightly 7", recipe_name="demo", target="org/model")
    with WebhookServer() as server:
        monkeypatch.setenv("MINE", server.url)
        for name in ("probe-hold", "probe-memory"):
            world.load(name)
            found = run(state="FAILED", about=about)
    held, failed = server.bodies
    assert (held["event"], held["run"], held["recipe"]) == ("held", "nightly 7", "demo")
    assert held["text"].startswith("The gate did not promote the model")
    assert held["links"] == {"details": "tuneline status 'nightly 7'"}
    assert (failed["event"], failed["step"]) == ("failed", "work")
    assert "was killed" in failed["cause"] and failed["advice"]
    # A webhook that cannot be told is a remark: the explanation of the run stays whole.
    assert "The webhook in OTHER was not told: the environment variable" in found.markdown
    assert found.markdown.startswith("# The run failed at work")


def test_the_sentence_and_the_scores_of_the_report_are_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gained = new_comparison(base=0.26, tuned=0.64, difference=0.38, num_changed=90)
    ending = Ending(
        step="report",
        result="promote",
        text="Right answers rose from 26 % to 64 %.",
        scores=encode_scores(scores_of([gained])),
    )
    attempts = [Attempt(step="report", state="succeeded", ending=ending)]
    about = About([NotifyConfig(webhook="MINE")], "r", "demo", "org/model")
    with WebhookServer() as server:
        monkeypatch.setenv("MINE", server.url)
        assert tell(about, Outcome("succeeded", "Published: org/model."), attempts) == []
    (body,) = server.bodies
    assert (body["event"], body["text"]) == ("promoted", "Right answers rose from 26 % to 64 %.")
    assert body["scores"][0]["text"] == "26 % -> 64 % (+38)"
    assert body["links"]["published to"] == "org/model"


def test_only_the_runs_own_jobs_that_have_not_ended_are_deleted(world: World) -> None:
    world.load("probe-cancelled")
    ended = [{"type": "Complete", "status": "True"}]
    queued = [{"type": "Suspended", "status": "True"}, {"type": "Failed", "status": "False"}]
    world.put_job("mine", world.run_id)
    world.put_job("mine-queued", world.run_id, conditions=queued)
    world.put_job("mine-complete", world.run_id, conditions=ended)
    world.put_job("other", "another-run")
    found = world.diagnose("RUNNING")
    assert world.jobs() == ["mine-complete", "other"]
    assert "Deleted, because nobody followed it: mine, mine-queued." in found.markdown


@pytest.mark.parametrize("refused", ["get pods", "list pods", "get workflows"])
def test_what_may_not_be_read_is_said_and_nothing_fails(world: World, refused: str) -> None:
    world.load("probe-good")
    world.kube.forbidden.add(refused)
    found = world.diagnose("COMPLETE")
    assert found.succeeded
    assert "Kubernetes answered with status 403" in found.markdown


def test_without_the_workflow_a_cached_run_is_not_called_failed(world: World) -> None:
    world.load("probe-good-from-cache")
    world.kube.forbidden.add("get workflows")
    found = world.diagnose("RUNNING")
    assert found.markdown.startswith("# The run has ended\n")
    assert "nobody knows whether the run was cancelled or came from the cache" in found.markdown


def test_an_unreachable_api_is_said(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.load("probe-good")
    world.kube.down = 100
    found = world.diagnose("COMPLETE")
    assert found.succeeded and "status 503" in found.markdown
    monkeypatch.setenv("KUBECONFIG", "/nowhere")
    assert "Kubernetes could not be read: no Kubernetes cluster" in world.diagnose().markdown


@pytest.mark.parametrize("status", ["403", "404"])
def test_without_trainer_there_is_nothing_to_delete(world: World, status: str) -> None:
    world.load("probe-cancelled")
    if status == "403":
        world.kube.forbidden.add("list trainjobs")
    else:
        del world.kube.resources["trainjobs"]
    assert "TrainJob" not in world.diagnose("RUNNING").markdown


def test_a_job_that_may_still_use_gpus_is_said(world: World) -> None:
    world.load("probe-cancelled")
    world.put_job("mine", world.run_id)
    world.kube.forbidden.add("delete trainjobs")
    assert "TrainJob mine, which may still use GPUs, could not" in world.diagnose().markdown


def test_a_run_on_nodes_needs_the_permission(world: World) -> None:
    world.load("probe-cancelled")
    launcher = next(
        body
        for (plural, _, _), body in world.kube.objects.items()
        if plural == "pods" and body["metadata"]["labels"].get(STEP_LABEL) == "prepare"
    )
    launcher["metadata"]["labels"][STEP_LABEL] = "train-on-nodes"
    world.kube.forbidden.add("list trainjobs")
    assert "so the TrainJobs of this run could not be read" in world.diagnose().markdown


def test_objects_of_another_form_do_not_fail_the_exit_handler(world: World) -> None:
    world.load("probe-good")
    for (plural, _, _), body in world.kube.objects.items():
        if plural == "workflows":
            body["status"]["nodes"] = {"a": {"id": "a"}}
    found = world.diagnose("COMPLETE")
    assert found.succeeded and "could not be read (KeyError)" in found.markdown


def test_outside_a_pod_kubernetes_is_not_asked(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.load("probe-good")
    monkeypatch.delenv(POD_NAME_VARIABLE)
    assert "TUNELINE_EVENTS was not set" in world.diagnose("SUCCEEDED").markdown
    assert world.kube.requests == []


def test_the_roles_permit_exactly_these_requests(world: World) -> None:
    world.load("probe-cancelled")
    world.put_job("mine", world.run_id)
    world.diagnose("RUNNING")
    asked = set()
    for request in world.kube.requests:
        method, _, path = request.partition(" ")
        plural, _, name = path.partition("/namespaces/kubeflow/")[2].partition("/")
        asked.add((plural, "delete" if method == "DELETE" else "get" if name else "list"))
    assert asked == {
        ("pods", "get"), ("pods", "list"), ("workflows", "get"), ("trainjobs", "list"),
        ("trainjobs", "delete"),
    }  # fmt: skip
    granted = set()
    for path in ("base/role.yaml", "components/trainer/role.yaml"):
        for rule in yaml.safe_load((MANIFESTS / path).read_text())["rules"]:
            granted |= {(name, verb) for name in rule["resources"] for verb in rule["verbs"]}
    assert asked <= granted
    # Nobody else reads workflows with these roles.
    assert {verb for name, verb in granted if name == "workflows"} == {"get"}
