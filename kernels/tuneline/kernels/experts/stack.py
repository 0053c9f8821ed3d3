"""Routed experts' weights in NF4, and their adapters.

A *stack* holds one projection of all E experts of a layer. Each expert is quantised on its own, in
bitsandbytes' layout (see nf4.py): its blocks of 64 weights, its nested blocks of 256 absmax and its
offset belong to no other expert. With i an element of expert e's matrix, row by row:

    w[e, i] = round(code[nibble(e, i)] * absmax[e, i // 64])
    absmax[e, j] = nested_code[u8(e, j)] * nested_absmax[e, j // 256] + offset[e]

Shapes: E experts, N outputs, K inputs, r rank.
"""

# Triton's types declare neither a launch's options nor plain values for constexpr parameters.
# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from tuneline.kernels.ops._dispatch import use_kernel
from tuneline.kernels.ops.nf4 import store_weight

_BLOCK_WORDS = 512
_NUM_WARPS = 4


@dataclass(frozen=True, slots=True)
class ExpertStack:
    """One projection of all experts of a layer, in NF4.

    Attributes:
        packed: uint8 [E, N * K / 2].
        absmax: One per block of 64 weights [E, N * K / 64]: uint8 with double quantisation, else
            float32.
        code: The 16 levels, float32.
        num_out: N, outputs of the projection.
        num_in: K, inputs of the projection.
        dtype: Dtype of the dequantised weight.
        nested_absmax: float32 [E, ceil(N * K / 64 / 256)]. This and the two following attributes
            are None without double quantisation.
        nested_code: The 256 levels of absmax, float32.
        offset: Added to every absmax of an expert, float32 [E].
        transposed: Whether each expert's matrix is stored as [K, N], as in gpt-oss, not as [N, K].
        bias: Frozen bias [E, N], or None.
    """

    packed: Tensor
    absmax: Tensor
    code: Tensor
    num_out: int
    num_in: int
    dtype: torch.dtype
    nested_absmax: Tensor | None = None
    nested_code: Tensor | None = None
    offset: Tensor | None = None
    transposed: bool = False
    bias: Tensor | None = None

    def __post_init__(self) -> None:
        """Check that the blocks of 64 weights do not cross experts.

        Raises:
            ValueError: An expert's matrix does not have a multiple of 64 weights, or its rows do
                not have a multiple of 8.
        """
        num_weights, row = self.num_out * self.num_in, self.stored_shape[1]
        if num_weights % 64 or row % 8:
            raise ValueError(
                f"an expert's matrix {self.stored_shape} has {num_weights} weights: NF4 experts "
                "need a multiple of 64, in rows of a multiple of 8"
            )
        if self.packed.shape != (self.num_experts, num_weights // 2):
            raise ValueError(
                f"packed is {tuple(self.packed.shape)}: need [experts, {num_weights // 2}]"
            )

    @property
    def num_experts(self) -> int:
        """E: number of experts."""
        return self.packed.shape[0]

    @property
    def stored_shape(self) -> tuple[int, int]:
        """Shape of an expert's matrix as it is stored: (N, K), or (K, N) if transposed."""
        return (self.num_in, self.num_out) if self.transposed else (self.num_out, self.num_in)

    def block_absmax(self) -> Tensor:
        """Return the largest |w| of every block of 64, float32 [E, N * K / 64]."""
        if self.nested_absmax is None or self.nested_code is None or self.offset is None:
            return self.absmax
        scale = self.nested_absmax.repeat_interleave(256, dim=1)[:, : self.absmax.shape[1]]
        return self.nested_code[self.absmax.int()] * scale + self.offset[:, None]


@dataclass(frozen=True, slots=True)
class LoraPair:
    """The adapter of one projection: `a` [E, r, K], `b` [E, N, r]; both may be views (peft's)."""

    a: Tensor
    b: Tensor
    scaling: float

    @property
    def rank(self) -> int:
        """Rank of each expert's adapter."""
        return self.a.shape[1]


@dataclass(frozen=True, slots=True)
class ExpertLora:
    """The adapters of both projections; None for a projection without one."""

    gate_up: LoraPair | None = None
    down: LoraPair | None = None


@triton.jit
def _dequantize_kernel(
    words_ptr, absmax_ptr, code_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, out_ptr,
    starts_ptr, first, blocks, num_words, num_absmax, num_nested, out_stride_e, out_stride,
    K: tl.constexpr, NESTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    local = tl.program_id(0) // blocks
    expert = first + local
    if tl.load(starts_ptr + expert + 1) > tl.load(starts_ptr + expert):
        wide = expert.to(tl.int64)
        store_weight(
            tl.program_id(0) % blocks, words_ptr + wide * num_words,
            absmax_ptr + wide * num_absmax, code_ptr, nested_absmax_ptr + wide * num_nested,
            nested_code_ptr, offset_ptr + expert,
            out_ptr + local.to(tl.int64) * out_stride_e, num_words, out_stride, K, NESTED, BLOCK,
        )  # fmt: skip


def dequantize_experts_reference(
    stack: ExpertStack, *, first: int = 0, last: int | None = None
) -> Tensor:
    """Compute `dequantize_experts` of every expert in plain torch."""
    experts = slice(first, last)
    packed = stack.packed[experts]
    nibbles = torch.stack([packed >> 4, packed & 15], dim=-1).view(packed.shape[0], -1)
    absmax = stack.block_absmax()[experts].repeat_interleave(64, dim=1)
    weight = stack.code[nibbles.int()] * absmax
    return weight.to(stack.dtype).view(-1, *stack.stored_shape)


def dequantize_experts(
    stack: ExpertStack, starts: Tensor, *, first: int, last: int, out: Tensor
) -> None:
    """Dequantise the experts `first` to `last` (exclusive) that have rows.

    Args:
        stack: The quantised experts.
        starts: First row of each expert, and the end [E + 1], int32; an expert without rows is
            skipped.
        first: First expert.
        last: Expert after the last.
        out: [last - first, *stack.stored_shape], unit stride along the rows. What it holds for a
            skipped expert is undefined.
    """
    if not use_kernel(stack.code):
        out.copy_(dequantize_experts_reference(stack, first=first, last=last))
        return
    rows, columns = stack.stored_shape
    num_words = rows * columns // 8
    blocks = triton.cdiv(num_words, _BLOCK_WORDS)
    nested = stack.nested_absmax
    _dequantize_kernel[((last - first) * blocks,)](
        stack.packed.view(torch.int32), stack.absmax, stack.code,
        stack.absmax if nested is None else nested,
        stack.code if stack.nested_code is None else stack.nested_code,
        stack.code if stack.offset is None else stack.offset,
        out, starts, first, blocks, num_words, stack.absmax.shape[1],
        0 if nested is None else nested.shape[1], out.stride(0), out.stride(1),
        K=columns, NESTED=nested is not None, BLOCK=_BLOCK_WORDS, num_warps=_NUM_WARPS,
        enable_fp_fusion=False,
    )  # fmt: skip
