"""Experts of a mixture-of-experts model in NF4: which parameters they are, and their numbers.

transformers keeps the routed experts of a layer in two parameters with three dimensions, such as
`gate_up_proj` [E, 2 I, H] and `down_proj` [E, H, I]. bitsandbytes quantises only linear layers.
This module quantises such a stack expert by expert with bitsandbytes' own functions, so that no
block of weights, and no block of scales, spans two experts: merge can compute one expert at a time.

Train and merge must use exactly the same quantised weights, so only this module defines them.

Shapes: E experts, R rows and C columns of an expert as the model stores it, B = ceil(R C / 64)
blocks of an expert.
"""

import dataclasses
from typing import Any

import bitsandbytes.functional as bnb
import torch
from transformers.quantizers.quantizers_utils import should_convert_module

from tuneline.models.nf4_layout import BLOCKSIZE, NESTED_BLOCKSIZE


@dataclasses.dataclass(frozen=True)
class Stack:
    """Shape and layout of a parameter that holds one weight per expert."""

    num_experts: int
    rows: int
    columns: int
    is_transposed: bool
    """Whether an expert's weight is [inputs, outputs] instead of [outputs, inputs]."""

    @property
    def numel(self) -> int:
        """Number of weights of all experts."""
        return self.num_experts * self.rows * self.columns

    @property
    def num_blocks(self) -> int:
        """Number of blocks of one expert."""
        return -(-self.rows * self.columns // BLOCKSIZE)

    @property
    def in_features(self) -> int:
        """Number of inputs of an expert."""
        return self.rows if self.is_transposed else self.columns

    @property
    def out_features(self) -> int:
        """Number of outputs of an expert."""
        return self.columns if self.is_transposed else self.rows


def expert_modules(model: torch.nn.Module) -> dict[str, Any]:
    """Return the modules that hold stacks of experts, by their names without peft's wrappers.

    They are those to which transformers' `use_experts_implementation` gives an exchangeable
    forward method, because no other forward method can be made to read NF4.
    """
    return {
        name.replace(".base_layer", ""): module
        for name, module in model.named_modules()
        if hasattr(module, "has_gate") and hasattr(module, "is_transposed")
    }


def projections(module: Any) -> tuple[str, str]:
    """Return the names of a module's parameters that experts compute with, in their order."""
    return ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")


def quantized_experts(model: torch.nn.Module) -> dict[str, Stack]:
    """Return the stacks that `nf4.load_base(quantized=True)` quantises, by parameter name.

    Args:
        model: an empty model, or one that `load_base` has loaded. If it is quantised, the stacks
            are those that were quantised.
    """
    left_out = list(getattr(model, "_keep_in_fp32_modules", None) or [])
    stacks = {}
    for name, module in expert_modules(model).items():
        if not should_convert_module(name, left_out):
            continue
        quantized = getattr(module, "nf4_stacks", None)
        for projection in projections(module):
            weight = getattr(module, projection, None)
            if quantized is not None:
                stacks[f"{name}.{projection}"] = quantized[projection]
            elif isinstance(weight, torch.Tensor) and weight.dim() == 3:
                stacks[f"{name}.{projection}"] = Stack(*weight.shape, bool(module.is_transposed))
    return stacks


def buffer_shapes(stack: Stack) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return shape and dtype of what is stored beside the packed weights, by what it is.

    Values in fp32 are stored as the integers that have the same bits. A cast of the whole model,
    such as DeepSpeed's to bfloat16, would round floating-point buffers.
    """
    nested = -(-stack.num_blocks // NESTED_BLOCKSIZE)
    return {
        "absmax": ((stack.num_experts, stack.num_blocks), torch.uint8),
        "nested_absmax": ((stack.num_experts, nested), torch.int32),
        "offset": ((stack.num_experts,), torch.int32),
        "code": ((16,), torch.int32),
        "nested_code": ((256,), torch.int32),
    }


def quantize_stack(weight: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Quantise a stack [E, R, C] on its own device, one expert at a time.

    Returns:
        The packed weights, uint8 [E, ceil(R C / 2)], and the tensors of `buffer_shapes`.
    """
    stack = Stack(*weight.shape, is_transposed=False)
    buffers = {
        name: torch.empty(shape, dtype=dtype, device=weight.device)
        for name, (shape, dtype) in buffer_shapes(stack).items()
    }
    num_bytes = -(-stack.rows * stack.columns // 2)
    packed = torch.empty(stack.num_experts, num_bytes, dtype=torch.uint8, device=weight.device)
    for number, expert in enumerate(weight):
        values, state = _quantize(expert)
        packed[number] = values.flatten()
        buffers["absmax"][number] = state.absmax
        buffers["nested_absmax"][number] = _bits(state.state2.absmax)
        buffers["offset"][number] = _bits(state.offset)
        if number == 0:
            buffers["code"].copy_(_bits(state.code))
            buffers["nested_code"].copy_(_bits(state.state2.code))
    return packed, buffers


def round_trip_experts(
    weight: torch.Tensor, *, dtype: torch.dtype, device: str | torch.device
) -> torch.Tensor:
    """Return weights of experts after NF4 quantisation and dequantisation, in fp32 on the CPU.

    Args:
        weight: one expert [R, C], or a stack of experts [E, R, C], as the model stores it: with
            gate and up joined, where the model joins them.
        dtype: type in which training loaded the weight before quantising it.
        device: device to quantise on; rounding may differ in the last bit between devices.
    """
    if weight.dim() == 3:
        return torch.stack([round_trip_experts(w, dtype=dtype, device=device) for w in weight])
    packed, state = _quantize(weight.to(device=device, dtype=dtype))
    # Dequantising rounds the product of code and scale to this type. fp32 needs no rounding.
    state.dtype = torch.float32
    return bnb.dequantize_4bit(packed, state).cpu().view(weight.shape)


def _quantize(weight: torch.Tensor) -> tuple[torch.Tensor, bnb.QuantState]:
    # As one row: on a CPU, bitsandbytes 0.50.2 dequantises a matrix wrongly if a block spans rows.
    row = weight.contiguous().flatten()
    packed, state = bnb.quantize_4bit(
        row, blocksize=BLOCKSIZE, compress_statistics=True, quant_type="nf4"
    )
    return packed, state


def _bits(values: torch.Tensor) -> torch.Tensor:
    return values.float().view(torch.int32)
