"""Place tasks on a cluster: CPU, memory, GPUs, nodes, volumes, retries, secrets and user.

Of the modules that build the pipeline, only this one uses kfp.kubernetes, whose settings local
runners ignore. kfp.kubernetes 2.17 has these limits:

- The security context can have only a user, a group and runAsNonRoot. KFP adds the rest of Pod
  Security "restricted" (no privilege escalation, no capabilities, seccomp) to all its pods. fsGroup
  cannot be set, so the user must have write access to the volume of a claim.
- Only CPU, memory and accelerators can be requested. Ephemeral storage is requested by the
  namespace's LimitRange (manifests/base), and limited by the size of the scratch volume.
- A claim cannot be mounted read-only. The steps only read the claims that hold data.
- A pod's priority class cannot be set, but Kueue's label for it can.
"""

from collections.abc import Collection, Iterable

from kfp import kubernetes
from kfp.dsl import PipelineTask

from tuneline import images
from tuneline.pipelines.needs import is_accelerated, needs_of
from tuneline.placement import PlacementConfig, has_product, plain_variables
from tuneline.pods import (
    CA_PATH,
    CACHE_PATH,
    PART_OF_LABEL,
    PRIORITY_LABEL,
    QUEUE_LABEL,
    SCRATCH_PATH,
    SHARED_MEMORY_PATH,
    SHARED_PATH,
    STEP_LABEL,
)
from tuneline.runtime.source_names import CLAIMS_PATH
from tuneline.steps import STEPS, Step
from tuneline.train.checkpoints import ROOT_VARIABLE
from tuneline.train.trainjob.manifest import NodesConfig

FIRST_PAUSE_SECONDS = 30
"""Pause before the first retry of a task; each further pause is twice as long."""
MAX_WAIT_HOURS = 720
"""Time that each try of a task may wait, for quota in a queue or for a free node. A pod waits for a
node without a queue too, so this time does not depend on `placement.queue`."""


def place(
    task: PipelineTask,
    name: str,
    config: PlacementConfig,
    *,
    claims: Iterable[str] = (),
    notified: Collection[str] = (),
) -> PipelineTask:
    """Place a task, and return it.

    Args:
        task: the task.
        name: the component that the task runs.
        config: the `placement` section of the recipe.
        claims: claims that hold data or a model that the task reads.
        notified: variables of `config.secrets` with the URLs of webhooks, which only the step that
            tells them gets.
    """
    needs = needs_of(name, config)
    assert needs.cpu_request and needs.cpu_limit
    assert needs.memory_request and needs.memory_limit
    assert needs.timeout_hours and needs.num_retries is not None
    task.set_cpu_request(needs.cpu_request).set_cpu_limit(needs.cpu_limit)
    task.set_memory_request(needs.memory_request).set_memory_limit(needs.memory_limit)
    if needs.num_retries:
        _retry(task, needs.num_retries, timeout_hours=needs.timeout_hours)
    assert task.container_spec is not None
    task.set_container_image(images.in_registry(task.container_spec.image, config.registry))
    if images.is_on_nodes(config.registry):
        kubernetes.set_image_pull_policy(task, "Never")
    if name == "train-on-nodes" and config.shared_claim:
        kubernetes.mount_pvc(task, config.shared_claim, SHARED_PATH)
    if name == "train":
        _keep_checkpoints(task, config)
    for claim in claims:
        kubernetes.mount_pvc(task, claim, f"{CLAIMS_PATH}/{claim}")
    kubernetes.set_timeout(task, int(needs.timeout_hours * 3600))
    if is_accelerated(name, config):
        _accelerate(task, config, config.num_accelerators if name == "train" else 1)
    _set_environment(task, config)
    _mount_and_connect(task, STEPS[name], config, notified)
    _label(task, name, config)
    kubernetes.set_security_context(task, run_as_user=config.run_as_user, run_as_non_root=True)
    if config.image_pull_secrets:
        kubernetes.set_image_pull_secrets(task, config.image_pull_secrets)
    return task


def nodes_config(config: PlacementConfig) -> NodesConfig:
    """Return the config of a TrainJob; each of its nodes gets the resources of the step `train`."""
    assert config.shared_claim is not None
    accelerated = is_accelerated("train", config)
    values = {
        "num_nodes": config.num_nodes,
        "ranks_per_node": max(1, config.num_accelerators),
        "accelerator": config.accelerator if accelerated else None,
        **needs_of("train", config).model_dump(exclude={"num_retries"}),
        "image": images.in_registry(images.TRAIN, config.registry),
        "runtime": config.trainer_runtime,
        "runtime_kind": config.trainer_runtime_kind,
        "shared_claim": config.shared_claim,
        "scratch_size": config.scratch_size,
        "environment": plain_variables(config),
        "ca_config_map": config.ca_bundle.config_map if config.ca_bundle else None,
        "secrets": config.secrets,
        "image_pull_secrets": config.image_pull_secrets,
        "queue": config.queue,
        "workload_priority_class": config.workload_priority_class,
        "run_as_user": config.run_as_user,
    }
    if accelerated:
        values |= {
            "shared_memory": config.shared_memory,
            "node_selector": config.node_selector,
            "accelerator_products": config.accelerator_products,
            "tolerations": [toleration.model_dump() for toleration in config.tolerations],
        }
    return NodesConfig.parse(values)


def _retry(task: PipelineTask, num_retries: int, *, timeout_hours: float) -> None:
    """Let KFP start a task again if its pod vanished: drained, preempted, or its node was lost.

    KFP 2.17 does not start a task again whose process failed, so a step handles such faults itself.

    Argo counts `backoff_max_duration` from the first try's creation, and ends even a running retry
    when that time is over. Therefore it is long enough for every try to wait and to use its whole
    time limit: the number of tries and `timeout_hours` are the limits that count. It cannot be left
    out, because KFP would set one hour.
    """
    pauses = FIRST_PAUSE_SECONDS * (2**num_retries - 1)
    seconds = pauses + (num_retries + 1) * (timeout_hours + MAX_WAIT_HOURS) * 3600
    task.set_retry(
        num_retries=num_retries,
        backoff_duration=f"{FIRST_PAUSE_SECONDS}s",
        backoff_factor=2,
        backoff_max_duration=f"{int(seconds)}s",
    )


def _accelerate(task: PipelineTask, config: PlacementConfig, count: int) -> None:
    task.set_accelerator_type(config.accelerator).set_accelerator_limit(count)
    for key, value in config.node_selector.items():
        kubernetes.add_node_selector(task, key, value)
    if config.accelerator_products:
        found = has_product(config.accelerator_products, config.accelerator)
        kubernetes.add_node_affinity(task, match_expressions=[found])
    for toleration in config.tolerations:
        kubernetes.add_toleration(task, **toleration.model_dump())
    if config.shared_memory:
        # The default of container runtimes is 64 MB; NCCL and data loaders use more.
        kubernetes.empty_dir_mount(
            task, "dshm", SHARED_MEMORY_PATH, medium="Memory", size_limit=config.shared_memory
        )


def _keep_checkpoints(task: PipelineTask, config: PlacementConfig) -> None:
    """Let train write checkpoints to a claim, so that a retry in a new pod finds them."""
    if config.shared_claim:
        kubernetes.mount_pvc(task, config.shared_claim, SHARED_PATH)
        # Training on several nodes uses the same directory.
        task.set_env_variable(ROOT_VARIABLE, f"{SHARED_PATH}/tuneline/checkpoints")
    elif config.cache_claim:
        kubernetes.mount_pvc(task, config.cache_claim, CACHE_PATH)
        task.set_env_variable(ROOT_VARIABLE, f"{CACHE_PATH}/checkpoints")


def _set_environment(task: PipelineTask, config: PlacementConfig) -> None:
    """Set the variables that every pod gets, and mount the certificates that they name."""
    for name, value in plain_variables(config).items():
        task.set_env_variable(name, value)
    if config.ca_bundle:
        kubernetes.use_config_map_as_volume(task, config.ca_bundle.config_map, CA_PATH)


def _mount_and_connect(
    task: PipelineTask, step: Step, config: PlacementConfig, notified: Collection[str]
) -> None:
    """Mount volumes, and set environment variables from secrets that may be absent.

    The compiled pipeline contains only the names of the secrets.
    """
    if step.scratch and config.scratch_size:
        kubernetes.empty_dir_mount(task, "scratch", SCRATCH_PATH, size_limit=config.scratch_size)
        task.set_env_variable("TMPDIR", SCRATCH_PATH)
    for secret, variables in config.secrets.items():
        chosen = {
            key: name
            for key, name in variables.items()
            if (step.notifies if name in notified else step.hub or step.tracks)
        }
        if chosen:
            kubernetes.use_secret_as_env(task, secret, chosen, optional=True)
    if not step.hub:
        return
    if config.cache_claim:
        kubernetes.mount_pvc(task, config.cache_claim, CACHE_PATH)
        task.set_env_variable("HF_HOME", f"{CACHE_PATH}/huggingface")
    if config.hub_token_secret:
        # Optional, because public models need no token.
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
