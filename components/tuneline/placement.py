"""Where steps run on a cluster: what a recipe may say, and profiles of common GPU nodes.

A profile is a set of values for the keys of PlacementConfig. What a recipe says itself wins; what
neither says keeps the default. The values are written out when a recipe is read, so a saved recipe
means the same when a later version changes a profile.
"""

import re
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from tuneline.images import REGISTRY
from tuneline.strict_model import StrictModel

StepName = Literal[
    "plan",
    "look-up-model",
    "look-up-data",
    "fetch",
    "prepare",
    "train",
    "train-on-nodes",
    "merge",
    "convert-gguf",
    "measure-importance",
    "quantize-gguf",
    "quantize-gptq",
    "evaluate",
    "gate",
    "report",
    "publish",
    "diagnose",
]

PRODUCT_LABEL = "nvidia.com/gpu.product"
"""Of nodes, as NVIDIA's feature discovery writes it."""

QUANTITY = r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?$"
REGISTRY_NAME = r"^[a-z0-9]([a-z0-9._:/-]*[a-z0-9])?$"
DNS_NAME = r"^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$"

_SUFFIXES = {
    "": 1.0,
    "m": 1e-3,
    **{suffix: 1000.0 ** (power + 1) for power, suffix in enumerate(("k", "M", "G", "T"))},
    **{suffix: 1024.0 ** (power + 1) for power, suffix in enumerate(("Ki", "Mi", "Gi", "Ti"))},
}


def quantity_value(text: str) -> float:
    """Return what a Kubernetes quantity is worth: "500m" is 0.5, "2Ki" is 2048."""
    match = re.match(r"^([0-9.]+)([A-Za-z]*)$", text)
    assert match is not None, text
    return float(match[1]) * _SUFFIXES[match[2]]


class StepPlacement(StrictModel):
    """What one step asks for; a value that is left out keeps the step's own."""

    cpu_request: str | None = Field(None, pattern=QUANTITY)
    """Cores that are kept for the pod."""
    cpu_limit: str | None = Field(None, pattern=QUANTITY)
    """Cores that the pod is slowed down to."""
    memory_request: str | None = Field(None, pattern=QUANTITY)
    """Memory that is kept for the pod."""
    memory_limit: str | None = Field(None, pattern=QUANTITY)
    """Memory at which the pod is killed; what it keeps in /dev/shm counts."""
    timeout_hours: float | None = Field(None, gt=0)
    """The pod is ended after this time; waiting for a node does not count."""
    num_retries: int | None = Field(None, ge=0, le=10)
    """Tries after the first, 30 s to 10 min apart."""

    @model_validator(mode="after")
    def _requests_fit_limits(self) -> Self:
        for name in ("cpu", "memory"):
            request, limit = getattr(self, f"{name}_request"), getattr(self, f"{name}_limit")
            if request and limit and quantity_value(request) > quantity_value(limit):
                raise ValueError(f"{name}_request {request} is more than {name}_limit {limit}")
        return self


class Toleration(StrictModel):
    """A taint that pods put up with."""

    key: str
    operator: Literal["Exists", "Equal"] = "Exists"
    value: str | None = None
    """Only with Equal."""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = "NoSchedule"
    """None: every effect."""

    @model_validator(mode="after")
    def _value_goes_with_equal(self) -> Self:
        if (self.value is None) != (self.operator == "Exists"):
            raise ValueError(
                f"a toleration of {self.key} with operator {self.operator} "
                + ("takes no value" if self.operator == "Exists" else "needs a value")
            )
        return self


Profile = Literal["local", "t4", "a10g", "a100-40g", "a100-80g", "h100"]

COMPUTE_CAPABILITY: dict[Profile, tuple[int, int]] = {
    "t4": (7, 5),
    "a10g": (8, 6),
    "a100-40g": (8, 0),
    "a100-80g": (8, 0),
    "h100": (9, 0),
}
"""Of the profile's GPU; local names none."""
FUSED = tuple(name for name, found in COMPUTE_CAPABILITY.items() if found >= (8, 0))
"""Profiles whose GPUs run our kernels: from Ampere on (train.kernels)."""
FP8 = tuple(name for name, found in COMPUTE_CAPABILITY.items() if found >= (9, 0))
"""Profiles whose GPUs multiply 8-bit floats: from Hopper on."""


class PlacementConfig(StrictModel):
    """Where the steps run on a cluster; local runs ignore it."""

    profile: Profile = "local"
    """Values for the keys below, for a kind of GPU node; local: the defaults, CPU only."""
    accelerator: str = "nvidia.com/gpu"
    """Kubernetes resource name of the accelerator."""
    num_accelerators: int = Field(0, ge=0)
    """For train, which shares its rows among them; merge, evaluate and the GPTQ export get one, as
    they use no more. 0: CPU only, for all four."""
    num_nodes: int = Field(1, ge=1)
    """Nodes that train together, each with `num_accelerators`; more than one need Kubeflow Trainer
    2 and `shared_claim`."""
    trainer_runtime: str = Field("tuneline", pattern=DNS_NAME)
    """Trainer's runtime for several nodes; `tuneline` is in manifests/components/trainer."""
    trainer_runtime_kind: Literal["TrainingRuntime", "ClusterTrainingRuntime"] = "TrainingRuntime"
    """Whether it is the namespace's or the cluster's."""
    shared_claim: str | None = Field(None, pattern=DNS_NAME)
    """A PersistentVolumeClaim where train keeps checkpoints, so that a retry goes on from the last
    one; several nodes share their inputs and the adapter on it too, and it must then be
    ReadWriteMany. It must be writable for `run_as_user`. null: checkpoints go to `cache_claim`."""
    accelerator_products: list[str] = []
    """Values of the node label nvidia.com/gpu.product, any of which will do; empty: any GPU."""
    accelerated: StepPlacement = StepPlacement()
    """For every step that gets an accelerator: CPU and memory of such a node."""
    steps: dict[StepName, StepPlacement] = {}
    """For single steps; wins over `accelerated`."""
    node_selector: dict[str, str] = {}
    """Labels of the nodes for the steps that get an accelerator."""
    tolerations: list[Toleration] = []
    """Taints that the steps with an accelerator put up with."""
    shared_memory: str | None = Field(None, pattern=QUANTITY)
    """Size of /dev/shm for the steps with an accelerator; null: the runtime's 64 MB."""
    scratch_size: str | None = Field(None, pattern=QUANTITY)
    """Temporary files of the steps that hold models get a volume of at most this size; null: the
    container's own file system."""
    cache_claim: str | None = Field(None, pattern=DNS_NAME)
    """A PersistentVolumeClaim that keeps downloads (HF_HOME) between runs, and checkpoints where
    there is no `shared_claim`; it must be writable for `run_as_user`, and ReadWriteMany where runs
    overlap."""
    hub_token_secret: str | None = "huggingface"
    """Name of a Kubernetes secret whose key `token` holds the Hub token; used where it exists."""
    secrets: dict[str, dict[str, str]] = {}
    """More secrets, by name: {secret: {key: VARIABLE}}, for the steps that use the network, and for
    train, which may report to trackers; used where they exist."""
    registry: str = Field(REGISTRY, pattern=REGISTRY_NAME)
    """Where the images are, e.g. registry.example.com/team for
    registry.example.com/team/train:VERSION; the default has no host, for nodes that have them."""
    image_pull_secrets: list[str] = []
    """Names of secrets with the credentials of the images' registry."""
    queue: str | None = Field(None, pattern=DNS_NAME)
    """A Kueue LocalQueue that every pod waits in; Kueue's pod integration must be on."""
    workload_priority_class: str | None = Field(None, pattern=DNS_NAME)
    """A Kueue WorkloadPriorityClass; needs `queue`. KFP cannot set a pod's own priority class."""
    run_as_user: int | None = Field(65532, ge=1)
    """Numeric user of all pods; null: the platform picks one that is not root (OpenShift)."""

    @model_validator(mode="before")
    @classmethod
    def _fill_in_the_profile(cls, values: Any) -> Any:
        if isinstance(values, dict):
            return {**PROFILES.get(str(values.get("profile")), {}), **values}
        return values

    @model_validator(mode="after")
    def _parts_agree(self) -> Self:
        if self.workload_priority_class and not self.queue:
            raise ValueError(
                f"workload_priority_class '{self.workload_priority_class}' means nothing without "
                "`queue`: name a LocalQueue, or leave it out"
            )
        if self.num_nodes > 1 and not self.shared_claim:
            raise ValueError(
                f"num_nodes is {self.num_nodes}, and nodes share a volume: name a ReadWriteMany "
                "claim in shared_claim"
            )
        limit = self.accelerated.memory_limit
        if self.shared_memory and limit:
            if quantity_value(self.shared_memory) >= quantity_value(limit):
                raise ValueError(
                    f"shared_memory {self.shared_memory} counts towards accelerated.memory_limit "
                    f"{limit}: make it smaller"
                )
        for secret, variables in self.secrets.items():
            for variable in variables.values():
                if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", variable):
                    raise ValueError(
                        f"secrets.{secret}: '{variable}' is not a name of an environment variable"
                    )
        return self


def _gpu_node(
    products: list[str], cpu: tuple[str, str], memory: tuple[str, str], shared_memory: str
) -> dict[str, Any]:
    return {
        "num_accelerators": 1,
        "accelerator_products": products,
        "accelerated": {
            "cpu_request": cpu[0],
            "cpu_limit": cpu[1],
            "memory_request": memory[0],
            "memory_limit": memory[1],
        },
        # The taint that GKE, AKS and the NVIDIA operator's documentation put on GPU nodes.
        "tolerations": [{"key": "nvidia.com/gpu"}],
        "shared_memory": shared_memory,
    }


# Requests leave room for the node's own daemons on the smallest common machine with one such GPU,
# named beside it; for more GPUs a recipe says more in `accelerated`. Products are what NVIDIA's
# feature discovery writes: the name in nvidia-smi with dashes.
PROFILES: dict[str, dict[str, Any]] = {
    "local": {},
    # 4 vCPU, 16 GiB: g4dn.xlarge
    "t4": _gpu_node(["Tesla-T4"], ("3", "4"), ("12Gi", "14Gi"), "2Gi"),
    # 8 vCPU, 32 GiB: g5.2xlarge
    "a10g": _gpu_node(["NVIDIA-A10G"], ("6", "8"), ("24Gi", "29Gi"), "4Gi"),
    # 12 vCPU, 85 GB: a2-highgpu-1g
    "a100-40g": _gpu_node(
        ["NVIDIA-A100-SXM4-40GB", "NVIDIA-A100-PCIE-40GB"], ("10", "12"), ("64Gi", "72Gi"), "8Gi"
    ),
    # 12 vCPU, 170 GB: a2-ultragpu-1g
    "a100-80g": _gpu_node(
        ["NVIDIA-A100-SXM4-80GB", "NVIDIA-A100-80GB-PCIe"], ("10", "12"), ("120Gi", "150Gi"), "16Gi"
    ),
    # 26 vCPU, 234 GB: a3-highgpu-1g
    "h100": _gpu_node(
        ["NVIDIA-H100-80GB-HBM3", "NVIDIA-H100-PCIe"], ("20", "26"), ("180Gi", "210Gi"), "16Gi"
    ),
}
