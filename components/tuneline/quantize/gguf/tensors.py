"""Read the types and sizes of the tensors in a GGUF file with ggml's own reader."""

import math
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tuneline.errors import ToolError
from tuneline.quantize.gguf.ggml import InitParams, library

K_BLOCK = 256
"""Number of weights per block of a k-quant. If a tensor's row length is not a multiple of this
number, llama.cpp uses another type for the tensor."""


@dataclass(frozen=True)
class Tensor:
    """One tensor of a GGUF file; `shape` is in ggml's order, with the row length first."""

    name: str
    type: str
    shape: tuple[int, ...]
    num_bytes: int

    @property
    def num_weights(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def read(file: Path) -> list[Tensor]:
    """Return names, types and sizes of the tensors of a file, read from the file's header alone.

    Raises:
        ToolError: ggml cannot read the file.
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
    """Return the number of tensors of each type, most frequent type first."""
    return dict(Counter(tensor.type for tensor in tensors).most_common())


def bits_per_weight(tensors: list[Tensor]) -> float:
    """Return the mean bits per weight over all tensors."""
    num_weights = sum(tensor.num_weights for tensor in tensors)
    return 8 * sum(tensor.num_bytes for tensor in tensors) / num_weights


def fallback_note(tensors: list[Tensor], format: str) -> str | None:
    """Return a note on the tensors for which llama.cpp could not use the format's k-quant, if any.

    None if there are no such tensors, or if `format` is not a k-quant.
    """
    if "_k" not in format:
        return None
    others = [
        tensor
        for tensor in tensors
        if tensor.type.startswith("q") and not tensor.type.endswith("_K")
        if tensor.shape[0] % K_BLOCK
    ]
    if not others:
        return None
    widths = sorted({tensor.shape[0] for tensor in others})
    return (
        f"{len(others)} of {len(tensors)} tensors fell back to "
        f"{', '.join(sorted(count_types(others)))}: rows of {', '.join(map(str, widths))} weights "
        f"are not a multiple of {K_BLOCK}"
    )
