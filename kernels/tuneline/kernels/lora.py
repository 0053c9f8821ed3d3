"""LoRA folded into the base GEMM by widening it along K.

A *group* is the linears that share one input: q, k, v; o; gate, up; down. With stacked outputs N,
input width K and the adapters' ranks side by side (R, padded with zeros to P, a power of two
from 64 on):

    X' = [X | X A^T]            [T, K + P]
    W' = [W | blockdiag(s B)]   [N, K + P]
    Y  = X' W'^T                                one GEMM, one rounding
    [dX0 | G] = dY W'           [T, K + P]      then dX = dX0 + G A
    dX = [dY | G] [W ; A]                       when N <= K: the sum happens inside the GEMM
    dA = G^T X                  [P, K]
    dB = s dY^T (X A^T)         [N, P]          of which the diagonal blocks are the gradients

A bias takes one of the padded columns: ones in X', the bias in W', zeros in A, so that neither dX
nor an adapter's gradient sees it.

W' and A live in one *arena* [N + P, K + P], written once per pass and shared by forward and
backward. P is at least 64 because cuBLAS loses 2 to 19 % at K + 16 and K + 48 (H100), and a power
of two because one Triton block spans it.

Shapes: T tokens, K inputs, N outputs of the group, P padded columns, r rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from tuneline.kernels.copy_rows import copy_rows
from tuneline.kernels.nf4 import NF4Weight, dequantize_nf4

MIN_COLUMNS = 64
MAX_LINEARS = 3


@dataclass(frozen=True, slots=True)
class LoraLinear:
    """One frozen linear [N, K] and its adapter; `lora_a` [r, K] and `lora_b` [N, r] go together."""

    weight: Tensor | NF4Weight
    num_out: int
    num_in: int
    bias: Tensor | None = None
    lora_a: Tensor | None = None
    lora_b: Tensor | None = None
    scaling: float = 1.0

    @property
    def rank(self) -> int:
        """Rows of `lora_a`, zero without an adapter."""
        return 0 if self.lora_a is None else self.lora_a.shape[0]


@dataclass(frozen=True, slots=True)
class LoraGroup:
    """The linears that share one input, outputs stacked in this order."""

    linears: tuple[LoraLinear, ...]

    def __post_init__(self) -> None:
        """Refuse what the packing kernel has no arguments for."""
        assert 1 <= len(self.linears) <= MAX_LINEARS
        assert len({linear.num_in for linear in self.linears}) == 1

    @property
    def num_in(self) -> int:
        """K."""
        return self.linears[0].num_in

    @property
    def num_out(self) -> int:
        """N."""
        return sum(linear.num_out for linear in self.linears)

    @property
    def rank(self) -> int:
        """R: the ranks side by side."""
        return sum(linear.rank for linear in self.linears)

    @property
    def has_bias(self) -> bool:
        """Whether a column is spent on a bias."""
        return any(linear.bias is not None for linear in self.linears)

    @property
    def num_columns(self) -> int:
        """P: ranks and bias, padded; zero when there is neither."""
        used = self.rank + self.has_bias
        return max(MIN_COLUMNS, triton.next_power_of_2(used)) if used else 0

    def parameters(self) -> list[Tensor]:
        """Trainable tensors in the order in which `lora_gradients` returns their gradients."""
        return [t for x in self.linears if x.lora_a is not None for t in (x.lora_a, x.lora_b)]


def build_arena(group: LoraGroup, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Write [W | sB ; A | 0] as one fresh tensor [N + P, K + P]."""
    num_out, num_in, num_columns = group.num_out, group.num_in, group.num_columns
    arena = torch.empty(num_out + num_columns, num_in + num_columns, dtype=dtype, device=device)
    row = 0
    for linear in group.linears:
        out = arena[row : row + linear.num_out, :num_in]
        if isinstance(linear.weight, NF4Weight):
            dequantize_nf4(linear.weight, out=out)
        else:
            out.copy_(linear.weight)
        row += linear.num_out
    if num_columns:
        pack = _pack_triton if arena.is_cuda else pack_reference
        pack(group, arena)
    return arena


def augmented_input(num_tokens: int, group: LoraGroup, like: Tensor) -> Tensor:
    """Allocate X' [T, K + P] for the producer of X to write its first K columns into."""
    return like.new_empty(num_tokens, group.num_in + group.num_columns)


def write_lora_columns(x_TKP: Tensor, arena: Tensor, group: LoraGroup) -> None:
    """Fill the last P columns of X' with X A^T, and ones for the bias."""
    num_out, num_in = group.num_out, group.num_in
    if group.num_columns == 0:
        return
    if group.rank:
        torch.mm(x_TKP[:, :num_in], arena[num_out:, :num_in].t(), out=x_TKP[:, num_in:])
    else:
        x_TKP[:, num_in:].zero_()
    if group.has_bias:
        x_TKP[:, num_in + group.rank] = 1


def group_forward(
    x_TKP: Tensor, arena: Tensor, group: LoraGroup, *, out: Tensor | None = None
) -> Tensor:
    """Return Y = X' W'^T, [T, N]."""
    return torch.mm(x_TKP, arena[: group.num_out].t(), out=out)


def group_input_gradient(
    dy_TN: Tensor, arena: Tensor, group: LoraGroup
) -> tuple[Tensor, Tensor | None]:
    """Return dX [T, K] and G = dY (sB) [T, P] (None where no adapter sits in the group)."""
    num_out, num_in = group.num_out, group.num_in
    if group.rank == 0:
        return torch.mm(dy_TN, arena[:num_out, :num_in]), None
    if num_out <= num_in:
        dyg = dy_TN.new_empty(dy_TN.shape[0], num_out + group.num_columns)
        copy_rows(dy_TN, dyg[:, :num_out])
        g_TP = dyg[:, num_out:]
        torch.mm(dy_TN, arena[:num_out, num_in:], out=g_TP)
        return torch.mm(dyg, arena[:, :num_in]), g_TP
    dxg = torch.mm(dy_TN, arena[:num_out])
    dx_TK, g_TP = dxg[:, :num_in], dxg[:, num_in:]
    dx_TK.addmm_(g_TP, arena[num_out:, :num_in])
    return dx_TK, g_TP


@dataclass(slots=True)
class LoraGradients:
    """Sums a group's dA [P, K] and s-less dB [N, P] over chunks of tokens, in fp32 or wider."""

    group: LoraGroup
    da_PK: Tensor | None = None
    db_NP: Tensor | None = None

    def add(self, dy_TN: Tensor, g_TP: Tensor | None, x_TK: Tensor, xa_TP: Tensor) -> None:
        """Add one chunk's G^T X and dY^T (X A^T)."""
        if g_TP is None:
            return
        da_PK, db_NP = _mm_wide(g_TP.t(), x_TK), _mm_wide(dy_TN.t(), xa_TP)
        self.da_PK = da_PK if self.da_PK is None else self.da_PK.add_(da_PK)
        self.db_NP = db_NP if self.db_NP is None else self.db_NP.add_(db_NP)

    def split(self) -> list[Tensor]:
        """Return [dA, dB] of every adapter, in the parameter's dtype."""
        grads: list[Tensor] = []
        row = column = 0
        for linear in self.group.linears:
            rank = linear.rank
            if rank:
                da_rK = self.da_PK[column : column + rank]
                db_Nr = self.db_NP[row : row + linear.num_out, column : column + rank]
                grads += [da_rK.to(linear.lora_a.dtype)]
                grads += [(db_Nr * linear.scaling).to(linear.lora_b.dtype)]
            row += linear.num_out
            column += rank
        return grads


def group_reference(x_TK: Tensor, group: LoraGroup, weights: Sequence[Tensor]) -> Tensor:
    """What the group means, one linear at a time: X W^T + b + s (X A^T) B^T, [T, N]."""
    outputs = []
    for linear, weight in zip(group.linears, weights, strict=True):
        y = torch.nn.functional.linear(x_TK, weight, linear.bias)
        if linear.lora_a is not None:
            y = y + linear.scaling * (x_TK @ linear.lora_a.t()) @ linear.lora_b.t()
        outputs.append(y)
    return torch.cat(outputs, dim=1)


def pack_reference(group: LoraGroup, arena: Tensor) -> None:
    """Write the adapters and biases into the last P rows and columns of the arena."""
    num_out, num_in = group.num_out, group.num_in
    arena[num_out:] = 0
    arena[:, num_in:] = 0
    row = column = 0
    for linear in group.linears:
        rows = slice(row, row + linear.num_out)
        if linear.lora_a is not None:
            arena[rows, num_in + column : num_in + column + linear.rank] = (
                linear.lora_b * linear.scaling
            )
            arena[num_out + column : num_out + column + linear.rank, :num_in] = linear.lora_a
        if linear.bias is not None:
            arena[rows, num_in + group.rank] = linear.bias
        row += linear.num_out
        column += linear.rank


def _mm_wide(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b without rounding the sum to 16 bits where the GEMM can avoid it."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b)


@triton.jit
def _pack_kernel(
    arena_ptr,
    a0_ptr,
    a1_ptr,
    a2_ptr,
    b0_ptr,
    b1_ptr,
    b2_ptr,
    bias0_ptr,
    bias1_ptr,
    bias2_ptr,
    n0,
    n1,
    n2,
    s0,
    s1,
    s2,
    num_in,
    stride,
    num_row_blocks,
    R0: tl.constexpr,
    R1: tl.constexpr,
    R2: tl.constexpr,
    HAS_BIAS0: tl.constexpr,
    HAS_BIAS1: tl.constexpr,
    HAS_BIAS2: tl.constexpr,
    P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program writes either BLOCK rows of the sB columns or BLOCK columns of the A rows."""
    pid = tl.program_id(0)
    p = tl.arange(0, P)
    block = tl.arange(0, BLOCK)
    num_out = n0 + n1 + n2
    if pid < num_row_blocks:
        row = pid * BLOCK + block
        value = tl.zeros([BLOCK, P], dtype=tl.float32)
        # Pointers of absent linears are never dereferenced: their rank is 0 at compile time.
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
        out = arena_ptr + row[:, None].to(tl.int64) * stride + num_in + p[None, :]
        tl.store(out, value.to(arena_ptr.dtype.element_ty), (row < num_out)[:, None])
    else:
        # Triton 3.6 wants a name that both branches bind to have one type: other names here.
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
        a_out = arena_ptr + (num_out + p)[:, None].to(tl.int64) * stride + column[None, :]
        tl.store(a_out, a_value.to(arena_ptr.dtype.element_ty), (column < num_in + P)[None, :])


def _pack_triton(group: LoraGroup, arena: Tensor) -> None:
    """Launch `_pack_kernel`: the same writes as `pack_reference` in one launch."""
    num_out, num_in, num_columns = group.num_out, group.num_in, group.num_columns
    absent = LoraLinear(weight=arena, num_out=0, num_in=num_in)
    linears = group.linears + (absent,) * (MAX_LINEARS - len(group.linears))

    def pointer(tensor: Tensor | None) -> Tensor:
        return arena if tensor is None else tensor.detach().contiguous()

    block = 64
    num_row_blocks = triton.cdiv(num_out, block)
    grid = (num_row_blocks + triton.cdiv(num_in + num_columns, block),)
    _pack_kernel[grid](
        arena,
        *(pointer(x.lora_a) for x in linears),
        *(pointer(x.lora_b) for x in linears),
        *(pointer(x.bias) for x in linears),
        *(x.num_out for x in linears),
        *(float(x.scaling) for x in linears),
        num_in,
        arena.stride(0),
        num_row_blocks,
        *(x.rank for x in linears),
        *(x.bias is not None for x in linears),
        P=num_columns,
        BLOCK=block,
    )
