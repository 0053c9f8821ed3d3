"""A KServe InferenceService with one container of its own, placed as a recipe says.

The InferenceService names the server's image itself, so the cluster needs no ServingRuntime. Its
field `storageUris`, with which KServe downloads a base model and an adapter side by side, needs
KServe 0.16 or later.
"""

import hashlib
import re
from dataclasses import dataclass, field
from typing import Any

from tuneline.placement import PlacementConfig, node_fields
from tuneline.pods import MANAGED_BY, QUEUE_LABEL, SHARED_MEMORY_PATH
from tuneline.serving.model_sizes import in_mib

GROUP, VERSION, PLURAL = "serving.kserve.io", "v1beta1", "inferenceservices"
KIND = "InferenceService"

MODELS_PATH = "/mnt/models"
"""Where KServe puts what it downloads."""
PORT = 8080
CONTAINER = "kserve-container"
"""Name by which KServe knows the container that answers requests."""
MAX_NAME_LENGTH = 40
"""KServe makes host names of a service's name and its namespace, which may have 63 characters."""
START_SECONDS = 1800
"""Time that a server has to load its model and answer."""


class CannotServe(Exception):
    """The server cannot serve the model; the message is a sentence for the user."""


@dataclass(frozen=True)
class Resources:
    """What a server's pod gets, each as (request, limit)."""

    cpu: tuple[str, str]
    """CPU cores."""
    memory: tuple[float, float]
    """Memory in bytes."""
    num_gpus: int = 0


@dataclass(frozen=True)
class Container:
    """The server."""

    image: str
    command: list[str]
    arguments: list[str]
    resources: Resources
    environment: dict[str, str] = field(default_factory=dict)
    shared_memory: str | None = None
    """Size of /dev/shm; None: the container runtime's 64 MB."""


def service_name(text: str) -> str:
    """Return a name for Kubernetes that is made from the name of a repository or a format.

    A name that is too long ends in a hash, so that two of them differ.
    """
    name = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    if not name[:1].isalpha():
        name = f"m-{name}"
    if len(name) > MAX_NAME_LENGTH:
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        name = f"{name[: MAX_NAME_LENGTH - 9].rstrip('-')}-{digest}"
    return name


def inference_service(
    name: str, container: Container, *, uris: dict[str, str], placement: PlacementConfig
) -> dict[str, Any]:
    """Return an InferenceService.

    Args:
        name: its name, as `service_name` makes it.
        container: the server.
        uris: storage URIs by the path where their files are put.
        placement: the placement of a recipe.
    """
    metadata: dict[str, Any] = {
        "name": name,
        "labels": dict([MANAGED_BY]),
        # Deployments of Kubernetes: Knative would stop a server that is slow to start.
        "annotations": {"serving.kserve.io/deploymentMode": "RawDeployment"},
    }
    if placement.queue:
        metadata["labels"][QUEUE_LABEL] = placement.queue
    predictor: dict[str, Any] = {
        "minReplicas": 1,
        "maxReplicas": 1,
        "automountServiceAccountToken": False,
        "securityContext": _pod_security(placement),
        "storageUris": [{"uri": uri, "mountPath": path} for path, uri in uris.items()],
        "containers": [_container(container, placement)],
    }
    if container.resources.num_gpus:
        predictor |= node_fields(
            node_selector=placement.node_selector,
            accelerator=placement.accelerator,
            accelerator_products=placement.accelerator_products,
            tolerations=placement.tolerations,
        )
    if container.shared_memory:
        memory = {"medium": "Memory", "sizeLimit": container.shared_memory}
        predictor["volumes"] = [{"name": "dshm", "emptyDir": memory}]
    return {
        "apiVersion": f"{GROUP}/{VERSION}",
        "kind": KIND,
        "metadata": metadata,
        "spec": {"predictor": predictor},
    }


def _pod_security(placement: PlacementConfig) -> dict[str, Any]:
    security: dict[str, Any] = {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
    if placement.run_as_user is not None:
        security["runAsUser"] = placement.run_as_user
    return security


def _container(container: Container, placement: PlacementConfig) -> dict[str, Any]:
    health = {"httpGet": {"path": "/health", "port": PORT}, "periodSeconds": 10}
    resources = container.resources
    requests = {"cpu": resources.cpu[0], "memory": in_mib(resources.memory[0])}
    limits = {"cpu": resources.cpu[1], "memory": in_mib(resources.memory[1])}
    if resources.num_gpus:
        requests[placement.accelerator] = limits[placement.accelerator] = str(resources.num_gpus)
    made: dict[str, Any] = {
        "name": CONTAINER,
        "image": container.image,
        "command": container.command,
        "args": container.arguments,
        "ports": [{"containerPort": PORT, "protocol": "TCP"}],
        "env": [{"name": name, "value": value} for name, value in container.environment.items()],
        "resources": {"requests": requests, "limits": limits},
        "startupProbe": {**health, "failureThreshold": START_SECONDS // 10},
        "readinessProbe": health,
        "livenessProbe": {**health, "timeoutSeconds": 10, "failureThreshold": 6},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
        },
    }
    if container.shared_memory:
        made["volumeMounts"] = [{"name": "dshm", "mountPath": SHARED_MEMORY_PATH}]
    return made
