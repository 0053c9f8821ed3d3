"""Names that all pods of a run share: labels, mount paths, environment variables.

The pods are those of KFP (pipelines/placement.py) and those of a TrainJob (train/trainjob).
"""

PRODUCT_LABELS = {
    "nvidia.com/gpu": "nvidia.com/gpu.product",
    "amd.com/gpu": "amd.com/gpu.product-name",
}
"""Node label with the GPU's product name, by the resource: NVIDIA's GPU feature discovery and AMD's
node labeller set them."""
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
"""Pod label with the name of the Kueue LocalQueue that admits the pod."""
PRIORITY_LABEL = "kueue.x-k8s.io/priority-class"
"""Pod label with the name of the pod's Kueue WorkloadPriorityClass."""
RUN_LABEL = "pipeline/runid"
"""Label with the ID of the KFP run that the pod, workflow or TrainJob belongs to."""
STEP_LABEL = "app.kubernetes.io/component"
"""Pod label with the name of the step."""
PART_OF_LABEL = ("app.kubernetes.io/part-of", "tuneline")
"""Pod label, and its value, by which the network policy in manifests/base selects pods."""
MANAGED_BY = ("app.kubernetes.io/managed-by", "tuneline")
"""Label, and its value, of the objects that tuneline itself writes to a cluster."""
TRAINJOBS = ("trainer.kubeflow.org", "v1alpha1", "trainjobs")
"""API group, version and plural of Kubeflow Trainer's TrainJob, which carries RUN_LABEL too."""
NO_SIDECAR = ("sidecar.istio.io/inject", "false")
"""Pod annotation, and its value, that keeps Istio's proxy out of the pod. KFP gives it to its own
pods. With the proxy, the job of a pod would not end, and ranks would not reach each other."""

CACHE_PATH = "/cache"
"""Where `placement.cache_claim` is mounted."""
SHARED_PATH = "/shared"
"""Where `placement.shared_claim` is mounted."""
SCRATCH_PATH = "/scratch"
"""Where the volume of `placement.scratch_size` is mounted; TMPDIR points to it."""
SHARED_MEMORY_PATH = "/dev/shm"
"""Where the memory volume of `placement.shared_memory` is mounted."""

POD_NAME_VARIABLE = "KFP_POD_NAME"
"""Environment variable with the pod's name. KFP sets the variable on a cluster, not locally."""

CA_PATH = "/etc/tuneline/ca"
"""Where the ConfigMap of `placement.ca_bundle` is mounted."""

OWN_VARIABLES = {
    "HF_HOME": "placement.cache_claim sets it: name a claim there",
    "HF_TOKEN": "placement.hub_token_secret sets it: name a Kubernetes secret there",
    "TMPDIR": "placement.scratch_size sets it: set a size there",
    "NAMESPACE": "Kubernetes says in which namespace a pod runs: remove it",
    **dict.fromkeys(
        ("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES"),
        "the cluster assigns the GPUs of a pod: set placement.num_accelerators",
    ),
    **dict.fromkeys(
        ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
        "the train step sets it for each rank: set placement.num_accelerators and num_nodes",
    ),
    **dict.fromkeys(
        ("PATH", "HOME", "USER", "XDG_CACHE_HOME", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"),
        "the images set it, so that any user can run them: change it in an image of your own",
    ),
}
"""Variables that `placement.environment` cannot set, and why."""
OWN_PREFIXES = {
    "TUNELINE_": "tuneline's own",
    "KFP_": "set by Kubeflow Pipelines",
    "PET_": "set by Kubeflow Trainer",
    "KUBERNETES_": "set by Kubernetes",
    "PYTHON": "settings of the interpreter, which the images set",
}
"""Beginnings of names that `placement.environment` cannot set, and whose they are."""
SETTINGS = {"TUNELINE_PLAIN_HTTP_REGISTRIES"}
"""Variables with such a beginning that are for users to set."""


def product_label(accelerator: str) -> str:
    """Return the node label with the product name of a resource; of parts of a GPU, NVIDIA's."""
    return PRODUCT_LABELS.get(accelerator, PRODUCT_LABELS["nvidia.com/gpu"])
