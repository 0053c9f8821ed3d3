"""Read the types and sizes of the tensors in a GGUF file, with ggml's own reader."""

import math
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tuneline.errors import ToolError
from tuneline.quantize.gguf.ggml import InitParams, library

K_BLOCK = 256
"""Weights in a block of a k-quant: a row that this does not divide gets another type."""


@dataclass(frozen=True)
class Tensor:
    """One tensor of a file; `shape` as ggml counts, the length of a row first."""

    name: str
    type: str
    shape: tuple[int, ...]
    num_bytes: int

    @property
    def num_weights(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)


def read(file: Path) -> list[Tensor]:
    """List the tensors of a file; only its header is read.

    Raises:
        ToolError: ggml does not read the file.
    """
    ggml = library()
    context = ggml.gguf_init_from_file(os.fsencode(file), InitParams(no_alloc=True, ctx=None))
    if not context:
        raise ToolError(f"{file} is not a GGUF file that llama.cpp reads")
    try:
        return [
            Tensor(
                name=ggml.gguf_get_tensor_name(context, index).decode(),
                type=ggml.ggml_type_name(ggml.gguf_get_tensor_type(context, index)).decode(),
                shape=tuple(ggml.gguf_get_tensor_ne(context, index)[:4]),
                num_bytes=ggml.gguf_get_tensor_size(context, index),
            )
            for index in range(ggml.gguf_get_n_tensors(context))
        ]
    finally:
        ggml.gguf_free(context)


def count_types(tensors: list[Tensor]) -> dict[str, int]:
    """Return how many tensors have each type, the most frequent first."""
    return dict(Counter(tensor.type for tensor in tensors).most_common())


def bits_per_weight(tensors: list[Tensor]) -> float:
    """Return the mean over all weights of the file."""
    num_weights = sum(tensor.num_weights for tensor in tensors)
    return 8 * sum(tensor.num_bytes for tensor in tensors) / num_weights


def fallback_note(tensors: list[Tensor], format: str) -> str | None:
    """Say which tensors a k-quant could not be used for; llama.cpp only logs it."""
    if "_k" not in format:
        return None
    fallen = [
        tensor
        for tensor in tensors
        if tensor.type.startswith("q") and not tensor.type.endswith("_K")
        if tensor.shape[0] % K_BLOCK
    ]
    if not fallen:
        return None
    widths = sorted({tensor.shape[0] for tensor in fallen})
    return (
        f"{len(fallen)} of {len(tensors)} tensors fell back to "
        f"{', '.join(sorted(count_types(fallen)))}: rows of {', '.join(map(str, widths))} weights "
        f"are not a multiple of {K_BLOCK}"
    )
