"""Collective operations, which all ranks call together; with one rank they return at once.

A rank is a process with one GPU, or a process on a CPU. All ranks must decide together how a run
goes on: whether to write a checkpoint, stop, skip a step or stop early. Ranks that decide
differently wait for each other forever, so every such decision goes through this module.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


def rank() -> int:
    """Return the rank of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def num_ranks() -> int:
    """Return the number of ranks that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def num_ranks_here() -> int:
    """Return the number of ranks on this node; torchrun names it in LOCAL_WORLD_SIZE."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", num_ranks()))


def is_first() -> bool:
    """Return whether this is rank 0, which writes files, logs and reports progress."""
    return rank() == 0


def any_of(*flags: bool) -> list[bool]:
    """Return for each flag whether it is set on at least one rank."""
    if num_ranks() == 1:
        return list(flags)
    values = torch.tensor(flags, dtype=torch.int32, device=_device())
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return [bool(value) for value in values.tolist()]


def summed(*values: float) -> list[float]:
    """Return the sum of each value over all ranks, added in float64."""
    if num_ranks() == 1:
        return list(values)
    tensor = torch.tensor(values, dtype=torch.float64, device=_device())
    dist.all_reduce(tensor)
    sums: list[float] = tensor.tolist()
    return sums


def highest(value: int) -> int:
    """Return the maximum of a value over all ranks."""
    if num_ranks() == 1:
        return value
    maximum = torch.tensor(value, dtype=torch.int64, device=_device())
    dist.all_reduce(maximum, op=dist.ReduceOp.MAX)
    return int(maximum)


def gathered(values: torch.Tensor) -> torch.Tensor:
    """Stack one tensor per rank in the order of ranks; all tensors must have the same shape."""
    if num_ranks() == 1:
        return values[None]
    tensors = [torch.empty_like(values) for _ in range(num_ranks())]
    dist.all_gather(tensors, values)
    return torch.stack(tensors)


def concatenated(values: torch.Tensor) -> torch.Tensor:
    """Concatenate one tensor per rank along the first axis; its length may differ between ranks."""
    if values.dim() == 0:
        return gathered(values)
    lengths = gathered(torch.tensor(len(values), device=values.device)).tolist()
    padding = values.new_zeros(max(lengths) - len(values), *values.shape[1:])
    parts = gathered(torch.cat([values, padding]))
    return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])


def from_first(make: Callable[[], T]) -> T:
    """Call a function on rank 0 only, and return its result on every rank."""
    if num_ranks() == 1:
        return make()
    results = [make() if is_first() else None]
    dist.broadcast_object_list(results, src=0)
    return results[0]  # type: ignore[return-value]


def wait_for_all() -> None:
    """Wait until every rank has called this function."""
    if num_ranks() > 1:
        dist.barrier()


@contextlib.contextmanager
def first_goes_first() -> Iterator[None]:
    """Run the body first on rank 0, so that the other ranks find what rank 0 has cached."""
    if not is_first():
        wait_for_all()
    yield
    if is_first():
        wait_for_all()


def device_name(device: str) -> str:
    """Return the device of this rank for a kind of device, such as "cuda:1" for "cuda"."""
    if device != "cuda" or num_ranks() == 1:
        return device
    return f"cuda:{torch.cuda.current_device()}"


def _device() -> torch.device:
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
