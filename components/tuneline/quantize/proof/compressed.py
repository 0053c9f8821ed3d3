"""Compute with a checkpoint of compressed-tensors whose weights stay as its files hold them.

compressed-tensors decompresses all weights of a model at its first forward pass. Here each layer is
decompressed just before its use, so that only one layer's weights are in memory in a wide dtype.
The inputs of a layer are rounded by compressed-tensors as the checkpoint's scheme says, e.g. to FP8
with a scale per token.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch


def keep_compressed(model: Any) -> None:
    """Make a model that transformers has loaded keep its compressed weights."""
    # Imported here, because most models are not compressed, and most images lack the package.
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization.utils import is_module_quantized

    model.ct_decompress_hook.remove()
    del model.ct_decompress_hook
    for module in model.modules():
        if is_module_quantized(module):
            compressor = BaseCompressor.get_value_from_registry(module.quantization_scheme.format)
            module.forward = functools.partial(_forward, module, module.forward, compressor)


def _forward(
    module: Any, forward: Callable[..., torch.Tensor], compressor: Any, x: torch.Tensor
) -> torch.Tensor:
    weight = module.weight
    parts = {"weight": weight.data, "weight_scale": module.weight_scale.data}
    wide = compressor.decompress(parts, module.quantization_scheme)["weight"]
    module.weight = torch.nn.Parameter(wide.to(x.dtype), requires_grad=False)
    try:
        return forward(x)
    finally:
        module.weight = weight
