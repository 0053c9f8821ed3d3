"""The ranks that train together, as one of them sees the others; alone, everything is itself.

A rank is a process with a GPU, or a process on a CPU. Whatever decides how a run goes on, that is
to write a checkpoint, to stop, to skip a step, to end early, is asked of all ranks here, because
ranks that decide differently wait for each other for ever.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


def rank() -> int:
    """Return this process' rank, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def num_ranks() -> int:
    """Return how many ranks train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this is the rank that writes, logs and reports."""
    return rank() == 0


def any_of(*flags: bool) -> list[bool]:
    """Tell for each flag whether it is set on some rank."""
    if num_ranks() == 1:
        return list(flags)
    values = torch.tensor(flags, dtype=torch.int32, device=_device())
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return [bool(value) for value in values.tolist()]


def summed(*values: float) -> list[float]:
    """Add up values over all ranks, in float64."""
    if num_ranks() == 1:
        return list(values)
    sums = torch.tensor(values, dtype=torch.float64, device=_device())
    dist.all_reduce(sums)
    return sums.tolist()


def highest(value: int) -> int:
    """Return the largest value of any rank."""
    if num_ranks() == 1:
        return value
    found = torch.tensor(value, dtype=torch.int64, device=_device())
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return int(found)


def gathered(values: torch.Tensor) -> torch.Tensor:
    """Stack a tensor of every rank, all of one shape, in the order of ranks."""
    if num_ranks() == 1:
        return values[None]
    found = [torch.empty_like(values) for _ in range(num_ranks())]
    dist.all_gather(found, values)
    return torch.stack(found)


def concatenated(values: torch.Tensor) -> torch.Tensor:
    """Join a tensor of every rank along its first axis, of whatever length each has it."""
    if values.dim() == 0:
        return gathered(values)
    lengths = gathered(torch.tensor(len(values), device=values.device)).tolist()
    missing = values.new_zeros(max(lengths) - len(values), *values.shape[1:])
    parts = gathered(torch.cat([values, missing]))
    return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])


def from_first(make: Callable[[], T]) -> T:
    """Call a function on the first rank only, and give every rank what it returned."""
    if num_ranks() == 1:
        return make()
    found = [make() if is_first() else None]
    dist.broadcast_object_list(found, src=0)
    return found[0]  # type: ignore[return-value]


def wait_for_all() -> None:
    """Return when every rank has come here."""
    if num_ranks() > 1:
        dist.barrier()


@contextlib.contextmanager
def first_goes_first() -> Iterator[None]:
    """Let the first rank run the body alone, so that the others find what it has cached."""
    if not is_first():
        wait_for_all()
    yield
    if is_first():
        wait_for_all()


def device_name(device: str) -> str:
    """Return which device of a kind is this rank's: "cuda:1" of "cuda" on the second one."""
    if device != "cuda" or num_ranks() == 1:
        return device
    return f"cuda:{torch.cuda.current_device()}"


def _device() -> torch.device:
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
