"""The custom resource of a training on several nodes: a Kubeflow TrainJob.

What a TrainJob can say of its pods has another name in each minor version of Trainer, and the
installed one is known by the API's own schema: `podSpecOverrides` (2.0), `podTemplateOverrides`
(2.1), `runtimePatches` (2.2 and later). Environment goes into `trainer.env` in all of them: a patch
of it is refused. What no version can patch, pod security and the grace period, is in the runtime
that comes with tuneline (manifests/components/trainer).
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from tuneline.errors import ClusterError
from tuneline.placement import Toleration
from tuneline.pods import (
    PRIORITY_LABEL,
    PRODUCT_LABEL,
    QUEUE_LABEL,
    SCRATCH_PATH,
    SHARED_MEMORY_PATH,
    SHARED_PATH,
)
from tuneline.strict_model import StrictModel
from tuneline.train.checkpoints import ROOT_VARIABLE
from tuneline.train.ranks.board import DIRECTORY_VARIABLE

GROUP, VERSION, PLURAL = "trainer.kubeflow.org", "v1alpha1", "trainjobs"
CONTAINER = "node"
"""Trainer's name for the replicated job that trains, and for the container in it."""
HEARTBEAT = "tuneline.dev/heartbeat"
"""Annotation with the time at which the launcher last looked after the job."""
MANAGER = "tuneline.dev/launcher"


class NodesConfig(StrictModel):
    """Nodes that train together; made from the recipe's placement."""

    num_nodes: int = Field(ge=2)
    ranks_per_node: int = Field(ge=1)
    accelerator: str | None
    """Resource name; each rank has one. None: on CPUs."""
    cpu_request: str
    cpu_limit: str
    memory_request: str
    memory_limit: str
    timeout_hours: float = Field(gt=0)
    """From the first pod on; waiting in a queue does not count."""
    image: str
    runtime: str
    runtime_kind: Literal["TrainingRuntime", "ClusterTrainingRuntime"]
    shared_claim: str
    shared_memory: str | None = None
    scratch_size: str | None = None
    node_selector: dict[str, str] = {}
    accelerator_products: list[str] = []
    tolerations: list[Toleration] = []
    secrets: dict[str, dict[str, str]] = {}
    image_pull_secrets: list[str] = []
    queue: str | None = None
    workload_priority_class: str | None = None


def build(
    config: NodesConfig,
    *,
    name: str,
    directory: Path,
    labels: dict[str, str],
    owner: dict[str, Any] | None,
    supported: Collection[str],
) -> dict[str, Any]:
    """Return the TrainJob.

    Args:
        config: what it asks for.
        name: of the job.
        directory: on the shared volume, as all its pods see it.
        labels: beside those of the queue.
        owner: the object that it goes with.
        supported: the fields of `spec` that the cluster's Trainer knows.

    Raises:
        ClusterError: that Trainer cannot say what the recipe asks for.
    """
    metadata: dict[str, Any] = {"name": name, "labels": dict(labels), "annotations": {}}
    if config.queue:
        metadata["labels"][QUEUE_LABEL] = config.queue
    if config.workload_priority_class:
        metadata["labels"][PRIORITY_LABEL] = config.workload_priority_class
    if owner is not None:
        metadata["ownerReferences"] = [owner]
    requests = {"cpu": config.cpu_request, "memory": config.memory_request}
    limits = {"cpu": config.cpu_limit, "memory": config.memory_limit}
    if config.accelerator:
        requests[config.accelerator] = limits[config.accelerator] = str(config.ranks_per_node)
    spec: dict[str, Any] = {
        "runtimeRef": {"apiGroup": GROUP, "kind": config.runtime_kind, "name": config.runtime},
        "trainer": {
            "image": config.image,
            "command": ["python3", "-m", "tuneline.train.trainjob.pod"],
            "numNodes": config.num_nodes,
            "numProcPerNode": config.ranks_per_node,
            "resourcesPerNode": {"requests": requests, "limits": limits},
            "env": _environment(config, directory),
        },
    }
    if "activeDeadlineSeconds" in supported:
        spec["activeDeadlineSeconds"] = int(config.timeout_hours * 3600)
    spec |= _patches(config, supported)
    return {
        "apiVersion": f"{GROUP}/{VERSION}",
        "kind": "TrainJob",
        "metadata": metadata,
        "spec": spec,
    }


def _environment(config: NodesConfig, directory: Path) -> list[dict[str, Any]]:
    values = {
        DIRECTORY_VARIABLE: str(directory),
        # Beside the jobs' directories: the next job of the same training goes on from them.
        ROOT_VARIABLE: str(directory.parent / "checkpoints"),
    }
    if config.scratch_size:
        values["TMPDIR"] = SCRATCH_PATH
    found: list[dict[str, Any]] = [{"name": key, "value": value} for key, value in values.items()]
    for secret, variables in config.secrets.items():
        for key, variable in variables.items():
            reference = {"name": secret, "key": key, "optional": True}
            found.append({"name": variable, "valueFrom": {"secretKeyRef": reference}})
    return found


def _patches(config: NodesConfig, supported: Collection[str]) -> dict[str, Any]:
    pod = _pod(config)
    if "runtimePatches" in supported:
        job = {"name": CONTAINER, "template": {"spec": {"template": {"spec": pod}}}}
        runtime = {"template": {"spec": {"replicatedJobs": [job]}}}
        return {"runtimePatches": [{"manager": MANAGER, "trainingRuntimeSpec": runtime}]}
    target = {"targetJobs": [{"name": CONTAINER}]}
    if "podTemplateOverrides" in supported:
        return {"podTemplateOverrides": [{**target, "spec": pod}]}
    if "podSpecOverrides" not in supported:
        raise ClusterError(
            "this cluster's TrainJob has none of runtimePatches, podTemplateOverrides and "
            "podSpecOverrides: it needs Kubeflow Trainer 2.0 or later"
        )
    products = config.accelerator_products
    if pod.pop("affinity", None) and len(products) > 1:
        raise ClusterError(
            f"Trainer 2.0 cannot choose among {', '.join(products)}: name one in "
            "placement.accelerator_products, or have Trainer updated"
        )
    if products:
        pod["nodeSelector"] = {**pod.get("nodeSelector", {}), PRODUCT_LABEL: products[0]}
    if pod.pop("imagePullSecrets", None):
        raise ClusterError(
            "Trainer 2.0 cannot set image pull secrets: put them into the namespace's default "
            "service account and take placement.image_pull_secrets out, or have Trainer updated"
        )
    return {"podSpecOverrides": [{**target, **pod}]}


def _pod(config: NodesConfig) -> dict[str, Any]:
    claim = {"claimName": config.shared_claim}
    volumes: list[dict[str, Any]] = [{"name": "shared", "persistentVolumeClaim": claim}]
    mounts = [{"name": "shared", "mountPath": SHARED_PATH}]
    if config.shared_memory:
        memory = {"medium": "Memory", "sizeLimit": config.shared_memory}
        volumes.append({"name": "dshm", "emptyDir": memory})
        mounts.append({"name": "dshm", "mountPath": SHARED_MEMORY_PATH})
    if config.scratch_size:
        volumes.append({"name": "scratch", "emptyDir": {"sizeLimit": config.scratch_size}})
        mounts.append({"name": "scratch", "mountPath": SCRATCH_PATH})
    pod: dict[str, Any] = {
        "volumes": volumes,
        "containers": [{"name": CONTAINER, "volumeMounts": mounts}],
    }
    if config.node_selector:
        pod["nodeSelector"] = dict(config.node_selector)
    if config.tolerations:
        pod["tolerations"] = [each.model_dump(exclude_none=True) for each in config.tolerations]
    if config.accelerator_products:
        wanted = {
            "key": PRODUCT_LABEL,
            "operator": "In",
            "values": list(config.accelerator_products),
        }
        terms = {"nodeSelectorTerms": [{"matchExpressions": [wanted]}]}
        pod["affinity"] = {
            "nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": terms}
        }
    if config.image_pull_secrets:
        pod["imagePullSecrets"] = [{"name": name} for name in config.image_pull_secrets]
    return pod
