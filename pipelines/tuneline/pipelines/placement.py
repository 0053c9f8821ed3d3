"""What each task asks of the cluster: CPU, memory, GPUs, nodes, volumes, retries, secrets, user.

Kubernetes is known here and nowhere else in the pipeline; local runners ignore all of it. What
kfp.kubernetes 2.17 can say limits what is said:

- The security context has a user, a group and runAsNonRoot. The platform adds the rest of Pod
  Security "restricted" (no privilege escalation, no capabilities, seccomp) to all its pods. There
  is no fsGroup, so a claim has to be writable for the user as it is.
- Resources are CPU, memory and accelerators. Ephemeral storage is requested by the namespace's
  LimitRange (manifests/base); here a scratch volume limits what a step writes to it.
- A pod's priority class cannot be set; Kueue's label for it can.
"""

from kfp import kubernetes
from kfp.dsl import PipelineTask

from tuneline import images
from tuneline.pipelines.needs import NEEDS, Needs, wanted_of
from tuneline.placement import PRODUCT_LABEL, PlacementConfig
from tuneline.train.checkpoints import ROOT_VARIABLE
from tuneline.train.trainjob.manifest import PRIORITY_LABEL, QUEUE_LABEL, SHARED_PATH, NodesConfig

USER_ID = 65532
"""The user that our images are built for; any other works too, with HOME writable."""

PART_OF_LABEL = ("app.kubernetes.io/part-of", "tuneline")
"""What the network policy in manifests/base selects."""
STEP_LABEL = "app.kubernetes.io/component"

CACHE_PATH = "/cache"
SCRATCH_PATH = "/scratch"


def place(task: PipelineTask, name: str, config: PlacementConfig) -> PipelineTask:
    """Give `task` what the table and the recipe say for the component `name`; returns the task."""
    needs = NEEDS[name]
    accelerated = needs.gpu and config.num_accelerators > 0
    wanted = wanted_of(needs, name, config, accelerated)
    assert wanted.cpu_request and wanted.cpu_limit
    assert wanted.memory_request and wanted.memory_limit
    assert wanted.timeout_hours and wanted.num_retries is not None
    task.set_cpu_request(wanted.cpu_request).set_cpu_limit(wanted.cpu_limit)
    task.set_memory_request(wanted.memory_request).set_memory_limit(wanted.memory_limit)
    if wanted.num_retries:
        task.set_retry(
            num_retries=wanted.num_retries,
            backoff_duration="30s",
            backoff_factor=2,
            backoff_max_duration="600s",
        )
    if config.registry != images.REGISTRY:
        task.set_container_image(images.in_registry(task.container_spec.image, config.registry))
    if name == "train-on-nodes" and config.shared_claim:
        kubernetes.mount_pvc(task, config.shared_claim, SHARED_PATH)
    if name == "train":
        _keep_checkpoints(task, config)
    kubernetes.set_timeout(task, int(wanted.timeout_hours * 3600))
    if accelerated:
        _accelerate(task, config, config.num_accelerators if name == "train" else 1)
    _mount_and_connect(task, needs, config)
    _label(task, name, config)
    kubernetes.set_security_context(task, run_as_user=config.run_as_user, run_as_non_root=True)
    if config.image_pull_secrets:
        kubernetes.set_image_pull_secrets(task, config.image_pull_secrets)
    return task


def nodes_config(config: PlacementConfig) -> NodesConfig:
    """Return what the TrainJob of several nodes asks for: on each what `train` does on one."""
    assert config.shared_claim is not None
    accelerated = config.num_accelerators > 0
    wanted = wanted_of(NEEDS["train"], "train", config, accelerated)
    values = {
        "num_nodes": config.num_nodes,
        "ranks_per_node": max(1, config.num_accelerators),
        "accelerator": config.accelerator if accelerated else None,
        **wanted.model_dump(exclude={"num_retries"}),
        "image": images.in_registry(images.TRAIN, config.registry),
        "runtime": config.trainer_runtime,
        "runtime_kind": config.trainer_runtime_kind,
        "shared_claim": config.shared_claim,
        "scratch_size": config.scratch_size,
        "secrets": config.secrets,
        "image_pull_secrets": config.image_pull_secrets,
        "queue": config.queue,
        "workload_priority_class": config.workload_priority_class,
    }
    if accelerated:
        values |= {
            "shared_memory": config.shared_memory,
            "node_selector": config.node_selector,
            "accelerator_products": config.accelerator_products,
            "tolerations": [each.model_dump() for each in config.tolerations],
        }
    return NodesConfig.parse(values)


def _accelerate(task: PipelineTask, config: PlacementConfig, count: int) -> None:
    task.set_accelerator_type(config.accelerator).set_accelerator_limit(count)
    for key, value in config.node_selector.items():
        kubernetes.add_node_selector(task, key, value)
    if config.accelerator_products:
        expression = {
            "key": PRODUCT_LABEL,
            "operator": "In",
            "values": config.accelerator_products,
        }
        kubernetes.add_node_affinity(task, match_expressions=[expression])
    for toleration in config.tolerations:
        kubernetes.add_toleration(task, **toleration.model_dump())
    if config.shared_memory:
        # No runtime gives a container more than 64 MB, and NCCL and data loaders use more.
        kubernetes.empty_dir_mount(
            task, "dshm", "/dev/shm", medium="Memory", size_limit=config.shared_memory
        )


def _keep_checkpoints(task: PipelineTask, config: PlacementConfig) -> None:
    """Have a retry, whose pod has nothing of the last one's, find the checkpoints."""
    if config.shared_claim:
        kubernetes.mount_pvc(task, config.shared_claim, SHARED_PATH)
        # Where several nodes keep theirs, too.
        task.set_env_variable(ROOT_VARIABLE, f"{SHARED_PATH}/tuneline/checkpoints")
    elif config.cache_claim:
        kubernetes.mount_pvc(task, config.cache_claim, CACHE_PATH)
        task.set_env_variable(ROOT_VARIABLE, f"{CACHE_PATH}/checkpoints")


def _mount_and_connect(task: PipelineTask, needs: Needs, config: PlacementConfig) -> None:
    """Volumes, and what comes from secrets: by name and optional, the pipeline holds none."""
    if needs.scratch and config.scratch_size:
        kubernetes.empty_dir_mount(task, "scratch", SCRATCH_PATH, size_limit=config.scratch_size)
        task.set_env_variable("TMPDIR", SCRATCH_PATH)
    if needs.hub or needs.tracks:
        for secret, variables in config.secrets.items():
            kubernetes.use_secret_as_env(task, secret, variables, optional=True)
    if not needs.hub:
        return
    if config.cache_claim:
        kubernetes.mount_pvc(task, config.cache_claim, CACHE_PATH)
        task.set_env_variable("HF_HOME", f"{CACHE_PATH}/huggingface")
    if config.hub_token_secret:
        # Public models need no token.
        kubernetes.use_secret_as_env(
            task, config.hub_token_secret, {"token": "HF_TOKEN"}, optional=True
        )


def _label(task: PipelineTask, name: str, config: PlacementConfig) -> None:
    kubernetes.add_pod_label(task, *PART_OF_LABEL)
    kubernetes.add_pod_label(task, STEP_LABEL, name)
    if config.queue:
        kubernetes.add_pod_label(task, QUEUE_LABEL, config.queue)
    if config.workload_priority_class:
        kubernetes.add_pod_label(task, PRIORITY_LABEL, config.workload_priority_class)
