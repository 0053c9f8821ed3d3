"""The device and the compute type of a run."""

import resource

import torch

from tuneline.errors import RecipeError
from tuneline.train.config import TrainConfig

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def choose_device() -> str:
    """Return "cuda" if there is a GPU, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def choose_dtype(config: TrainConfig, device: str) -> torch.dtype:
    """Return the compute type.

    `dtype: auto` is bfloat16 on hardware that multiplies bfloat16 natively: many GPUs, and CPUs
    with AVX512-BF16 or AMX. Otherwise it is float32, because emulated bfloat16 is slow.

    Raises:
        RecipeError: the recipe asks for float16 on a CPU, where transformers has no loss scaling.
    """
    if config.dtype == "float16" and device == "cpu":
        raise RecipeError(
            "train.dtype: float16 needs a GPU; on a CPU set it to float32, bfloat16 or auto"
        )
    if config.dtype != "auto":
        return DTYPES[config.dtype]
    if device == "cpu":
        capabilities = torch.cpu.get_capabilities()
        native = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    else:
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if native else torch.float32


def peak_memory_bytes(device: str) -> int:
    """Return the peak of PyTorch's GPU allocator, or on a CPU that of resident memory."""
    if device == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return torch.cuda.max_memory_allocated()
