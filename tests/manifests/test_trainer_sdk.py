"""The runtime `tuneline` and the Kubeflow SDK, which creates TrainJobs for it."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from kube_server import KubeServer, strict

ROOT = Path(__file__).parents[2]
CRDS = ROOT / "tests" / "data" / "crds" / "trainer-v2.3.0"
RUNTIME = ROOT / "manifests" / "components" / "trainer" / "sdk-runtime.yaml"
PAGE = ROOT / "docs" / "tutorial-cluster.md"

# What the SDK 0.5.0 made of the example in the page, without the job's random name.
TRAINJOB: dict[str, Any] = {
    "apiVersion": "trainer.kubeflow.org/v1alpha1",
    "kind": "TrainJob",
    "spec": {
        "runtimeRef": {"kind": "TrainingRuntime", "name": "tuneline"},
        "initializer": {
            "dataset": {"storageUri": "hf://my-org/support-answers", "env": []},
            "model": {
                "storageUri": "hf://Qwen/Qwen2.5-7B-Instruct",
                "env": [{"name": "IGNORE_PATTERNS", "value": "*.msgpack,*.h5,*.bin,*.pt,*.pth"}],
            },
        },
        "trainer": {
            "image": "registry.example.com/team/train:0.1.0",
            "resourcesPerNode": {
                "requests": {"cpu": 8.0, "memory": "64Gi", "nvidia.com/gpu": 1.0},
                "limits": {"cpu": 8.0, "memory": "64Gi", "nvidia.com/gpu": 1.0},
            },
            "env": [
                {"name": "TUNELINE_PREPARE", "value": '{"template": "chatml"}'},
                {"name": "TUNELINE_TRAIN", "value": '{"lora": {"r": 16}, "num_train_epochs": 2}'},
            ],
        },
    },
}  # fmt: skip


def schema_of_trainjobs() -> Any:
    (version,) = yaml.load((CRDS / "trainjobs.yaml").read_text(), yaml.CSafeLoader)["spec"][
        "versions"
    ]
    return version["schema"]["openAPIV3Schema"]


def runtime() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(RUNTIME.read_text(encoding="utf-8"))
    return found


def node_command() -> list[str]:
    (job,) = (
        job
        for job in runtime()["spec"]["template"]["spec"]["replicatedJobs"]
        if job["name"] == "node"
    )
    (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
    return [*container["command"], *container["args"]]


def test_the_trainjob_of_the_sdk_fits_trainers_schema_and_the_runtime() -> None:
    jsonschema.validate(TRAINJOB, strict(schema_of_trainjobs()))
    jobs = {
        job["name"]: job["template"]["spec"]["template"]["spec"]["containers"][0]
        for job in runtime()["spec"]["template"]["spec"]["replicatedJobs"]
    }
    # Trainer's webhook asks for jobs and containers of these names, and for this volume.
    assert all(container["name"] == name for name, container in jobs.items())
    for name in ("dataset-initializer", "model-initializer"):
        assert {"name": "initializer", "mountPath": "/workspace"} in jobs[name]["volumeMounts"]
    script = node_command()[-1]
    for variable in TRAINJOB["spec"]["trainer"]["env"]:
        assert f"${{{variable['name']}:-" in script


def test_the_example_creates_that_trainjob(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("kubeflow.trainer", reason="the Kubeflow SDK is not installed")
    (example,) = re.findall(
        r"```python\n(.*?TrainerClient.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL
    )
    with KubeServer() as server:
        monkeypatch.setenv("KUBECONFIG", str(server.write_kubeconfig(tmp_path / "kubeconfig")))
        server.trainjob_schema = schema_of_trainjobs()
        made = runtime()
        server.put("trainingruntimes", "tuneline", namespace="team", spec=made["spec"],
                   metadata=made["metadata"])  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-c", example], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        ((key, job),) = (each for each in server.objects.items() if each[0][0] == "trainjobs")
    assert key[1] == "team" and done.stdout.split() == [key[2]]
    assert {name: value for name, value in job.items() if name != "metadata"} == TRAINJOB


def test_several_nodes_are_refused(tmp_path: Path) -> None:
    environment = {"PATH": "/usr/bin:/bin", "PET_NNODES": "2", "WORKSPACE": str(tmp_path)}
    done = subprocess.run(
        node_command(), env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "trains on one node, but num_nodes is 2: set num_nodes to 1" in done.stderr
    assert not list(tmp_path.iterdir())
