"""The Kubeflow TrainJob of a training on several nodes.

A TrainJob refers to a training runtime, a template for its pods, and overrides parts of it:

- The image, the command, the resources and the environment are in `spec.trainer`, in every version
  of Trainer.
- Volumes, node selection and pull secrets are in a field whose name depends on the version:
  `podSpecOverrides` (2.0), `podTemplateOverrides` (2.1) or `runtimePatches` (2.2 and later). The
  fields in the API's schema tell which version is installed.
- Labels and annotations of the pods can be set from 2.1 on, their user from 2.2 on.
- The rest of pod security, and the grace period, cannot be overridden in every version, so they are
  in the runtime that tuneline provides (manifests/components/trainer).
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from tuneline.errors import ClusterError
from tuneline.images import USER_ID
from tuneline.placement import Toleration, node_fields
from tuneline.pods import (
    CA_PATH,
    NO_SIDECAR,
    PART_OF_LABEL,
    PRIORITY_LABEL,
    QUEUE_LABEL,
    RUN_LABEL,
    SCRATCH_PATH,
    SHARED_MEMORY_PATH,
    SHARED_PATH,
    STEP_LABEL,
    TRAINJOBS,
    product_label,
)
from tuneline.strict_model import StrictModel
from tuneline.train.checkpoints import ROOT_VARIABLE
from tuneline.train.ranks.nodes import DIRECTORY_VARIABLE

GROUP, VERSION, PLURAL = TRAINJOBS
CONTAINER = "node"
"""Trainer's name of the replicated job that trains, and of the container in its pods."""
HEARTBEAT = "tuneline.dev/heartbeat"
"""Annotation with the time of the launcher's last heartbeat."""
MANAGER = "tuneline.dev/launcher"
"""Name of the launcher as the author of a runtime patch."""
NODE_LABELS: dict[str, str] = dict([PART_OF_LABEL, (STEP_LABEL, "train-node")])
"""Labels of the job's pods, which the network policies of manifests select."""


class NodesConfig(StrictModel):
    """Nodes that train together, derived from the recipe's placement."""

    num_nodes: int = Field(ge=2)
    """Number of nodes, each with one pod."""
    ranks_per_node: int = Field(ge=1)
    """Number of ranks on each node."""
    accelerator: str | None
    """Resource name of the accelerator, one per rank; None trains on CPUs."""
    cpu_request: str
    """CPU request of each pod, as a Kubernetes quantity."""
    cpu_limit: str
    """CPU limit of each pod, as a Kubernetes quantity."""
    memory_request: str
    """Memory request of each pod, as a Kubernetes quantity."""
    memory_limit: str
    """Memory limit of each pod, as a Kubernetes quantity."""
    timeout_hours: float = Field(gt=0)
    """Longest running time in hours, from the first pod on. Time in a queue does not count."""
    image: str
    """Container image of the train step."""
    runtime: str
    """Name of the training runtime."""
    runtime_kind: Literal["TrainingRuntime", "ClusterTrainingRuntime"]
    """Kind of the training runtime."""
    shared_claim: str
    """ReadWriteMany claim that all pods mount."""
    shared_memory: str | None = None
    """Size limit of /dev/shm, as a Kubernetes quantity; None: the container runtime's default."""
    scratch_size: str | None = None
    """Size limit of a volume for temporary files, as a Kubernetes quantity; None mounts none."""
    node_selector: dict[str, str] = {}
    """Labels that a node must have."""
    accelerator_products: list[str] = []
    """GPU product labels of which a node must have one; an empty list accepts every node."""
    tolerations: list[Toleration] = []
    """Tolerations of each pod."""
    environment: dict[str, str] = {}
    """Environment variables of each pod."""
    ca_config_map: str | None = None
    """ConfigMap with the certificates that `environment` names; None mounts none."""
    secrets: dict[str, dict[str, str]] = {}
    """For each secret, the environment variable of each of its keys."""
    image_pull_secrets: list[str] = []
    """Secrets for the image registry."""
    queue: str | None = None
    """Kueue's LocalQueue; None sets none."""
    workload_priority_class: str | None = None
    """Kueue's workload priority class; None sets none."""
    run_as_user: int | None = None
    """Numeric user of the pods; None leaves it to the runtime, the platform or the image."""


def build(
    config: NodesConfig,
    *,
    name: str,
    directory: Path,
    labels: dict[str, str],
    owner: dict[str, Any] | None,
    supported: Collection[str],
) -> dict[str, Any]:
    """Return the TrainJob as a resource.

    Args:
        config: Nodes that the job asks for.
        name: Name of the job.
        directory: Directory of the job on the shared volume, as its pods see it.
        labels: Labels of the job, to which those for the queue are added.
        owner: Owner reference; Kubernetes deletes the job together with its owner. None sets none.
        supported: Fields of `spec` that the installed Trainer knows.

    Raises:
        ClusterError: the installed Trainer lacks a field that the recipe needs.
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
    spec |= _patches(config, labels, supported)
    return {
        "apiVersion": f"{GROUP}/{VERSION}",
        "kind": "TrainJob",
        "metadata": metadata,
        "spec": spec,
    }


def _environment(config: NodesConfig, directory: Path) -> list[dict[str, Any]]:
    values = {
        **config.environment,
        DIRECTORY_VARIABLE: str(directory),
        # Checkpoints are outside the job's directory, so that they remain for the next job.
        ROOT_VARIABLE: str(directory.parent / "checkpoints"),
    }
    if config.scratch_size:
        values["TMPDIR"] = SCRATCH_PATH
    variables: list[dict[str, Any]] = [
        {"name": name, "value": value} for name, value in values.items()
    ]
    for secret, names in config.secrets.items():
        for key, name in names.items():
            reference = {"name": secret, "key": key, "optional": True}
            variables.append({"name": name, "valueFrom": {"secretKeyRef": reference}})
    return variables


def _patches(
    config: NodesConfig, labels: dict[str, str], supported: Collection[str]
) -> dict[str, Any]:
    """Return the field that changes the runtime's pods, in the form that this Trainer knows."""
    pod = _pod(config)
    run = {RUN_LABEL: labels[RUN_LABEL]} if RUN_LABEL in labels else {}
    metadata = {"labels": {**NODE_LABELS, **run}, "annotations": dict([NO_SIDECAR])}
    if "runtimePatches" in supported:
        if config.run_as_user is not None:
            pod["securityContext"] = {"runAsUser": config.run_as_user}
        template = {"metadata": metadata, "spec": pod}
        job = {"name": CONTAINER, "template": {"spec": {"template": template}}}
        runtime = {"template": {"spec": {"replicatedJobs": [job]}}}
        return {"runtimePatches": [{"manager": MANAGER, "trainingRuntimeSpec": runtime}]}
    if config.run_as_user not in (None, USER_ID):
        raise ClusterError(
            f"Trainer 2.0 and 2.1 cannot set the user of a TrainJob's pods to {config.run_as_user} "
            f"(placement.run_as_user), and the user of the image is {USER_ID}: remove run_as_user "
            f"or set it to {USER_ID}, or install Trainer 2.2 or later"
        )
    target = {"targetJobs": [{"name": CONTAINER}]}
    if "podTemplateOverrides" in supported:
        return {"podTemplateOverrides": [{**target, "metadata": metadata, "spec": pod}]}
    if "podSpecOverrides" not in supported:
        raise ClusterError(
            "the TrainJob of this cluster has none of the fields runtimePatches, "
            "podTemplateOverrides and podSpecOverrides: install Kubeflow Trainer 2.0 or later"
        )
    return {"podSpecOverrides": [{**target, **_of_trainer_2_0(pod, config)}]}


def _of_trainer_2_0(pod: dict[str, Any], config: NodesConfig) -> dict[str, Any]:
    """Return the pod without the fields that Trainer 2.0 lacks."""
    products = config.accelerator_products
    if pod.pop("affinity", None) and len(products) > 1:
        raise ClusterError(
            f"Trainer 2.0 cannot choose among the GPU products {', '.join(products)}: keep one in "
            "placement.accelerator_products, or install Trainer 2.1 or later"
        )
    if products:
        label = product_label(config.accelerator or "")
        pod["nodeSelector"] = {**pod.get("nodeSelector", {}), label: products[0]}
    if pod.pop("imagePullSecrets", None):
        raise ClusterError(
            "Trainer 2.0 cannot set image pull secrets: add them to the namespace's default "
            "service account and remove placement.image_pull_secrets, or install Trainer 2.1 or "
            "later"
        )
    return pod


def _pod(config: NodesConfig) -> dict[str, Any]:
    claim = {"claimName": config.shared_claim}
    volumes: list[dict[str, Any]] = [{"name": "shared", "persistentVolumeClaim": claim}]
    mounts: list[dict[str, Any]] = [{"name": "shared", "mountPath": SHARED_PATH}]
    if config.shared_memory:
        memory = {"medium": "Memory", "sizeLimit": config.shared_memory}
        volumes.append({"name": "dshm", "emptyDir": memory})
        mounts.append({"name": "dshm", "mountPath": SHARED_MEMORY_PATH})
    if config.scratch_size:
        volumes.append({"name": "scratch", "emptyDir": {"sizeLimit": config.scratch_size}})
        mounts.append({"name": "scratch", "mountPath": SCRATCH_PATH})
    if config.ca_config_map:
        volumes.append({"name": "ca-bundle", "configMap": {"name": config.ca_config_map}})
        mounts.append({"name": "ca-bundle", "mountPath": CA_PATH, "readOnly": True})
    pod: dict[str, Any] = {
        "volumes": volumes,
        "containers": [{"name": CONTAINER, "volumeMounts": mounts}],
    }
    pod |= node_fields(
        node_selector=config.node_selector,
        accelerator=config.accelerator or "",
        accelerator_products=config.accelerator_products,
        tolerations=config.tolerations,
    )
    if config.image_pull_secrets:
        pod["imagePullSecrets"] = [{"name": name} for name in config.image_pull_secrets]
    return pod
