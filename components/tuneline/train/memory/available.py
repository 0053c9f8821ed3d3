"""How much memory a rank may still take on its device."""

from pathlib import Path

import psutil
import torch

from tuneline.train.config import TrainConfig
from tuneline.train.memory.estimate import GIB

_CONTEXT_BYTES = 512 * 2**20
"""Memory that the CUDA context of a rank's process takes. The step's own process, which asks for
the free memory, has another context."""


def available_memory(config: TrainConfig, device: str, num_ranks: int = 1) -> int:
    """Return the bytes that a rank may still take: free memory, but at most `train.memory_gib`."""
    free = _free_memory(device, num_ranks)
    return free if config.memory_gib is None else min(free, int(config.memory_gib * GIB))


def host_memory(num_ranks: int) -> int:
    """Return the bytes of the machine's or container's memory that one of its ranks may take."""
    free = int(psutil.virtual_memory().available)
    limit = _container_headroom()
    return (free if limit is None else min(free, limit)) // num_ranks


def resident_bytes() -> int:
    """Return this process' resident memory in bytes: mostly libraries, until a model is loaded."""
    return int(psutil.Process().memory_info().rss)


def _free_memory(device: str, num_ranks: int) -> int:
    if device != "cpu":
        return max(0, torch.cuda.mem_get_info(device)[0] - _CONTEXT_BYTES)
    # Ranks on CPUs share the machine's memory; on GPUs, each rank has the memory of its GPU.
    return host_memory(num_ranks)


def _container_headroom(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Return the bytes that are free below a container's memory limit; None without a limit."""
    try:
        limit = (root / "memory.max").read_text().strip()
        used = int((root / "memory.current").read_text())
        details = dict(line.split() for line in (root / "memory.stat").read_text().splitlines())
    except OSError:
        return None
    # Inactive file pages are cache, which the kernel reclaims when memory is needed.
    return None if limit == "max" else int(limit) - used + int(details["inactive_file"])
