"""Where the steps run on a cluster: the `placement` section of a recipe.

A profile (gpu_profiles.py) is a set of values for the keys of PlacementConfig. The recipe's values
override those of the profile, and keys that neither of them sets have their defaults. The values of
the profile are filled in when a recipe is read, so a recipe that was saved afterwards keeps its
meaning when a later version changes the profile.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from tuneline import images
from tuneline.gpu_profiles import GPU_PROFILES, LOCAL, SMALL, GpuProfile, Profile
from tuneline.pods import CA_PATH, OWN_PREFIXES, OWN_VARIABLES, SETTINGS, product_label
from tuneline.runtime.parameter_text import find_replaced
from tuneline.runtime.secrets import find_secrets, is_credential_name, mask
from tuneline.steps import STEPS, StepName
from tuneline.strict_model import StrictModel

QUANTITY = r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?$"
REGISTRY_NAME = r"^[a-z0-9]([a-z0-9._:/-]*[a-z0-9])?$"
DNS_NAME = r"^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$"
_NAME = r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?"
LABEL_KEY = rf"^([a-z0-9]([a-z0-9.-]{{0,251}}[a-z0-9])?/)?{_NAME}$"
LABEL_VALUE = rf"^({_NAME})?$"
SECRET_KEY = r"^[A-Za-z0-9._-]{1,253}$"
_VARIABLE = r"[A-Za-z_][A-Za-z0-9_]*"

PROXY_VARIABLES = ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY")
"""Variables that send requests through a proxy, in capitals or in small letters."""
CA_VARIABLES = (
    *("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "AWS_CA_BUNDLE"),
    "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH",
)
"""Variables with the path of a file of certificates: of OpenSSL, rustls and Go, of requests, of
curl, of boto and of gRPC. Each client of the steps reads one of them."""

DnsName = Annotated[str, Field(pattern=DNS_NAME)]
LabelKey = Annotated[str, Field(pattern=LABEL_KEY)]
LabelValue = Annotated[str, Field(pattern=LABEL_VALUE)]

_SUFFIXES = {
    "": 1.0,
    "m": 1e-3,
    **{suffix: 1000.0**power for power, suffix in enumerate(("k", "M", "G", "T", "P"), 1)},
    **{suffix: 1024.0**power for power, suffix in enumerate(("Ki", "Mi", "Gi", "Ti", "Pi"), 1)},
}


def quantity_value(text: str) -> float:
    """Return the value of a Kubernetes quantity: 0.5 for "500m", 2048 for "2Ki"."""
    match = re.match(r"^([0-9.]+)([A-Za-z]*)$", text)
    assert match is not None, text
    return float(match[1]) * _SUFFIXES[match[2]]


def override(values: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return a step's resources with some of them replaced.

    If only a request or only its limit is replaced, and the request then exceeds the limit, both
    get the new value.
    """
    merged = {**values, **overrides}
    for resource in ("cpu", "memory"):
        request, limit = f"{resource}_request", f"{resource}_limit"
        if (request in overrides) != (limit in overrides) and merged.get(request):
            leader, follower = (request, limit) if request in overrides else (limit, request)
            if merged.get(limit) and _exceeds(merged[request], merged[limit]):
                merged[follower] = merged[leader]
    return merged


def _exceeds(request: Any, limit: Any) -> bool:
    """Return whether a request is more than a limit; False if either is no quantity."""
    texts = (str(request), str(limit))
    if not all(re.fullmatch(QUANTITY, text) for text in texts):
        return False
    return quantity_value(texts[0]) > quantity_value(texts[1])


class StepPlacement(StrictModel):
    """Resources of one step.

    null: inherit. A value is taken from `placement.steps`, else from `placement.accelerated` (steps
    with an accelerator), else from the step's default.
    """

    cpu_request: str | None = Field(default=None, pattern=QUANTITY)
    """CPU cores reserved for the pod, e.g. "4" or "500m"."""
    cpu_limit: str | None = Field(default=None, pattern=QUANTITY)
    """CPU cores at which the pod is throttled."""
    memory_request: str | None = Field(default=None, pattern=QUANTITY)
    """Memory reserved for the pod, e.g. "16Gi"."""
    memory_limit: str | None = Field(default=None, pattern=QUANTITY)
    """Memory at which the pod is killed; files in /dev/shm count towards it."""
    timeout_hours: float | None = Field(default=None, gt=0)
    """Hours after which the pod is ended; the time that it waits for a node does not count."""
    num_retries: int | None = Field(default=None, ge=0, le=10)
    """Retries of a pod that disappeared because its node was drained or lost or the pod was
    preempted. The pause before the first is 30 seconds, and each further pause is twice as long.
    KFP 2.17 does not run a process again that failed: a step waits out faults of the network
    itself, and train.max_restarts covers faults of GPUs."""

    @model_validator(mode="after")
    def _requests_fit_limits(self) -> Self:
        for name in ("cpu", "memory"):
            request, limit = getattr(self, f"{name}_request"), getattr(self, f"{name}_limit")
            if request and limit and quantity_value(request) > quantity_value(limit):
                raise ValueError(f"{name}_request {request} is more than {name}_limit {limit}")
        return self


class Toleration(StrictModel):
    """A node taint that pods tolerate."""

    key: LabelKey
    """Key of the taint, e.g. nvidia.com/gpu."""
    operator: Literal["Exists", "Equal"] = "Exists"
    """Exists tolerates any value of the taint; Equal only `value`."""
    value: LabelValue | None = None
    """Value of the taint, with the operator Equal only."""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = "NoSchedule"
    """Effect of the taint; null tolerates every effect."""

    @model_validator(mode="after")
    def _value_goes_with_equal(self) -> Self:
        if (self.value is None) != (self.operator == "Exists"):
            raise ValueError(
                f"a toleration of {self.key} with operator {self.operator} "
                + ("takes no value" if self.operator == "Exists" else "needs a value")
            )
        return self


class CaBundle(StrictModel):
    """Certificates of authorities in a ConfigMap, for servers that no public authority knows."""

    config_map: DnsName
    """ConfigMap in the namespace of the run. It must exist: pods wait for it."""
    key: str = Field(default="ca.crt", pattern=SECRET_KEY)
    """Key of the ConfigMap with the certificates, in PEM format. They replace the authorities that
    a client knows, so include the public ones if a step needs them."""


def has_product(products: Sequence[str], accelerator: str) -> dict[str, Any]:
    """Return the match expression of nodes that have one of these products of an accelerator."""
    return {"key": product_label(accelerator), "operator": "In", "values": list(products)}


def node_fields(
    *,
    node_selector: Mapping[str, str],
    accelerator: str,
    accelerator_products: Sequence[str],
    tolerations: Sequence[Toleration],
) -> dict[str, Any]:
    """Return the fields of a pod's spec that bring the pod to its node.

    The arguments are the keys of a placement of the same names.
    """
    fields: dict[str, Any] = {}
    if node_selector:
        fields["nodeSelector"] = dict(node_selector)
    if tolerations:
        fields["tolerations"] = [each.model_dump(exclude_none=True) for each in tolerations]
    if accelerator_products:
        wanted = has_product(accelerator_products, accelerator)
        terms = {"nodeSelectorTerms": [{"matchExpressions": [wanted]}]}
        fields["affinity"] = {
            "nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": terms}
        }
    return fields


def plain_variables(config: "PlacementConfig") -> dict[str, str]:
    """Return the environment variables that every pod of a run gets, without those of secrets."""
    variables = dict(config.environment)
    if config.ca_bundle is not None:
        variables |= dict.fromkeys(CA_VARIABLES, f"{CA_PATH}/{config.ca_bundle.key}")
    return variables


class PlacementConfig(StrictModel):
    """Where the steps run on a cluster; local runs ignore this section."""

    profile: Profile = LOCAL
    """Kind of node. A GPU's profile sets `accelerator`, `num_accelerators`, `accelerator_products`,
    `accelerated`, `tolerations` and `shared_memory`, except where the recipe sets them. mi300x is
    declared only: nothing ran on it, and the images have no ROCm. local: the defaults below,
    on CPUs only. small: on CPUs only, on a cluster of one machine with 2 to 4 cores and 16 GiB; it
    sets the CPU request and the memory of each step in `steps`, for models as small as the
    demo's."""
    accelerator: LabelKey = "nvidia.com/gpu"
    """Kubernetes resource name of the accelerator."""
    num_accelerators: int = Field(default=0, ge=0)
    """Accelerators per node for train, one rank on each. merge, evaluate and the steps that make
    GPTQ, AWQ and FP8 checkpoints get one, because they cannot use more. 0: all run on CPUs."""
    num_nodes: int = Field(default=1, ge=1)
    """Nodes that train together, each with `num_accelerators`. More than one node needs Kubeflow
    Trainer 2 and `shared_claim`."""
    trainer_runtime: str = Field(default="tuneline-nodes", pattern=DNS_NAME)
    """Name of the Kubeflow Trainer runtime for several nodes; the default is the one in
    manifests/components/trainer."""
    trainer_runtime_kind: Literal["TrainingRuntime", "ClusterTrainingRuntime"] = "TrainingRuntime"
    """Kind of the runtime: TrainingRuntime belongs to the namespace, ClusterTrainingRuntime to the
    cluster."""
    shared_claim: str | None = Field(default=None, pattern=DNS_NAME)
    """PersistentVolumeClaim where train keeps checkpoints, so that a retry resumes from the last
    one. Several nodes also share their inputs and the adapter on it; the claim must then be
    ReadWriteMany. `run_as_user` must be able to write to it. null: checkpoints are kept on
    `cache_claim`."""
    accelerator_products: list[LabelValue] = []
    """Accepted values of the node label with the product's name: nvidia.com/gpu.product, or
    amd.com/gpu.product-name for the accelerator amd.com/gpu. Empty accepts any GPU."""
    accelerated: StepPlacement = StepPlacement()
    """Resources of every step that gets an accelerator; they should fit the GPU node.

    null: inherit. A value is taken from `placement.steps`, else from `placement.accelerated` (steps
    with an accelerator), else from the step's default."""
    steps: dict[StepName, StepPlacement] = {}
    """Resources of single steps, by name; they override `accelerated`."""
    node_selector: dict[str, LabelValue] = {}
    """Labels that a node must have for the steps that get an accelerator."""
    tolerations: list[Toleration] = []
    """Node taints that the steps with an accelerator tolerate."""
    shared_memory: str | None = Field(default=None, pattern=QUANTITY)
    """Size of /dev/shm for the steps with an accelerator; null keeps the container runtime's 64
    MB."""
    scratch_size: str | None = Field(default=None, pattern=QUANTITY)
    """Size limit of the volume for temporary files, for steps that load or write models; null keeps
    the files in the container's file system."""
    cache_claim: str | None = Field(default=None, pattern=DNS_NAME)
    """PersistentVolumeClaim that keeps downloads (HF_HOME) between runs, and checkpoints if there
    is no `shared_claim`. `run_as_user` must be able to write to it, and it must be ReadWriteMany if
    runs overlap. null: every pod downloads again."""
    hub_token_secret: DnsName | None = "huggingface"
    """Kubernetes secret whose key `token` holds the Hub token; it may be absent. null: no token."""
    secrets: dict[str, dict[str, str]] = {}
    """More Kubernetes secrets, as {secret: {key: VARIABLE}}. Their values become environment
    variables of the steps that use the network and of train, which may report to trackers; those
    that `notify` names are variables of the last step only. The secrets may be absent."""
    environment: dict[str, str] = {}
    """Environment variables of every pod, as {VARIABLE: value}: HF_ENDPOINT for a mirror of the
    Hub, HTTPS_PROXY and NO_PROXY, or a setting of a library. Credentials belong in `secrets`.
    Names that tuneline or its images set are refused. Not a part of KFP's cache key. Local runs
    have the environment of your shell instead."""
    ca_bundle: CaBundle | None = None
    """Certificate authorities that every pod trusts, e.g. {config_map: company-ca}. The file is
    mounted at /etc/tuneline/ca, and SSL_CERT_FILE, REQUESTS_CA_BUNDLE, CURL_CA_BUNDLE,
    AWS_CA_BUNDLE and GRPC_DEFAULT_SSL_ROOTS_FILE_PATH name it. null: the authorities that the
    images know."""
    registry: str | None = Field(default=None, pattern=REGISTRY_NAME)
    """Where the nodes get the images, which `submit` and `schedule` need. A registry with its host
    and a path, e.g. registry.example.com/team for registry.example.com/team/train:VERSION. Or
    local: the nodes have them as localhost/tuneline/train:VERSION, as `make images` names them, and
    never pull; local:PREFIX is the same for PREFIX/train:VERSION. null: none is named; a compiled
    file then has the names of local."""
    image_pull_secrets: list[DnsName] = []
    """Kubernetes secrets with the credentials for `registry`."""
    queue: str | None = Field(default=None, pattern=DNS_NAME)
    """Kueue LocalQueue that admits every pod; Kueue's pod integration must be enabled. null: no
    queue."""
    workload_priority_class: str | None = Field(default=None, pattern=DNS_NAME)
    """Kueue WorkloadPriorityClass; needs `queue`. KFP cannot set a pod's own priority class."""
    run_as_user: int | None = Field(default=images.USER_ID, ge=1)
    """Numeric user of all pods; null lets the platform choose a user other than root
    (OpenShift)."""

    @model_validator(mode="before")
    @classmethod
    def _fill_in_the_profile(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        profile = PROFILES.get(str(values.get("profile")), {})
        merged = {**profile, **values}
        if "steps" in profile and isinstance(values.get("steps"), dict):
            # By step: a recipe that changes one step keeps the profile's values of the others.
            merged["steps"] = dict(profile["steps"])
            for name, own in values["steps"].items():
                known = profile["steps"].get(name, {})
                merged["steps"][name] = override(known, own) if isinstance(own, dict) else own
        return merged

    @model_validator(mode="after")
    def _parts_agree(self) -> Self:
        if self.workload_priority_class and not self.queue:
            raise ValueError(
                f"workload_priority_class '{self.workload_priority_class}' has no effect without "
                "`queue`: set queue to a LocalQueue, or leave workload_priority_class out"
            )
        if self.num_nodes > 1 and not self.shared_claim:
            raise ValueError(
                f"num_nodes is {self.num_nodes} but shared_claim is not set: set it to a "
                "ReadWriteMany claim, which the nodes share"
            )
        limit = self.accelerated.memory_limit
        if self.shared_memory and limit:
            if quantity_value(self.shared_memory) >= quantity_value(limit):
                raise ValueError(
                    f"shared_memory {self.shared_memory} counts towards accelerated.memory_limit "
                    f"{limit} and must be smaller"
                )
        _check_registry(self.registry, self.num_nodes)
        for key in self.node_selector:
            if not re.fullmatch(LABEL_KEY, key):
                raise ValueError(f"node_selector: '{key}' is not the key of a Kubernetes label")
        for secret, variables in self.secrets.items():
            if not re.fullmatch(DNS_NAME, secret):
                raise ValueError(f"secrets: '{secret}' is not the name of a Kubernetes secret")
            for key, variable in variables.items():
                if not re.fullmatch(SECRET_KEY, key):
                    raise ValueError(f"secrets.{secret}: '{key}' is not a key of a secret")
                if not re.fullmatch(_VARIABLE, variable):
                    raise ValueError(
                        f"secrets.{secret}: '{variable}' is not a name of an environment variable"
                    )
        return self

    @model_validator(mode="after")
    def _environment_is_plain(self) -> Self:
        of_secrets = {name for keys in self.secrets.values() for name in keys.values()}
        for name, value in self.environment.items():
            where = f"environment.{name}"
            if not re.fullmatch(_VARIABLE, name):
                raise ValueError(f"environment: '{name}' is not a name of an environment variable")
            if problem := _whose(name, has_bundle=self.ca_bundle is not None):
                raise ValueError(f"{where}: {problem}")
            if name in of_secrets:
                raise ValueError(f"{where} is also set by `secrets`: remove one of the two")
            # The value is not shown in full, because it may be a secret.
            secrets = find_secrets(value)
            if secrets or (value and is_credential_name(name)):
                kind, secret = secrets[0] if secrets else ("a credential", value)
                raise ValueError(
                    f"{where} holds {kind}, {mask(secret)}. A recipe holds no credentials: put the "
                    f"value into a Kubernetes secret, and name it in placement.secrets, as "
                    f"{{my-secret: {{value: {name}}}}}"
                )
            if replaced := find_replaced(value):
                raise ValueError(
                    f"{where} contains '{replaced}', which Kubernetes, Argo or KFP would replace: "
                    "write the value itself"
                )
            if not value.isprintable():
                raise ValueError(f"{where} contains a line break or a control character: remove it")
        if proxies := self.proxies:
            if not self.no_proxy and not {"NO_PROXY", "no_proxy"} & of_secrets:
                raise ValueError(
                    f"environment or secrets set {proxies[0]} but not NO_PROXY: KFP's launcher, "
                    "which runs in the same container, would ask the proxy for services of the "
                    "cluster. Set NO_PROXY to .svc,.cluster.local,.kubeflow,localhost,127.0.0.1 "
                    "and the address range of the cluster's services"
                )
        return self

    @property
    def proxies(self) -> list[str]:
        """Names of the variables that send requests of pods through a proxy."""
        of_secrets = [name for keys in self.secrets.values() for name in keys.values()]
        names = (*self.environment, *of_secrets)
        return [name for name in names if name.upper() in PROXY_VARIABLES]

    @property
    def no_proxy(self) -> str:
        """Hosts that requests do not reach through a proxy, separated by commas."""
        return self.environment.get("NO_PROXY") or self.environment.get("no_proxy") or ""


def _whose(name: str, *, has_bundle: bool) -> str | None:
    """Return why `environment` cannot set a variable, or None if it can."""
    if name in SETTINGS:
        return None
    if name in OWN_VARIABLES:
        return OWN_VARIABLES[name]
    if name.upper().startswith(("PIP_", "UV_")):
        return (
            "no step installs packages, so the variable has no effect. For building images, see "
            "images/README.md"
        )
    if prefix := next((each for each in OWN_PREFIXES if name.startswith(each)), None):
        return f"names that begin with {prefix} are {OWN_PREFIXES[prefix]}; remove it"
    if has_bundle and name in CA_VARIABLES:
        return "ca_bundle sets it: remove one of the two"
    return None


def _check_registry(registry: str | None, num_nodes: int) -> None:
    """Refuse names of images that nodes could pull from a public hub by accident."""
    if registry is None or registry == images.LOCAL:
        return
    if not images.is_on_nodes(registry) and not images.has_host(registry):
        raise ValueError(
            f"registry '{registry}' names no host, and nodes would pull {registry}/... from a "
            "public hub, where anyone may own that name: write the registry with its host, e.g. "
            f"registry.example.com/{registry}, or {images.LOCAL}:{registry} if the nodes have the "
            "images"
        )
    # A TrainJob cannot set the pull policy of its pods.
    if num_nodes > 1 and not images.has_host(images.in_registry(images.TRAIN, registry)):
        raise ValueError(
            f"registry '{registry}' with num_nodes {num_nodes}: a node without the image would "
            "pull it from a public hub, because a TrainJob cannot forbid it. Set registry to "
            f"{images.LOCAL}, and name the images {images.LOCAL_PREFIX}/... on the nodes"
        )


def _profile_values(gpu: GpuProfile) -> dict[str, Any]:
    node = gpu.node
    return {
        "accelerator": gpu.resource,
        "num_accelerators": 1,
        "accelerator_products": list(gpu.products),
        "accelerated": {
            "cpu_request": node.cpu[0],
            "cpu_limit": node.cpu[1],
            "memory_request": node.memory[0],
            "memory_limit": node.memory[1],
        },
        # The taint that GKE, AKS and the documentation of NVIDIA's operator put on GPU nodes.
        "tolerations": [{"key": gpu.resource}],
        "shared_memory": node.shared_memory,
    }


_SMALL_MEMORY = {
    "fetch": ("1280Mi", "6Gi"),
    "prepare": ("1280Mi", "6Gi"),
    "check-exports": ("1280Mi", "6Gi"),
    "train": ("2Gi", "6Gi"),
    "merge": ("1280Mi", "6Gi"),
    "convert-gguf": ("1280Mi", "6Gi"),
    "measure-importance": ("1280Mi", "6Gi"),
    "quantize-gguf": ("2304Mi", "6Gi"),
    "quantize-gptq": ("2560Mi", "6Gi"),
    "quantize-awq": ("2560Mi", "6Gi"),
    "quantize-fp8": ("2560Mi", "6Gi"),
    "collect-benchmarks": ("1280Mi", "6Gi"),
    "evaluate": ("1536Mi", "6Gi"),
}
"""Memory request and limit of the steps that hold a model, in the profile small. The requests are
what the demo's steps used on a cluster, or what `plan` estimates for them, if that is more."""
_SMALL_MEMORY_OF_OTHERS = ("256Mi", "1Gi")


def _small_values() -> dict[str, Any]:
    memory = {name: _SMALL_MEMORY.get(name, _SMALL_MEMORY_OF_OTHERS) for name in STEPS}
    return {
        "steps": {
            name: {
                # The request of KFP's launcher, a container in the pod of each step.
                "cpu_request": "100m",
                "cpu_limit": "4",
                "memory_request": request,
                "memory_limit": limit,
            }
            for name, (request, limit) in memory.items()
        }
    }


PROFILES: dict[str, dict[str, Any]] = {
    LOCAL: {},
    SMALL: _small_values(),
    **{name: _profile_values(gpu) for name, gpu in GPU_PROFILES.items()},
}
"""Values that each profile sets for keys of PlacementConfig, by the profile's name."""
