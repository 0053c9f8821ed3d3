"""The launcher of several nodes, with the real client against an API on localhost.

The server keeps objects as Kubernetes does, and holds what it is sent against the schemas that
Kubeflow Trainer ships. What the launcher finds there is recorded (tests/data/trainer-2.3: statuses,
pods and events of two-node jobs under Trainer 2.3.0, JobSet 0.12.0 and Kubernetes 1.36.2) and
played back in fake time. In the last test, processes that train take the place of pods.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from trainjob_cases import NAME, NODES, OWNER, body_for, schema_of

from tuneline import errors
from tuneline.artifacts import TrainingSummary
from tuneline.errors import (
    ClusterError,
    CredentialsError,
    DataError,
    StoppedError,
    TrainingError,
    UserError,
)
from tuneline.runtime.kubernetes_client import connect
from tuneline.train import TrainConfig
from tuneline.train.ranks.nodes import Outcome, SharedDirectory
from tuneline.train.run import run
from tuneline.train.trainjob.client import TrainJobs
from tuneline.train.trainjob.follow import Launcher
from tuneline.train.trainjob.manifest import NodesConfig
from tuneline.train.trainjob.run import run_on_nodes

RECORDED = Path(__file__).parents[2] / "data" / "trainer-2.3"


def test_a_cluster_without_trainer(server: Any) -> None:
    with pytest.raises(
        ClusterError, match="need Kubeflow Trainer 2.0 or later: install it, or set pl"
    ):
        TrainJobs(connect(num_retries=0), "kubeflow").supported()


class World:
    """The API, its controller and kubelets, in a time that passes only while the launcher waits."""

    def __init__(self, server: Any, directory: Path) -> None:
        self.server, self.shared = server, SharedDirectory(directory)
        self.time = 1.8e9
        server.now = lambda: self.time
        self.plan: list[tuple[float, Callable[[], None]]] = []
        self.num_waits = 0
        jobs = TrainJobs(connect(num_retries=0), "kubeflow")
        server.trainjob_schema = {}
        self.launcher = Launcher(
            jobs,
            body_for({"runtimePatches"}),
            self.shared,
            timeout_seconds=1800,
            max_restarts=3,
            wait=self.wait,
            now=lambda: self.time,
        )

    def after(self, seconds: float, *actions: Callable[[], None]) -> None:
        """Have something happen so long after what was planned last."""
        start = self.plan[-1][0] if self.plan else self.time
        self.plan += [(start + seconds, action) for action in actions]

    def then(self, seconds: float, case: str) -> None:
        """Have a recorded state begin so long after what was planned last."""
        self.after(seconds, lambda: self.play(case))

    def wait(self, seconds: float) -> None:
        self.num_waits += 1
        assert self.num_waits < 2000, "the launcher waits for ever"
        self.time += seconds
        while self.plan and self.plan[0][0] <= self.time:
            self.plan.pop(0)[1]()
        if ("trainjobs", "kubeflow", NAME) not in self.server.objects:
            self.drop("pods")

    @property
    def job(self) -> dict[str, Any]:
        return self.server.objects["trainjobs", "kubeflow", NAME]

    def play(self, case: str) -> None:
        """Put the job into a recorded state, with the pods and the warnings of that moment."""
        text = (RECORDED / f"{case}.json").read_text(encoding="utf-8")
        name = json.loads(text)["trainjob"]["metadata"]["name"]
        # The last part of a pod's name is random.
        text = re.sub(rf"{name}-node-0-(\d)-[a-z0-9]{{5}}", rf"{NAME}-node-0-\1-x", text)
        state = json.loads(text.replace(name, NAME))
        self.job["status"] = state["trainjob"]["status"] or {}
        for plural in ("pods", "events"):
            self.drop(plural)
            for found in state[plural]:
                found["metadata"].pop("namespace", None)
                self.server.put(plural, found["metadata"]["name"], **found)

    def drop(self, plural: str) -> None:
        for key in [key for key in self.server.objects if key[0] == plural]:
            self.server.objects.pop(key)

    def log(self, text: str, number: int = 0) -> None:
        key = (f"{NAME}-node-0-{number}-x", "node")
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(self.time))
        written = len(self.server.logs.get(key, "").splitlines())
        line = f"{moment}.{written:09}Z {text}\n"
        self.server.logs[key] = self.server.logs.get(key, "") + line

    def writes(self, verb: str) -> int:
        return sum(each.startswith(verb) for each in self.server.requests)


@pytest.fixture
def world(server: Any, tmp_path: Path) -> World:
    return World(server, tmp_path)


def test_a_job_that_is_queued_for_an_hour(world: World, caplog: Any) -> None:
    caplog.set_level("INFO")
    world.then(0, "suspended")
    world.then(3600, "running")
    # The limit of half an hour begins with the pods.
    world.then(1700, "complete")
    world.launcher.run()
    lines = [
        line for line in caplog.messages if "waits in its queue (TrainJob is suspended)" in line
    ]
    assert 6 <= len(lines) <= 8
    assert any(line.endswith(" runs") for line in caplog.messages)
    beats = world.writes("PATCH")
    assert 5300 / 60 - 10 <= beats <= 5300 / 60 + 1
    assert world.job["metadata"]["annotations"]["tuneline.dev/heartbeat"].startswith("2027-01-15T")
    assert world.writes("DELETE") == 0


def test_a_job_that_runs_too_long(world: World) -> None:
    world.then(0, "running")
    with pytest.raises(TrainingError, match="reached its time limit of 0.5 h: raise"):
        world.launcher.run()
    assert world.writes("DELETE") == 1


def test_an_api_that_is_away_for_a_minute(world: World, caplog: Any) -> None:
    world.then(0, "running")
    world.after(30, lambda: setattr(world.server, "down", 6))
    world.then(120, "complete")
    world.launcher.run()
    assert ": retrying" in caplog.text


def test_the_launcher_beats_in_every_round_also_while_the_api_is_away(world: World) -> None:
    beats = set()
    world.then(10, "running")
    for number in range(4):
        world.after(10, lambda: beats.add(world.shared.last_beat()))
        if number == 1:
            world.after(0, lambda: setattr(world.server, "down", 2))
    world.then(10, "complete")
    world.launcher.run()
    assert len(beats) == 4 and None not in beats


def test_an_api_that_stays_away(world: World) -> None:
    world.then(0, "running")
    world.after(30, lambda: setattr(world.server, "down", 10**6))
    with pytest.raises(ClusterError, match="503 .*for 15 minutes; the job itself continues: run"):
        world.launcher.run()
    assert world.writes("DELETE") == 0


def test_a_log_that_is_cut_loses_no_line_and_doubles_none(world: World, caplog: Any) -> None:
    caplog.set_level("INFO")
    world.then(0, "running")
    for number in range(40):
        world.after(7, lambda number=number: world.log(f"step {number} of 40"))
        if number % 9 == 4:
            world.after(0, lambda: setattr(world.server, "down", 3))
    world.then(10, "complete")
    world.launcher.run()
    said = [line.partition(": ")[2] for line in caplog.messages if " of 40" in line]
    assert said == [f"step {number} of 40" for number in range(40)]


def test_a_pod_that_is_evicted(world: World, caplog: Any) -> None:
    world.then(0, "running")
    # The pod says why it goes only until it is gone, which is before the job fails.
    world.then(60, "evicted-1")
    world.then(30, "evicted-2")
    world.then(60, "running")
    world.then(60, "complete")
    world.launcher.run()
    assert "lost a pod (" in caplog.text and "EvictionByEvictionAPI" in caplog.text
    assert (world.writes("POST"), world.writes("DELETE")) == (2, 1)


def test_a_pod_that_is_killed_for_memory_is_not_tried_again(world: World) -> None:
    world.then(0, "running")
    world.then(60, "killed-for-memory")
    with pytest.raises(
        TrainingError, match="-node-0-1-x was killed because it exceeded its memory limit .96Mi"
    ):
        world.launcher.run()
    assert world.writes("POST") == 1


@pytest.mark.parametrize(
    ("case", "text"),
    [
        ("no-image", 'ImagePullBackOff: Back-off pulling image "registry.invalid/none:9"'),
        ("no-secret", 'CreateContainerConfigError: secret "nosuch" not found'),
    ],
)
def test_a_pod_without_its_image_or_secret(world: World, caplog: Any, case: str, text: str) -> None:
    caplog.set_level("INFO")
    world.then(0, case)
    with pytest.raises(ClusterError, match=f"does not start .{text}"):
        world.launcher.run()
    # Half an hour, said every ten minutes; and its GPUs are given back.
    said = [line for line in caplog.messages if f"waits for its pods ({text}" in line]
    assert 3 <= len(said) <= 4
    assert world.writes("DELETE") == 1


def test_pods_that_a_quota_refuses_wait_and_it_is_said(world: World, caplog: Any) -> None:
    caplog.set_level("INFO")
    world.then(0, "quota")
    world.then(3600, "running")
    world.then(1700, "complete")
    world.launcher.run()
    text = (
        "waits for its pods (exceeded quota: tuneline, requested: requests.cpu=20m, "
        "used: requests.cpu=40m, limited: requests.cpu=30m)"
    )
    said = [line for line in caplog.messages if line.endswith(text)]
    assert 6 <= len(said) <= 8
    assert world.writes("DELETE") == 0


@pytest.mark.parametrize("case", ["quota-of-jobs", "quota-of-jobsets"])
def test_a_job_that_can_never_fit_a_quota_fails(world: World, case: str) -> None:
    world.then(0, case)
    with pytest.raises(
        ClusterError, match=r"cannot be created \(exceeded quota: tuneline.*: request less"
    ):
        world.launcher.run()
    assert world.writes("DELETE") == 1


def test_a_launcher_that_may_not_list_events_goes_on(world: World) -> None:
    world.server.forbidden.add("list events")
    world.then(0, "quota")
    world.then(60, "running")
    world.then(60, "complete")
    world.launcher.run()


def test_a_job_beyond_its_deadline(world: World) -> None:
    world.then(0, "running")
    world.then(60, "deadline")
    with pytest.raises(TrainingError, match="reached its time limit of 0.5 h: raise"):
        world.launcher.run()


def test_pods_that_wait_for_a_node_wait_on(world: World, caplog: Any) -> None:
    caplog.set_level("INFO")
    world.then(0, "unschedulable")
    world.then(1700, "running")
    world.then(60, "complete")
    world.launcher.run()
    assert (
        "waits for its pods (Unschedulable: 0/1 nodes are available: 1 Insufficient cpu"
        in caplog.text
    )
    assert world.writes("DELETE") == 0


def test_a_job_that_is_disrupted_for_ever(world: World) -> None:
    for _ in range(6):
        world.then(30, "evicted-1")
        world.then(30, "evicted-2")
    with pytest.raises(TrainingError, match=r"lost a pod .*EvictionBy.*recreated 5 times"):
        world.launcher.run()
    assert world.writes("POST") == 6


def test_a_job_that_fails_again_and_again(world: World) -> None:
    for _ in range(4):
        world.then(30, "pod-deleted")
    with pytest.raises(TrainingError, match=r"ReachedMaxRestarts: jobset failed.*created 3 times"):
        world.launcher.run()
    assert world.writes("POST") == 4


def test_an_error_of_the_step_is_raised_with_the_pods_logs(world: World, caplog: Any) -> None:
    world.then(0, "running")
    world.after(0, *[lambda n=n: world.log(f"line {n} of node 1", 1) for n in range(300)])
    world.after(
        30,
        lambda: world.shared.write_outcome(Outcome("DataError", "there is no row to train on")),
        lambda: world.play("exit-1"),
    )
    with pytest.raises(DataError, match="there is no row to train on"):
        world.launcher.run()
    lines = [line for line in caplog.messages if "of node 1" in line]
    assert len(lines) == 200
    assert lines[-1].endswith("-node-0-1-x: line 299 of node 1")
    assert world.writes("DELETE") == 0


def test_a_launcher_that_was_started_again_finds_its_job(world: World, caplog: Any) -> None:
    caplog.set_level("INFO")
    world.server.put("trainjobs", NAME)
    world.then(10, "running")
    world.then(30, "complete")
    world.launcher.run()
    assert "already exists: following it" in caplog.text
    assert world.writes("POST") == 0


def test_a_job_that_is_still_being_deleted_is_waited_for(world: World) -> None:
    # Its pods have their grace period, and the next try of the step is faster.
    when = {"deletionTimestamp": "2027-01-15T08:00:00Z"}
    key = ("trainjobs", "kubeflow", NAME)
    world.server.put("trainjobs", NAME, metadata=when)
    delete = world.server.objects.pop
    world.server.finalizers = True
    world.after(120, lambda: delete(key), lambda: setattr(world.server, "finalizers", False))
    world.then(30, "running")
    world.then(30, "complete")
    world.launcher.run()
    assert world.writes("POST") == 1


def test_a_job_begins_only_when_the_jobset_of_the_last_one_is_gone(world: World) -> None:
    # It would take over the JobSet, which has failed or is being deleted.
    world.server.put("jobsets", NAME)
    world.after(119, lambda: world.server.objects.pop(("jobsets", "kubeflow", NAME)))
    posts: list[int] = []
    world.after(0, lambda: posts.append(world.writes("POST")))
    world.then(30, "running")
    world.then(30, "complete")
    world.launcher.run()
    assert posts == [0]
    assert world.writes("POST") == 1


def test_a_job_is_deleted_so_that_trainer_does_not_make_its_pods_again(world: World) -> None:
    world.then(0, "running")
    world.then(60, "pod-deleted")
    world.then(60, "complete")
    world.launcher.run()
    # With Foreground, the real Trainer 2.3 made two more pairs of pods, in 34 seconds instead of 8.
    assert world.server.deletions == ["Background"]


@pytest.mark.parametrize(("kind", "again"), [("DataError", False), ("TrainingError", True)])
def test_a_step_that_is_retried(world: World, kind: str, again: bool) -> None:
    world.server.put("trainjobs", NAME)
    world.shared.write_outcome(Outcome(kind, "it did not work"))
    world.play("exit-1")
    world.then(30, "complete")
    if again:
        world.launcher.run()
        assert (world.writes("DELETE"), world.writes("POST")) == (1, 1)
    else:
        # What the caller has to mend is the same the second time.
        with pytest.raises(getattr(errors, kind), match="it did not work"):
            world.launcher.run()
        assert world.writes("POST") == 0


def test_a_launcher_that_is_told_to_stop(world: World) -> None:
    world.then(0, "running")
    world.after(60, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(StoppedError):
        world.launcher.run()
    assert world.writes("DELETE") == 1
    assert ("trainjobs", "kubeflow", NAME) not in world.server.objects


@pytest.mark.parametrize(("num_refused", "is_deleted"), [(8, True), (10**6, False)])
def test_a_launcher_that_is_told_to_stop_while_the_api_is_away(
    world: World, caplog: Any, num_refused: int, is_deleted: bool
) -> None:
    world.then(0, "running")
    world.after(
        60,
        lambda: setattr(world.server, "down", num_refused),
        lambda: os.kill(os.getpid(), signal.SIGTERM),
    )
    before = world.time
    with pytest.raises(StoppedError):
        world.launcher.run()
    assert world.time - before <= 60 + 10 + 20
    assert (("trainjobs", "kubeflow", NAME) not in world.server.objects) == is_deleted
    assert ("deleted by the run's exit handler" in caplog.text) != is_deleted


def test_a_job_that_somebody_deleted(world: World) -> None:
    world.after(30, lambda: world.server.objects.pop(("trainjobs", "kubeflow", NAME)))
    with pytest.raises(ClusterError, match="no longer exists, because somebody else deleted it"):
        world.launcher.run()


@pytest.mark.parametrize("verb", ["create", "get", "patch"])
def test_a_right_that_is_missing_is_named(world: World, verb: str) -> None:
    world.server.forbidden.add(f"{verb} trainjobs")
    with pytest.raises(CredentialsError, match=r"\(403: .*trainjobs.*tuneline-runner"):
        world.launcher.run()


def test_outside_of_a_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("KFP_POD_NAME", "HOSTNAME", "NAMESPACE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="requires running in a pod of the cluster"):
        run_on_nodes(
            TrainConfig(),
            NodesConfig.parse(NODES),
            base_model_dir=tmp_path,
            dataset_dir=tmp_path,
            adapter_dir=tmp_path / "adapter",
            curves_path=tmp_path / "curves.html",
        )


SETTINGS = {
    "dtype": "float32",
    "learning_rate": 5e-3,
    "optim": "adamw_torch",
    "warmup_steps": 0,
    "max_steps": 2,
    "global_batch_size": 4,
    "micro_batch_size": 2,
    "packing": False,
}


def control(server: Any, logs: Path) -> None:
    """Do what Trainer does: start a job's pods, here as processes, and say how they ended."""
    while not (found := [each for key, each in server.objects.items() if key[0] == "trainjobs"]):
        time.sleep(0.05)
    (job,) = found
    trainer = job["spec"]["trainer"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pods = []
    for number in range(trainer["numNodes"]):
        name = f"{job['metadata']['name']}-node-0-{number}-x"
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        environment |= {each["name"]: each["value"] for each in trainer["env"]}
        environment |= {
            "PET_NNODES": str(trainer["numNodes"]),
            "PET_NODE_RANK": str(number),
            "PET_NPROC_PER_NODE": str(trainer["numProcPerNode"]),
            "PET_MASTER_ADDR": "127.0.0.1",
            "PET_MASTER_PORT": str(port),
        }
        with open(logs / name, "w") as log:
            command = [sys.executable, *trainer["command"][1:]]
            pods.append(
                subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
            )
        labels = {"jobset.sigs.k8s.io/jobset-name": job["metadata"]["name"]}
        server.put("pods", name, metadata={"labels": labels}, status={"phase": "Running"})
    codes = [pod.wait(180) for pod in pods]
    for path in logs.iterdir():
        # A kubelet puts the time before each line.
        lines = path.read_text().splitlines(keepends=True)
        stamped = (f"2027-01-15T08:00:00.{n:09}Z {line}" for n, line in enumerate(lines))
        server.logs[path.name, "node"] = "".join(stamped)
    kind = "Failed" if any(codes) else "Complete"
    conditions = [{"type": kind, "status": "True", "reason": str(codes), "message": ""}]
    job["status"] = {"conditions": conditions}


@pytest.mark.slow
def test_two_nodes_learn_what_one_does(
    server: Any,
    tmp_path: Path,
    tiny_model_dir: Path,
    dataset_dir: Any,
    answer_rows: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: Any,
) -> None:
    caplog.set_level("INFO")
    server.trainjob_schema = schema_of("v2.3.0")
    owner = {**OWNER, "controller": True}
    metadata = {"labels": {"pipeline/runid": "run-1"}, "ownerReferences": [owner]}
    server.put("pods", "step-pod", metadata=metadata)
    monkeypatch.setenv("KFP_POD_NAME", "step-pod")
    monkeypatch.setenv("NAMESPACE", "kubeflow")
    monkeypatch.setattr("tuneline.train.trainjob.follow.POLL_SECONDS", 0.1)
    data = dataset_dir(answer_rows)
    (tmp_path / "logs").mkdir()
    controller = threading.Thread(target=control, args=(server, tmp_path / "logs"), daemon=True)
    controller.start()
    config = TrainConfig.parse(SETTINGS)
    on_cpu = {"accelerator": None, "ranks_per_node": 1, "scratch_size": None, "secrets": {}}
    found = run_on_nodes(
        config,
        NodesConfig.parse({**NODES, **on_cpu}),
        base_model_dir=tiny_model_dir,
        dataset_dir=data,
        adapter_dir=tmp_path / "adapter",
        curves_path=tmp_path / "curves.html",
        shared_dir=tmp_path / "shared",
    )
    controller.join()
    alone = run(
        config,
        base_model_dir=tiny_model_dir,
        dataset_dir=data,
        adapter_dir=tmp_path / "alone",
        curves_path=tmp_path / "alone.html",
    )
    losses = [[p.loss for p in one.history if p.loss is not None] for one in (found, alone)]
    assert len(losses[0]) == 2
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert found.num_ranks == 2
    assert TrainingSummary.read(tmp_path / "adapter") == found
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "curves.html").stat().st_size > 1000
    # Nothing is left: the job is deleted, the volume is empty.
    assert not [key for key in server.objects if key[0] == "trainjobs"]
    assert [path.name for path in (tmp_path / "shared" / "tuneline").iterdir()] == []
    assert "-node-0-0-x: INFO tuneline.train.ranks.launch: starting 2 ranks on cpu" in caplog.text
    (made,) = [each for each in server.requests if each.startswith("POST")]
    assert made.endswith("/namespaces/kubeflow/trainjobs")
