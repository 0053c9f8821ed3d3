"""Compute in float32 with 16-bit weights that stay mapped from their files.

float32 represents every bfloat16 and float16 value, so a weight that is widened just before its use
gives the same result as one that was loaded in float32, up to the order of summation within a
matrix product. Loaded in float32, 8B parameters take 32 GB of memory. Mapped, they are pages
of files, which the kernel can drop and read again when memory is short. (The experts of a mixture
of experts are copied to memory, in 16 bits, because transformers joins them into one tensor.)

Widening takes no extra time: a linear layer is widened one block of rows at a time, and the block
is still in the CPU's cache when it is multiplied. Measured for a layer of 14336 x 4096 on one core
of an EPYC: one token takes 13 ms and 256 tokens take 0.32 s, with float32 weights as with blocks.
Widening the whole layer at once takes 144 ms and 0.46 s. `tests/measure/proof_memory.py`
measures whole steps.

Legend: I inputs and O outputs of a linear layer, R rows of a block, V vocabulary, H hidden size.
"""

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from tuneline.models.whole import load_whole

BLOCK_WEIGHTS = 1 << 21
"""Number of weights per block; 8 MB in float32. Measured: blocks of a quarter of this size take
20 % longer with 1024 tokens, and blocks of eight times this size twice as long with one token."""

NUM_SMALL = 1 << 20
"""A weight with fewer elements than this is converted to float32 once and stays so: norms, biases,
and weights that another module reads directly, as Mamba's mixer reads those of its convolution."""

NARROW = {"F16": torch.float16, "BF16": torch.bfloat16}
"""The dtypes that are widened, by the name that safetensors gives them."""


def narrow_dtype(model_dir: Path) -> torch.dtype | None:
    """Return the dtype of a directory's weights if all have the same 16-bit dtype, else None."""
    dtypes = set()
    for path in model_dir.glob("*.safetensors"):
        with safe_open(path, framework="pt") as tensors:
            # SIM118 is off: safe_open is not a mapping and cannot be iterated without keys().
            dtypes |= {tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
    return NARROW.get(dtypes.pop()) if len(dtypes) == 1 else None


def load(model_dir: Path, dtype: torch.dtype) -> Any:
    """Load a causal language model with weights of `dtype` that computes in float32.

    Raises:
        OSError: transformers cannot load the model.
        ValueError: transformers cannot load the model.
    """
    # On a CPU and without a change of dtype, transformers uses the weights that safetensors mapped.
    mapped = load_whole(model_dir, dtype=dtype, device_map={"": "cpu"})
    # The modules are created in float32, because a model also rounds constants to its dtype, e.g.
    # Gemma the factor of its embeddings (the root of their width).
    with init_empty_weights(include_buffers=False):
        auto: Any = AutoModelForCausalLM
        model: Any = auto.from_config(copy.deepcopy(mapped.config), dtype=torch.float32)
    model.load_state_dict(mapped.state_dict(), assign=True)
    model.generation_config = mapped.generation_config
    widen(model)
    return model.eval()


def widen(model: torch.nn.Module) -> None:
    """Make a model on a CPU compute in float32, with large weights widened when they are used.

    No weight can be forgotten unnoticed: in torch, a product or sum of a float32 tensor and a
    16-bit tensor is computed in float32 or raises an error.
    """
    for module in model.modules():
        narrow = []
        for name, weight in module.named_parameters(recurse=False):
            if weight.dtype not in NARROW.values():
                continue
            if weight.numel() < NUM_SMALL:
                setattr(module, name, _fixed(weight.float()))
            else:
                narrow.append(name)
        if not narrow:
            continue
        forward: Callable[..., Any] = module.forward
        if type(module) is torch.nn.Linear:
            forward = functools.partial(_linear, module)
        elif _looks_up(module):
            forward = functools.partial(_embedding, module, forward)
        else:
            forward = functools.partial(_widened, module, forward, narrow)
        cast(Any, module).forward = forward


def _looks_up(module: torch.nn.Module) -> bool:
    """Return whether a module embeds tokens, not positions.

    Gemma embeds tokens with a subclass of Embedding that multiplies embeddings by a factor.
    """
    return type(module) is torch.nn.Embedding or (
        isinstance(module, torch.nn.Embedding)
        and type(module).__name__.endswith("ScaledWordEmbedding")
    )


def _linear(module: torch.nn.Linear, x: torch.Tensor) -> Any:
    weight_OI: Any = module.weight
    num_outputs, num_inputs = weight_OI.shape
    num_rows = max(1, BLOCK_WEIGHTS // num_inputs)
    y: Any = x.new_empty(*x.shape[:-1], num_outputs)
    room_RI = x.new_empty(min(num_rows, num_outputs), num_inputs)
    for weight_RI, y_R in zip(weight_OI.split(num_rows), y.split(num_rows, dim=-1), strict=True):
        block_RI = room_RI[: len(weight_RI)].copy_(weight_RI)
        y_R.copy_(torch.nn.functional.linear(x, block_RI))
    if module.bias is not None:
        y.add_(module.bias)
    return y


def _embedding(
    module: Any, forward: Callable[..., torch.Tensor], ids: torch.Tensor
) -> torch.Tensor:
    """Look up embeddings after widening only the rows of the table that `ids` name."""
    rows, places = torch.unique(ids, return_inverse=True)
    weight_VH, padding = module.weight, module.padding_idx
    # padding_idx matters only for gradients. It is removed, because it may exceed the small table.
    module.weight, module.padding_idx = _fixed(weight_VH[rows].float()), None
    try:
        return forward(places)
    finally:
        module.weight, module.padding_idx = weight_VH, padding


def _widened(
    module: torch.nn.Module,
    forward: Callable[..., Any],
    names: list[str],
    *arguments: Any,
    **named: Any,
) -> Any:
    """Run `forward` with the weights `names` widened, and restore these weights afterwards.

    This is mostly for the experts of a layer.
    """
    narrow = {name: getattr(module, name) for name in names}
    for name, weight in narrow.items():
        setattr(module, name, _fixed(weight.float()))
    try:
        return forward(*arguments, **named)
    finally:
        for name, weight in narrow.items():
            setattr(module, name, weight)


def _fixed(weight: torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(weight, requires_grad=False)
