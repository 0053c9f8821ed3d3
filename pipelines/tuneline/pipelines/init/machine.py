"""What this machine has to train with."""

import os
import subprocess
from dataclasses import dataclass

from tuneline.gpu_profiles import GPU_PROFILES

_QUERY = ("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits")
_SECONDS = 20


@dataclass(frozen=True)
class Machine:
    """The processors of a machine."""

    num_cpus: int
    """Number of CPU cores that this process may use."""
    gpu: str | None = None
    """Name of the first GPU, as the driver reports it; None without a GPU."""
    num_gpus: int = 0
    gpu_memory_gib: float = 0.0
    """Memory of the first GPU."""
    is_elsewhere: bool = False
    """Whether it is a node of a cluster, and not this machine."""

    @property
    def profile(self) -> str | None:
        """Name of the GPU profile of this kind of GPU; None if there is none."""
        product = (self.gpu or "").replace(" ", "-")
        return next((name for name, gpu in GPU_PROFILES.items() if product in gpu.products), None)

    def __str__(self) -> str:
        cores = f"{self.num_cpus} CPU core{'s' if self.num_cpus > 1 else ''}"
        if self.gpu is None:
            return f"{cores}, no NVIDIA GPU"
        if self.is_elsewhere:
            return f"a cluster with {self.gpu} GPUs of {self.gpu_memory_gib:.0f} GiB"
        return f"{self.num_gpus} x {self.gpu} with {self.gpu_memory_gib:.0f} GiB, {cores}"


def node_of(profile: str) -> Machine:
    """Return a node of a cluster with one GPU of a profile."""
    gpu = GPU_PROFILES[profile]
    name = gpu.products[0].replace("-", " ")
    return Machine(gpu.node.vcpus, name, 1, gpu.gpu_memory_gib, is_elsewhere=True)


def this_machine() -> Machine:
    """Return what this machine has; GPUs are those that NVIDIA's driver lists."""
    num_cpus = len(os.sched_getaffinity(0))
    try:
        answer = subprocess.run(
            _QUERY, capture_output=True, text=True, timeout=_SECONDS, check=True
        ).stdout
        gpus = [line.rsplit(",", 1) for line in answer.splitlines() if "," in line]
        name, mebibytes = gpus[0]
        return Machine(num_cpus, name.strip(), len(gpus), float(mebibytes) / 1024)
    except (OSError, subprocess.SubprocessError, IndexError, ValueError):
        return Machine(num_cpus)
