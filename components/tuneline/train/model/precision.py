"""Where and in which type a run computes."""

from typing import TYPE_CHECKING

from tuneline.errors import RecipeError
from tuneline.train.config import TrainConfig

if TYPE_CHECKING:
    import torch


def choose_device() -> str:
    """Return "cuda" where there is one, else "cpu"."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def choose_dtype(config: TrainConfig, device: str) -> "torch.dtype":
    """Return the compute type.

    auto is bfloat16 where the hardware multiplies it: a GPU that has it natively, a CPU with
    AVX512-BF16 or AMX; elsewhere float32, because a CPU without them emulates bfloat16.

    Raises:
        RecipeError: float16 on a CPU, which has no loss scaling there.
    """
    import torch

    if config.dtype == "float16" and device == "cpu":
        raise RecipeError(
            "train.dtype: float16 needs a GPU; on a CPU take float32, bfloat16 or auto"
        )
    if config.dtype != "auto":
        return getattr(torch, config.dtype)
    if device == "cpu":
        has = torch.cpu.get_capabilities()
        native = has.get("avx512_bf16") or has.get("amx_bf16")
    else:
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if native else torch.float32


def peak_memory_bytes(device: str) -> int:
    """Return the peak of the GPU's allocator, or of this process' resident memory."""
    import resource

    import torch

    if device == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return torch.cuda.max_memory_allocated()
