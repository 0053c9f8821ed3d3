"""What each task asks of the cluster: CPU, memory, GPUs, retries, secrets, the pod's user.

Kubernetes is known here and nowhere else in the pipeline. Local runners ignore all of it. Every
pod runs as a numeric non-root user, as Pod Security "restricted" wants; the platform sets the
rest of that profile (no privilege escalation, no capabilities, seccomp) for all KFP pods.
"""

from dataclasses import dataclass

from kfp import kubernetes
from kfp.dsl import PipelineTask

from tuneline.recipe import PlacementConfig

USER_ID = 65532
"""The user that our images are built for; any other works too, with HOME writable."""


@dataclass(frozen=True)
class Needs:
    """What one task needs: CPU cores and memory as Kubernetes quantities."""

    cpu: tuple[str, str]
    """Request and limit."""
    memory: tuple[str, str]
    """Request and limit."""
    gpu: bool = False
    """Whether the recipe's accelerators go to this task."""
    hub: bool = False
    """Whether it may need the Hub token."""
    num_retries: int = 0
    """Where another try can help: the network, or a pod that was taken away."""


NEEDS = {
    "fetch": Needs(("1", "4"), ("4Gi", "16Gi"), hub=True, num_retries=3),
    "prepare": Needs(("2", "8"), ("4Gi", "16Gi"), hub=True, num_retries=2),
    "train": Needs(("4", "16"), ("16Gi", "64Gi"), gpu=True, num_retries=2),
    "merge": Needs(("4", "16"), ("16Gi", "64Gi"), gpu=True, num_retries=1),
    "convert-gguf": Needs(("2", "8"), ("8Gi", "48Gi"), num_retries=1),
    "quantize-gguf": Needs(("2", "16"), ("8Gi", "48Gi"), num_retries=1),
    "quantize-gptq": Needs(("4", "16"), ("16Gi", "64Gi"), gpu=True, num_retries=1),
    "evaluate": Needs(("4", "16"), ("16Gi", "64Gi"), gpu=True, hub=True, num_retries=2),
    "gate": Needs(("1", "2"), ("1Gi", "4Gi")),
    "report": Needs(("500m", "1"), ("512Mi", "2Gi")),
    "publish": Needs(("1", "4"), ("2Gi", "8Gi"), hub=True, num_retries=3),
    "diagnose": Needs(("500m", "1"), ("512Mi", "1Gi")),
}


def place(task: PipelineTask, name: str, config: PlacementConfig) -> PipelineTask:
    """Give `task` what the table says for the component `name`; returns the task."""
    needs = NEEDS[name]
    task.set_cpu_request(needs.cpu[0]).set_cpu_limit(needs.cpu[1])
    task.set_memory_request(needs.memory[0]).set_memory_limit(needs.memory[1])
    if needs.gpu and config.num_accelerators:
        task.set_accelerator_type(config.accelerator).set_accelerator_limit(config.num_accelerators)
    if needs.num_retries:
        task.set_retry(
            num_retries=needs.num_retries,
            backoff_duration="30s",
            backoff_factor=2,
            backoff_max_duration="600s",
        )
    if needs.hub and config.hub_token_secret:
        # By name and optional: public models need no token, and the pipeline holds none.
        kubernetes.use_secret_as_env(
            task, config.hub_token_secret, {"token": "HF_TOKEN"}, optional=True
        )
    kubernetes.set_security_context(task, run_as_user=USER_ID, run_as_non_root=True)
    return task
