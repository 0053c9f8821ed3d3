"""A TrainJob for the tests of the launcher, and the schemas that Kubeflow Trainer ships."""

from pathlib import Path
from typing import Any

import yaml

from tuneline.train.trainjob.manifest import NodesConfig, build

CRDS = Path(__file__).parents[1] / "data" / "crds"

NODES: dict[str, Any] = {
    "num_nodes": 2,
    "ranks_per_node": 8,
    "accelerator": "nvidia.com/gpu",
    "cpu_request": "96",
    "cpu_limit": "96",
    "memory_request": "900Gi",
    "memory_limit": "900Gi",
    "timeout_hours": 0.5,
    "image": "tuneline/train:0.1.0",
    "runtime": "tuneline",
    "runtime_kind": "TrainingRuntime",
    "shared_claim": "tuneline-shared",
    "shared_memory": "64Gi",
    "scratch_size": "100Gi",
    "node_selector": {"pool": "tuning"},
    "accelerator_products": ["NVIDIA-H100-80GB-HBM3"],
    "tolerations": [{"key": "nvidia.com/gpu"}],
    "environment": {
        "HF_ENDPOINT": "https://hub.example.com",
        "SSL_CERT_FILE": "/etc/tuneline/ca/c",
    },
    "ca_config_map": "company-ca",
    "secrets": {"wandb": {"key": "WANDB_API_KEY"}},
    "queue": "team",
    "workload_priority_class": "batch",
    "run_as_user": 65532,
}
OWNER = {"apiVersion": "argoproj.io/v1alpha1", "kind": "Workflow", "name": "w", "uid": "1-2"}
NAME = "tuneline-train-0123456789ab"


def schema_of(version: str) -> dict[str, Any]:
    path = CRDS / f"trainer-{version}" / "trainjobs.yaml"
    (found,) = yaml.safe_load(path.read_text())["spec"]["versions"]
    return found["schema"]["openAPIV3Schema"]


def body_for(supported: set[str], **changed: Any) -> dict[str, Any]:
    return build(
        NodesConfig.parse({**NODES, **changed}),
        name=NAME,
        directory=Path("/shared/tuneline", NAME),
        labels={"app.kubernetes.io/part-of": "tuneline", "pipeline/runid": "run-1"},
        owner=OWNER,
        supported=supported,
    )
