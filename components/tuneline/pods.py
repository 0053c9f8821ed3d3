"""Names that are the same in every pod of the line: labels, mount paths, environment variables.

KFP's pods (pipelines/placement.py) and a TrainJob's pods (train/trainjob) use the same names.
"""

PRODUCT_LABEL = "nvidia.com/gpu.product"
"""Node label with the GPU's product name, set by NVIDIA's GPU feature discovery."""
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
"""Pod label with the Kueue LocalQueue that admits the pod."""
PRIORITY_LABEL = "kueue.x-k8s.io/priority-class"
"""Pod label with the Kueue WorkloadPriorityClass."""
RUN_LABEL = "pipeline/runid"
"""Label with the ID of the KFP run that the pod, workflow or TrainJob belongs to."""
STEP_LABEL = "app.kubernetes.io/component"
"""Pod label with the name of the step."""
PART_OF_LABEL = ("app.kubernetes.io/part-of", "tuneline")
"""Pod label that the network policy in manifests/base selects, and its value."""

CACHE_PATH = "/cache"
"""Where `placement.cache_claim` is mounted."""
SHARED_PATH = "/shared"
"""Where `placement.shared_claim` is mounted."""
SCRATCH_PATH = "/scratch"
"""Where the volume of `placement.scratch_size` is mounted; TMPDIR points to it."""
SHARED_MEMORY_PATH = "/dev/shm"
"""Where the memory volume of `placement.shared_memory` is mounted."""

POD_NAME_VARIABLE = "KFP_POD_NAME"
"""Environment variable with the pod's name; KFP sets it in the pods of a cluster only."""
