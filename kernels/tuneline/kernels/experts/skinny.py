"""LoRA's skinny products over rows that are sorted by expert.

    project         p[s] = x[s] A_e^T                                   A_e [R, I]
    outer           d[e] = sum over e's rows of (c p)[s]^T x[s]         [R, C]

e is the expert of row s. Both can read x by token instead of by row; `project` then also writes the
sorted rows, which the grouped product (gemm.py) reads. c is an optional weight per row.

Shapes: S rows, E experts, I inputs, R padded rank, C columns.
"""

# Triton's types declare neither a launch's options nor plain values for constexpr parameters.
# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tuneline.kernels.experts.route import Routing
from tuneline.kernels.ops._dispatch import use_kernel

_OUTER_ROWS = 64
_OUTER_COLS = 128
_PROJECT_COLS = 64


@triton.jit
def _project_kernel(
    x_ptr, a_ptr, p_ptr, room_ptr, copy_ptr, slot_of_row_ptr, starts_ptr, tile_starts_ptr,
    expert_of_tile_ptr, first, last, x_stride, a_stride_e, a_stride_r, a_stride_i, room_stride,
    copy_stride, top_k,
    INS: tl.constexpr, R: tl.constexpr, GATHER: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0) + tl.load(tile_starts_ptr + first)
    if tile < tl.load(tile_starts_ptr + last):
        expert = tl.load(expert_of_tile_ptr + tile)
        row = tl.load(starts_ptr + expert) + (tile - tl.load(tile_starts_ptr + expert)) * BM
        rows = row + tl.arange(0, BM)
        valid = rows < tl.load(starts_ptr + expert + 1)
        source = rows
        if GATHER:
            source = tl.load(slot_of_row_ptr + rows, valid, 0) // top_k
        source = source.to(tl.int64)
        rows = rows.to(tl.int64)
        k = tl.arange(0, BK)
        if R > 0:
            rank = tl.arange(0, R)
            acc = tl.zeros([BM, R], dtype=tl.float32)
        for i in range(0, INS, BK):
            inside = (i + k) < INS
            mask = valid[:, None] & inside[None, :]
            x = tl.load(x_ptr + source[:, None] * x_stride + (i + k)[None, :], mask, 0.0)
            if GATHER:
                tl.store(copy_ptr + rows[:, None] * copy_stride + (i + k)[None, :], x, mask)
            if R > 0:
                a_ptrs = a_ptr + (expert - first).to(tl.int64) * a_stride_e
                a_ptrs += (i + k)[:, None] * a_stride_i + rank[None, :] * a_stride_r
                a = tl.load(a_ptrs, inside[:, None], 0.0)
                acc = tl.dot(x, a, acc, input_precision="ieee")
        if R > 0:
            p = acc.to(p_ptr.dtype.element_ty)
            tl.store(p_ptr + rows[:, None] * R + rank[None, :], p, valid[:, None])
            tl.store(room_ptr + rows[:, None] * room_stride + rank[None, :], p, valid[:, None])


@triton.jit
def _outer_kernel(
    p_ptr, x_ptr, weights_ptr, out_ptr, slot_of_row_ptr, starts_ptr, x_stride, scale,
    out_stride_e, out_stride_r, out_stride_c, top_k,
    C: tl.constexpr, R: tl.constexpr, RANK: tl.constexpr, GATHER: tl.constexpr,
    WEIGHTED: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    columns: tl.constexpr = (C + BC - 1) // BC
    expert = tl.program_id(0) // columns
    col = (tl.program_id(0) % columns) * BC + tl.arange(0, BC)
    in_strip = col < C
    rank = tl.arange(0, R)
    end = tl.load(starts_ptr + expert + 1)
    acc = tl.zeros([BC, R], dtype=tl.float32)
    for row in range(tl.load(starts_ptr + expert), end, BK):
        rows = row + tl.arange(0, BK)
        valid = rows < end
        source = rows
        if GATHER or WEIGHTED:
            slot = tl.load(slot_of_row_ptr + rows, valid, 0)
            if GATHER:
                source = slot // top_k
        x_ptrs = x_ptr + source.to(tl.int64)[:, None] * x_stride + col[None, :]
        x = tl.load(x_ptrs, valid[:, None] & in_strip[None, :], 0.0)
        p = tl.load(p_ptr + rows[:, None] * R + rank[None, :], valid[:, None], 0.0)
        if WEIGHTED:
            w = tl.load(weights_ptr + slot, valid, 0.0).to(tl.float32)
            p = (p.to(tl.float32) * w[:, None]).to(p_ptr.dtype.element_ty)
        acc = tl.dot(tl.trans(x), p, acc, input_precision="ieee")
    out = out_ptr + expert.to(tl.int64) * out_stride_e
    out += rank[None, :] * out_stride_r + col[:, None] * out_stride_c
    tl.store(out, acc * scale, in_strip[:, None] & (rank < RANK)[None, :])


def project(
    x: Tensor,
    a_ERI: Tensor | None,
    routing: Routing,
    *,
    p_SR: Tensor | None = None,
    room_SR: Tensor | None = None,
    copy_SI: Tensor | None = None,
    first: int = 0,
    last: int | None = None,
) -> None:
    """Write x A_e^T of the rows of the experts [first, last), and gather their rows if asked.

    Args:
        x: Sorted rows [S, I], or with `copy_SI` the tokens' rows [T, I]; unit stride along I.
        a_ERI: The adapter's matrix of those experts, as a view of any strides; None to gather only.
        routing: The rows.
        p_SR: Where x A_e^T is written, contiguous; needed with `a_ERI`.
        room_SR: Where x A_e^T is written too, unit stride along R; needed with `a_ERI`.
        copy_SI: Where the tokens' rows are written, sorted; unit stride along I.
        first: First expert of a_ERI.
        last: Expert after the last; all if None.
    """
    last = routing.num_experts if last is None else last
    if not use_kernel(x):
        for e, rows in routing.spans(first, last):
            rows_nI = x[rows]
            if copy_SI is not None:
                rows_nI = x[(routing.slot_of_row[rows] // routing.top_k).long()]
                copy_SI[rows] = rows_nI
            if a_ERI is not None and p_SR is not None and room_SR is not None:
                p_SR[rows] = rows_nI.contiguous() @ a_ERI[e - first].t().contiguous()
                room_SR[rows] = p_SR[rows]
        return
    a = x.view(1, *x.shape) if a_ERI is None else a_ERI
    p = x if p_SR is None else p_SR
    room = x if room_SR is None else room_SR
    copy = x if copy_SI is None else copy_SI
    _project_kernel[(routing.max_tiles,)](
        x, a, p, room, copy, routing.slot_of_row, routing.starts, routing.tile_starts,
        routing.expert_of_tile, first, last, x.stride(0), a.stride(0), a.stride(1), a.stride(2),
        room.stride(0), copy.stride(0), routing.top_k,
        INS=x.shape[1], R=0 if a_ERI is None else a_ERI.shape[1], GATHER=copy_SI is not None,
        BM=routing.block, BK=_PROJECT_COLS, num_warps=4, num_stages=3,
    )  # fmt: skip


def outer(
    p_SR: Tensor,
    x: Tensor,
    routing: Routing,
    *,
    rank: int,
    scale: float = 1.0,
    gather: bool = False,
    weights_Tk: Tensor | None = None,
    transposed: bool = False,
) -> Tensor:
    """Return scale * sum over each expert's rows of (c p)^T x, in float32 or wider.

    Args:
        p_SR: Sorted rows of R padded columns, contiguous.
        x: Sorted rows [S, C], or with `gather` the tokens' rows [T, C]; unit stride along C.
        routing: The rows.
        rank: Columns of p that are not padding.
        scale: Multiplies the result.
        gather: Whether x is per token.
        weights_Tk: c, one weight per slot.
        transposed: Return [E, C, rank] instead of [E, rank, C].
    """
    E, C = routing.num_experts, x.shape[1]
    wide = torch.promote_types(x.dtype, torch.float32)
    shape = (E, C, rank) if transposed else (E, rank, C)
    if not use_kernel(x):
        out = torch.zeros(shape, dtype=wide, device=x.device)
        rows_SC = x[(routing.slot_of_row // routing.top_k).long()] if gather else x
        p_SR = p_SR[:, :rank]
        if weights_Tk is not None:
            p_SR = p_SR * weights_Tk.reshape(-1)[routing.slot_of_row.long(), None].to(p_SR.dtype)
        for e, rows in routing.spans(0, E):
            product = scale * (p_SR[rows].t().to(wide) @ rows_SC[rows].to(wide))
            out[e] = product.t() if transposed else product
        return out
    out = torch.empty(shape, dtype=wide, device=x.device)
    view = out.transpose(1, 2) if transposed else out
    _outer_kernel[(E * triton.cdiv(C, _OUTER_COLS),)](
        p_SR, x, p_SR if weights_Tk is None else weights_Tk.contiguous(), out,
        routing.slot_of_row, routing.starts, x.stride(0), scale,
        view.stride(0), view.stride(1), view.stride(2), routing.top_k,
        C=C, R=p_SR.shape[1], RANK=rank, GATHER=gather, WEIGHTED=weights_Tk is not None,
        BK=_OUTER_ROWS, BC=_OUTER_COLS, num_warps=4, num_stages=3,
    )  # fmt: skip
    return out
