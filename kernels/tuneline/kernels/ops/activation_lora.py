"""The backward of the gated activation, fused with the LoRA gradients that need h, de and dg.

    h, de, dg                            computed from dh, e, g as in gated_activation.py
    dA_down = G^T h             [r, F]   G = dY (s B_down)
    dB_gate = de^T (X A_gate^T) [F, r]   without the adapter's scale, which `LoraGradients` applies
    dB_up   = dg^T (X A_up^T)   [F, r]

Separate ops would write h to memory, read h again and read d_gate_up again; the fused kernel does
not, which avoids 2 of 7 passes over [T, F]. A program of the kernel loops over _ROWS tokens of a
strip of columns and accumulates the three sums in registers. It stores its partial sums, and a
second launch adds the partial sums of all programs. There are no atomics, so the same inputs give
the same bits.

Shapes: T tokens, F intermediate size, r rank; dh [T, F]; gate_up [T, 2 F], the gate e first; G and
X A^T [T, P], one column per rank of each adapter.
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
from tuneline.kernels.ops.gated_activation import (
    Kind,
    _gate,
    _is_gelu,
    gated_activation_backward,
)
from tuneline.kernels.ops.lora import LoraGroup, mm_wide

MAX_RANK = 64
"""Largest rank that the fused kernel supports, because its three float32 sums [columns, rank] must
fit in registers."""

_ROWS = 1024
_BLOCK_ROWS = 16
_BLOCK_COLS = 64
_NUM_WARPS = 4
_NUM_STAGES = 3


@triton.jit
def _bwd_kernel(
    dh_ptr, e_ptr, g_ptr, de_ptr, dg_ptr, down_ptr, gate_ptr, up_ptr, partial_ptr,
    dh_stride, e_stride, g_stride, de_stride, dg_stride, down_stride, gate_stride, up_stride, T,
    F: tl.constexpr, R_DOWN: tl.constexpr, R_GATE: tl.constexpr, R_UP: tl.constexpr,
    RANKS: tl.constexpr, GELU: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    col = tl.program_id(0) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    rank = tl.arange(0, RANKS)
    in_strip = col < F
    da = tl.zeros([BLOCK_COLS, RANKS], dtype=tl.float32)
    db_gate = tl.zeros([BLOCK_COLS, RANKS], dtype=tl.float32)
    db_up = tl.zeros([BLOCK_COLS, RANKS], dtype=tl.float32)
    for i in range(ROWS // BLOCK_ROWS):
        row = tl.program_id(1) * ROWS + i * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        inside = row < T
        mask = inside[:, None] & in_strip[None, :]
        row = row.to(tl.int64)
        dh = tl.load(dh_ptr + row[:, None] * dh_stride + col[None, :], mask, 0.0).to(tl.float32)
        e = tl.load(e_ptr + row[:, None] * e_stride + col[None, :], mask, 0.0).to(tl.float32)
        g = tl.load(g_ptr + row[:, None] * g_stride + col[None, :], mask, 0.0).to(tl.float32)
        sig, bend = _gate(e, GELU)
        act = e * sig
        # The sums use the rounded values that are stored, as a separate GEMM would.
        h = (act * g).to(dh_ptr.dtype.element_ty)
        de = (dh * g * sig * (1.0 + bend)).to(dh_ptr.dtype.element_ty)
        dg = (dh * act).to(dh_ptr.dtype.element_ty)
        tl.store(de_ptr + row[:, None] * de_stride + col[None, :], de, mask)
        tl.store(dg_ptr + row[:, None] * dg_stride + col[None, :], dg, mask)
        if R_DOWN > 0:
            with_rank = inside[:, None] & (rank < R_DOWN)[None, :]
            side = tl.load(down_ptr + row[:, None] * down_stride + rank[None, :], with_rank, 0.0)
            da = tl.dot(tl.trans(h), side, da, input_precision="ieee")
        if R_GATE > 0:
            with_rank = inside[:, None] & (rank < R_GATE)[None, :]
            side = tl.load(gate_ptr + row[:, None] * gate_stride + rank[None, :], with_rank, 0.0)
            db_gate = tl.dot(tl.trans(de), side, db_gate, input_precision="ieee")
        if R_UP > 0:
            with_rank = inside[:, None] & (rank < R_UP)[None, :]
            side = tl.load(up_ptr + row[:, None] * up_stride + rank[None, :], with_rank, 0.0)
            db_up = tl.dot(tl.trans(dg), side, db_up, input_precision="ieee")
    start = tl.program_id(1).to(tl.int64) * 3 * F
    out = partial_ptr + (start + col)[:, None] * RANKS + rank[None, :]
    tl.store(out, da, in_strip[:, None])
    tl.store(out + F * RANKS, db_gate, in_strip[:, None])
    tl.store(out + 2 * F * RANKS, db_up, in_strip[:, None])


@dataclass(frozen=True, slots=True)
class ActivationGradients:
    """d_gate_up [T, 2 F], dA_down [r, F], and dB [N, r] of each linear of gate_up.

    dA or dB is None if its group has no adapter.
    """

    d_gate_up: Tensor
    da_down: Tensor | None
    db_gate_up: list[Tensor] | None


def activation_lora_backward_reference(
    dh_TF: Tensor,
    gate_up_TF: Tensor,
    kind: Kind,
    *,
    down: LoraGroup,
    gate_up: LoraGroup,
    g_TP: Tensor | None,
    xa_TP: Tensor,
    inplace: bool = False,
) -> ActivationGradients:
    """Compute `activation_lora_backward` one op at a time; same arguments, but `down` is unused."""
    d_gate_up, h_TF = gated_activation_backward(
        dh_TF, gate_up_TF, kind, inplace=inplace, need_h=g_TP is not None
    )
    assert isinstance(d_gate_up, Tensor)
    da = None if g_TP is None or h_TF is None else mm_wide(g_TP.t(), h_TF)
    db = gate_up.blocks(mm_wide(d_gate_up.t(), xa_TP)) if gate_up.rank else None
    return ActivationGradients(d_gate_up, da, db)


def activation_lora_backward(
    dh_TF: Tensor,
    gate_up_TF: Tensor,
    kind: Kind,
    *,
    down: LoraGroup,
    gate_up: LoraGroup,
    g_TP: Tensor | None,
    xa_TP: Tensor,
    inplace: bool = False,
) -> ActivationGradients:
    """Return the gradient of gate and up, and the float32 gradients of down's A and gate_up's B.

    Args:
        dh_TF: Gradient of h, the input of down_proj.
        gate_up_TF: Gate and up [T, 2 F] of the forward.
        kind: The activation.
        down: The group that reads h.
        gate_up: The group that computes gate_up: one linear, or two of F outputs each.
        g_TP: G of `down`; None if `down` has no adapter.
        xa_TP: X A^T of `gate_up`.
        inplace: Overwrite gate_up_TF with its gradient.
    """
    T, F = dh_TF.shape
    ranks = [linear.rank for linear in gate_up.linears]
    widest = max(*ranks, down.rank)
    if widest == 0 or widest > MAX_RANK or not use_kernel(dh_TF):
        return activation_lora_backward_reference(
            dh_TF, gate_up_TF, kind, down=down, gate_up=gate_up, g_TP=g_TP, xa_TP=xa_TP,
            inplace=inplace,
        )  # fmt: skip
    d_gate_up = gate_up_TF if inplace else torch.empty_like(gate_up_TF)
    e, g, de, dg = (x for pair in (gate_up_TF, d_gate_up) for x in pair.chunk(2, 1))
    # A model with one gate_up_proj has one adapter, whose columns serve both gate and up.
    gate_TP = xa_TP
    up_TP = xa_TP[:, ranks[0] :] if len(ranks) > 1 else xa_TP
    down_TP = dh_TF if g_TP is None else g_TP
    width = max(16, triton.next_power_of_2(widest))
    num_parts = triton.cdiv(T, _ROWS)
    partial = torch.empty(num_parts, 3, F, width, dtype=torch.float32, device=dh_TF.device)
    _bwd_kernel[(triton.cdiv(F, _BLOCK_COLS), num_parts)](
        dh_TF, e, g, de, dg, down_TP, gate_TP, up_TP, partial,
        dh_TF.stride(0), e.stride(0), g.stride(0), de.stride(0), dg.stride(0),
        down_TP.stride(0), gate_TP.stride(0), up_TP.stride(0), T,
        F=F, R_DOWN=0 if g_TP is None else down.rank, R_GATE=ranks[0], R_UP=ranks[-1],
        RANKS=width, GELU=_is_gelu(kind), ROWS=_ROWS,
        BLOCK_ROWS=_BLOCK_ROWS, BLOCK_COLS=_BLOCK_COLS, num_warps=_NUM_WARPS,
        num_stages=_NUM_STAGES,
    )  # fmt: skip
    sums = partial[0] if num_parts == 1 else partial.sum(0)
    if len(ranks) == 1:
        db = [sums[1:].view(2 * F, width)[:, : ranks[0]]]
    else:
        db = [sums[1, :, : ranks[0]], sums[2, :, : ranks[1]]]
    return ActivationGradients(
        d_gate_up,
        None if g_TP is None else sums[0, :, : down.rank].t(),
        db if any(ranks) else None,
    )
