"""LoRA folded into the base GEMM, by appending columns to both operands along K.

A *group* is the set of linear layers that share one input (q, k, v; or o; or gate, up; or down).
Their N outputs are stacked, and their input has K columns. The R ranks of their adapters become
columns next to each other, padded with zeros to P columns (a power of two that is at least 64):

    X' = [X | X A^T]            [T, K + P]
    W' = [W | blockdiag(s B)]   [N, K + P]
    Y  = X' W'^T                                one GEMM, one rounding
    [dX0 | G] = dY W'           [T, K + P]      if N > K; then dX = dX0 + G A
    dX = [dY | G] [W ; A]                       if N <= K; the sum happens inside the GEMM
    dA = G^T X                  [P, K]
    dB = s dY^T (X A^T)         [N, P]          whose diagonal blocks are the gradients

A bias takes one of the padded columns: this column holds ones in X' and the bias in W', and its row
in A holds zeros. Neither dX nor an adapter's gradient depends on that column.

operands.py stores W' and A. P is at least 64 because cuBLAS is 2 to 19 % slower with widths of
K + 16 and K + 48 (H100), and P is a power of two because one Triton block spans P columns.

Shapes: T tokens, K inputs, N outputs of the group, P padded columns, r rank.
"""

# Triton's types declare neither a launch's options nor plain values for constexpr parameters.
# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from tuneline.kernels.limits import MIN_ADAPTER_COLUMNS, arena_bytes
from tuneline.kernels.ops._dispatch import use_kernel
from tuneline.kernels.ops.flatten import Scaled
from tuneline.kernels.ops.nf4 import NF4Weight

MAX_LINEARS = 3
_PACK_BLOCK = 64


@dataclass(frozen=True, slots=True)
class LoraLinear:
    """One frozen linear [N, K] and its adapter: `lora_a` [r, K] and `lora_b` [N, r], or neither."""

    weight: Tensor | NF4Weight
    num_out: int
    num_in: int
    bias: Tensor | None = None
    lora_a: Tensor | None = None
    lora_b: Tensor | None = None
    scaling: float = 1.0

    @property
    def adapter(self) -> tuple[Tensor, Tensor] | None:
        """A and B, or None without an adapter."""
        if self.lora_a is None or self.lora_b is None:
            return None
        return self.lora_a, self.lora_b

    @property
    def rank(self) -> int:
        """Number of rows of A; zero without an adapter."""
        return 0 if self.adapter is None else self.adapter[0].shape[0]


class Arena(Protocol):
    """A group's weights and adapters as GEMM operands (operands.py)."""

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""


@dataclass(slots=True)
class ArenaPlace:
    """Where a group's arena (operands.py) stays between forwards and backwards."""

    is_kept: bool = False
    """Whether the arena stays; otherwise each forward and backward dequantises a new one."""
    arena: Arena | None = None

    def keep(self, is_kept: bool) -> None:
        """Keep the next arena, or free the one that is kept."""
        self.is_kept = is_kept
        if not is_kept:
            self.arena = None


@dataclass(frozen=True, slots=True)
class LoraGroup:
    """The linears that share one input; their outputs are stacked in this order."""

    linears: tuple[LoraLinear, ...]
    largest: Tensor | None = None
    """max |W| as a tensor on the device if the group is computed in fp8; None otherwise."""
    place: ArenaPlace = field(default_factory=ArenaPlace, compare=False, repr=False)

    def __post_init__(self) -> None:
        """Check that the packing kernel supports these linears."""
        assert 1 <= len(self.linears) <= MAX_LINEARS
        assert len({linear.num_in for linear in self.linears}) == 1

    @property
    def num_in(self) -> int:
        """K: inputs of each linear."""
        return self.linears[0].num_in

    @property
    def num_out(self) -> int:
        """N: outputs of all linears."""
        return sum(linear.num_out for linear in self.linears)

    @property
    def rank(self) -> int:
        """R: the sum of the ranks."""
        return sum(linear.rank for linear in self.linears)

    @property
    def has_bias(self) -> bool:
        """Whether one of the columns holds biases."""
        return any(linear.bias is not None for linear in self.linears)

    @property
    def num_columns(self) -> int:
        """P: columns of ranks and bias, padded; zero without adapters and biases."""
        used = self.rank + self.has_bias
        return max(MIN_ADAPTER_COLUMNS, cast(int, triton.next_power_of_2(used))) if used else 0

    @property
    def can_keep_arena(self) -> bool:
        """Whether a kept arena spares work: all weights are NF4."""
        return all(isinstance(linear.weight, NF4Weight) for linear in self.linears)

    def arena_bytes(self, itemsize: int) -> int:
        """Return the bytes of the arena, for activations of `itemsize` bytes."""
        sizes = self.num_out, self.num_in, self.num_columns
        return arena_bytes(*sizes, itemsize, fp8=self.largest is not None)

    def blocks(self, db_NP: Tensor) -> list[Tensor]:
        """Return the diagonal blocks of dY^T (X A^T): [N, r] of each linear."""
        parts, row, column = [], 0, 0
        for linear in self.linears:
            parts.append(db_NP[row : row + linear.num_out, column : column + linear.rank])
            row += linear.num_out
            column += linear.rank
        return parts

    def parameters(self) -> list[Tensor]:
        """Return the trainable tensors, in the order of the result of `LoraGradients.split`."""
        return [tensor for linear in self.linears for tensor in linear.adapter or ()]


@dataclass(slots=True)
class LoraGradients:
    """Sums of a group's dA and dB / s over chunks of tokens, in fp32 or wider."""

    group: LoraGroup
    da_PK: Tensor | None = None
    db_Nr: list[Tensor] | None = None
    """One block per linear; the block of a linear without an adapter is empty."""

    def add(self, dy_TN: Tensor, g_TP: Tensor | None, x_TK: Tensor, xa_TP: Tensor) -> None:
        """Add one chunk's G^T X and dY^T (X A^T).

        Args:
            dy_TN: Gradient of the group's output.
            g_TP: dY (s B); None if the group has no adapter.
            x_TK: Input of the group.
            xa_TP: X A^T of the forward.
        """
        if g_TP is not None:
            self.add_a(mm_wide(g_TP.t(), x_TK))
            self.add_b(self.group.blocks(mm_wide(dy_TN.t(), xa_TP)))

    def add_a(self, da_PK: Tensor) -> None:
        """Add one chunk's G^T X; the rows of the padding are ignored."""
        self.da_PK = da_PK if self.da_PK is None else self.da_PK.add_(da_PK)

    def add_b(self, db_Nr: list[Tensor]) -> None:
        """Add one chunk's blocks of dY^T (X A^T)."""
        if self.db_Nr is None:
            self.db_Nr = db_Nr
        else:
            for total, block in zip(self.db_Nr, db_Nr, strict=True):
                total.add_(block)

    def split(self) -> list[Scaled]:
        """Return dA and dB of every adapter."""
        grads: list[Scaled] = []
        column = 0
        for index, linear in enumerate(self.group.linears):
            if linear.adapter is None:
                continue
            assert self.da_PK is not None and self.db_Nr is not None, "no chunk was added"
            grads.append(Scaled(self.da_PK[column : column + linear.rank]))
            grads.append(Scaled(self.db_Nr[index], linear.scaling))
            column += linear.rank
        return grads


@triton.jit
def _pack_kernel(
    sb_ptr, a_ptr, a0_ptr, a1_ptr, a2_ptr, b0_ptr, b1_ptr, b2_ptr,
    bias0_ptr, bias1_ptr, bias2_ptr, n0, n1, n2, s0, s1, s2,
    num_in, sb_stride, a_stride, num_row_blocks, peaks_ptr, HAS_PEAKS: tl.constexpr,
    R0: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr,
    HAS_BIAS0: tl.constexpr, HAS_BIAS1: tl.constexpr, HAS_BIAS2: tl.constexpr,
    P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write BLOCK rows of sB [N, P] or BLOCK columns of A [P, K] in each program."""
    pid = tl.program_id(0)
    p = tl.arange(0, P)
    block = tl.arange(0, BLOCK)
    num_out = n0 + n1 + n2
    if pid < num_row_blocks:
        row = pid * BLOCK + block
        value = tl.zeros([BLOCK, P], dtype=tl.float32)
        # The pointer of an absent linear is never read, because its rank is 0 at compile time.
        if R0 > 0:
            mask = (row < n0)[:, None] & (p < R0)[None, :]
            value += s0 * tl.load(b0_ptr + row[:, None] * R0 + p[None, :], mask, 0.0).to(tl.float32)
        if R1 > 0:
            r = row - n0
            c = p - R0
            mask = ((r >= 0) & (r < n1))[:, None] & ((c >= 0) & (c < R1))[None, :]
            value += s1 * tl.load(b1_ptr + r[:, None] * R1 + c[None, :], mask, 0.0).to(tl.float32)
        if R2 > 0:
            r = row - n0 - n1
            c = p - R0 - R1
            mask = ((r >= 0) & (r < n2))[:, None] & ((c >= 0) & (c < R2))[None, :]
            value += s2 * tl.load(b2_ptr + r[:, None] * R2 + c[None, :], mask, 0.0).to(tl.float32)
        if HAS_BIAS0 or HAS_BIAS1 or HAS_BIAS2:
            bias = tl.zeros([BLOCK], dtype=tl.float32)
            if HAS_BIAS0:
                bias += tl.load(bias0_ptr + row, row < n0, 0.0).to(tl.float32)
            if HAS_BIAS1:
                r = row - n0
                bias += tl.load(bias1_ptr + r, (r >= 0) & (r < n1), 0.0).to(tl.float32)
            if HAS_BIAS2:
                r = row - n0 - n1
                bias += tl.load(bias2_ptr + r, (r >= 0) & (r < n2), 0.0).to(tl.float32)
            value += tl.where((p == R0 + R1 + R2)[None, :], bias[:, None], 0.0)
        out = sb_ptr + row[:, None].to(tl.int64) * sb_stride + p[None, :]
        tl.store(out, value.to(sb_ptr.dtype.element_ty), (row < num_out)[:, None])
        if HAS_PEAKS:
            tl.atomic_max(peaks_ptr, tl.max(tl.abs(value)))
    else:
        # Triton 3.6 requires one type for a name that both branches bind, so the names differ here.
        column = (pid - num_row_blocks) * BLOCK + block
        inside = (column < num_in)[None, :]
        a_value = tl.zeros([P, BLOCK], dtype=tl.float32)
        if R0 > 0:
            a_mask = (p < R0)[:, None] & inside
            a_value += tl.load(a0_ptr + p[:, None] * num_in + column[None, :], a_mask, 0.0).to(
                tl.float32
            )
        if R1 > 0:
            a_row = p - R0
            a_mask = ((a_row >= 0) & (a_row < R1))[:, None] & inside
            a_value += tl.load(a1_ptr + a_row[:, None] * num_in + column[None, :], a_mask, 0.0).to(
                tl.float32
            )
        if R2 > 0:
            a_row = p - R0 - R1
            a_mask = ((a_row >= 0) & (a_row < R2))[:, None] & inside
            a_value += tl.load(a2_ptr + a_row[:, None] * num_in + column[None, :], a_mask, 0.0).to(
                tl.float32
            )
        a_out = a_ptr + p[:, None].to(tl.int64) * a_stride + column[None, :]
        tl.store(a_out, a_value.to(a_ptr.dtype.element_ty), inside)
        if HAS_PEAKS:
            tl.atomic_max(peaks_ptr + 1, tl.max(tl.abs(a_value)))


def mm_wide(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b, in float32 if a and b are 16-bit tensors on CUDA, else in their dtype."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b)


def pack(group: LoraGroup, sb_NP: Tensor, a_PK: Tensor, peaks: Tensor | None = None) -> None:
    """Write blockdiag(s B) and the bias into sb [N, P] and A into a [P, K]; the rest is zeros.

    Args:
        group: The linears.
        sb_NP: Where s B is written.
        a_PK: Where A is written.
        peaks: Two zeros in float32, which become max |s B| and max |A|; None: not computed.
    """
    if not use_kernel(sb_NP):
        pack_reference(group, sb_NP, a_PK, peaks)
        return
    absent = LoraLinear(weight=sb_NP, num_out=0, num_in=group.num_in)
    linears = group.linears + (absent,) * (MAX_LINEARS - len(group.linears))

    def pointer(tensor: Tensor | None) -> Tensor:
        return sb_NP if tensor is None else tensor.detach().contiguous()

    num_row_blocks = triton.cdiv(group.num_out, _PACK_BLOCK)
    _pack_kernel[(num_row_blocks + triton.cdiv(group.num_in, _PACK_BLOCK),)](
        sb_NP,
        a_PK,
        *(pointer(x.lora_a) for x in linears),
        *(pointer(x.lora_b) for x in linears),
        *(pointer(x.bias) for x in linears),
        *(x.num_out for x in linears),
        *(float(x.scaling) for x in linears),
        group.num_in,
        sb_NP.stride(0),
        a_PK.stride(0),
        num_row_blocks,
        sb_NP if peaks is None else peaks,
        peaks is not None,
        *(x.rank for x in linears),
        *(x.bias is not None for x in linears),
        P=group.num_columns,
        BLOCK=_PACK_BLOCK,
    )


def pack_reference(
    group: LoraGroup, sb_NP: Tensor, a_PK: Tensor, peaks: Tensor | None = None
) -> None:
    """Compute `pack` in plain torch; same arguments."""
    sb_NP.zero_()
    a_PK.zero_()
    row = column = 0
    for linear in group.linears:
        rows = slice(row, row + linear.num_out)
        if linear.adapter is not None:
            lora_a, lora_b = linear.adapter
            columns = slice(column, column + linear.rank)
            sb_NP[rows, columns] = (lora_b * linear.scaling).to(sb_NP.dtype)
            a_PK[columns] = lora_a.to(a_PK.dtype)
        if linear.bias is not None:
            sb_NP[rows, group.rank] = linear.bias
        row += linear.num_out
        column += linear.rank
    if peaks is not None:
        peaks.copy_(torch.stack([sb_NP.abs().max(), a_PK.abs().max()]))


def group_reference(x_TK: Tensor, group: LoraGroup, weights: Sequence[Tensor]) -> Tensor:
    """Return X W^T + b + s (X A^T) B^T [T, N], computed one linear at a time."""
    outputs = []
    for linear, weight in zip(group.linears, weights, strict=True):
        y = torch.nn.functional.linear(x_TK, weight, linear.bias)
        if linear.adapter is not None:
            lora_a, lora_b = linear.adapter
            y = y + linear.scaling * (x_TK @ lora_a.t()) @ lora_b.t()
        outputs.append(y)
    return torch.cat(outputs, dim=1)
