"""Compute in float32 with weights that stay in 16 bits, mapped from their files.

float32 holds every bfloat16 and float16, so a weight that is widened just before it is used gives
what one gives that was loaded in float32; only a product's order of additions may differ. Loaded,
8B parameters take 32 GB; mapped, they are pages of files, which the kernel drops and reads again as
it needs to. (A mixture's experts are copied, in 16 bits: transformers joins them into one tensor.)

It takes no longer: a linear layer is widened a block of rows at a time, which is still in the CPU's
cache when it is multiplied. 14336 x 4096 on one core of an EPYC: 13 ms for one token and 0.32 s for
256, either way; widened whole 144 ms and 0.46 s. `tests/measure/proof_memory.py` measures steps.

Legend: I and O a linear layer's inputs and outputs, R rows of a block, V vocabulary, H hidden size.
"""

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

BLOCK_WEIGHTS = 1 << 21
"""8 MB in float32. A quarter of it was a fifth slower with 1024 tokens, eight times as much took
twice as long with one."""

NUM_SMALL = 1 << 20
"""A weight of fewer numbers is widened for good: norms, biases, and what a module of another may
read, as Mamba reads its convolution's."""

NARROW = {"F16": torch.float16, "BF16": torch.bfloat16}
"""safetensors' names of the types that are widened."""


def narrow_dtype(model_dir: Path) -> torch.dtype | None:
    """Return the 16-bit type that all weights of a directory have; None if one has another."""
    from safetensors import safe_open

    found = set()
    for path in model_dir.glob("*.safetensors"):
        with safe_open(path, framework="pt") as tensors:
            # safe_open is no mapping.
            found |= {tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
    return NARROW.get(found.pop()) if len(found) == 1 else None


def load(model_dir: Path, dtype: torch.dtype) -> Any:
    """Load a causal language model whose weights are of `dtype` and which computes in float32.

    Raises:
        OSError: transformers cannot.
        ValueError: transformers cannot.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    # On a CPU, and without a conversion, transformers leaves weights where safetensors mapped them.
    mapped = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype, device_map={"": "cpu"})
    # One that was made for float32, since constants are rounded to a model's type as well: Gemma's
    # embeddings are multiplied by the root of their width.
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(mapped.config), dtype=torch.float32)
    model.load_state_dict(mapped.state_dict(), assign=True)
    model.generation_config = mapped.generation_config
    widen(model)
    return model.eval()


def widen(model: torch.nn.Module) -> None:
    """Let a model on a CPU compute in float32, its large weights widened when they are used.

    Product and sum of different types are errors in torch, or float32, so that nothing can be
    computed in 16 bits without a word.
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
        module.forward = forward


def _looks_up(module: torch.nn.Module) -> bool:
    """Tell embeddings of tokens, Gemma's with their factor too, from those of positions."""
    return type(module) is torch.nn.Embedding or (
        isinstance(module, torch.nn.Embedding)
        and type(module).__name__.endswith("ScaledWordEmbedding")
    )


def _linear(module: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
    num_outputs, num_inputs = module.weight.shape
    num_rows = max(1, BLOCK_WEIGHTS // num_inputs)
    y = x.new_empty(*x.shape[:-1], num_outputs)
    room_RI = x.new_empty(min(num_rows, num_outputs), num_inputs)
    for weight_RI, y_R in zip(
        module.weight.split(num_rows), y.split(num_rows, dim=-1), strict=True
    ):
        block_RI = room_RI[: len(weight_RI)].copy_(weight_RI)
        y_R.copy_(torch.nn.functional.linear(x, block_RI))
    return y if module.bias is None else y.add_(module.bias)


def _embedding(
    module: Any, forward: Callable[..., torch.Tensor], ids: torch.Tensor
) -> torch.Tensor:
    """Look up the rows that are asked for in a table of only these."""
    rows, places = ids.unique(return_inverse=True)
    weight_VH, padding = module.weight, module.padding_idx
    # Padding is for gradients only, and may not lie outside the table.
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
    """Run a forward with weights that are wide as long as it takes: a layer's experts, mostly."""
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
