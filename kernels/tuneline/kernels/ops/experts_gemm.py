"""Grouped products over rows that are sorted by expert: large ones, and LoRA's skinny ones.

    grouped_mm      out[s] = x[s] M_e + p[s] q_e + bias_e     x [S, I], M_e [I, O], q_e [R, O]
    project         p[s]   = x[s] A_e^T                       A_e [R, I]; can also gather x
    outer           d[e]   = sum over e's rows of (c p)[s]^T x[s]       [R, C]

e is the expert of row s. M_e is read from the arena in either layout, [O, I] or [I, O], so one
arena serves the forward and the input gradient. p q_e is the adapter's part: it is added to the
accumulator before the result is rounded, so base and adapter take one product and one rounding.
c is an optional weight per row.

Rows of experts [first, last) are computed by one call; a layer whose arena does not fit runs in
chunks of experts. Rows whose expert is dropped are never written.

Shapes: S rows, E experts, I inputs, O outputs, R padded rank, C columns.
"""

# Triton's types declare neither a launch's options nor plain values for constexpr parameters.
# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from tuneline.kernels.ops._dispatch import use_kernel
from tuneline.kernels.ops.experts_route import Routing

_GROUP_TILES = 16
"""Tiles of rows that run side by side over the same columns of an expert's weight; more rows than
these read the weight from memory again."""

_OUTER_ROWS = 64
_OUTER_COLS = 128
_PROJECT_COLS = 64


@triton.jit
def _mm_kernel(
    x_desc, w_desc, out_ptr, p_ptr, q_ptr, bias_ptr, starts_ptr, tile_starts_ptr,
    expert_of_tile_ptr, first, last, num_programs, q_stride_e, q_stride_r, q_stride_o,
    INS: tl.constexpr, OUTS: tl.constexpr, R: tl.constexpr, STORED_OI: tl.constexpr,
    HAS_BIAS: tl.constexpr, GROUP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    columns: tl.constexpr = (OUTS + BN - 1) // BN
    tile_first = tl.load(tile_starts_ptr + first)
    num_work = (tl.load(tile_starts_ptr + last) - tile_first) * columns
    for work in tl.range(tl.program_id(0), num_work, num_programs, flatten=True):
        expert = tl.load(expert_of_tile_ptr + tile_first + work // columns)
        expert_tile = tl.load(tile_starts_ptr + expert)
        num_tiles = tl.load(tile_starts_ptr + expert + 1) - expert_tile
        # Within an expert, GROUP tiles of rows take turns at each column tile.
        local = work - (expert_tile - tile_first) * columns
        group = local // (GROUP * columns)
        in_group = tl.minimum(num_tiles - group * GROUP, GROUP)
        rest = local - group * GROUP * columns
        row = tl.load(starts_ptr + expert) + (group * GROUP + rest % in_group) * BM
        end = tl.load(starts_ptr + expert + 1)
        col = (rest // in_group) * BN
        acc = tl.zeros([BM, BN], dtype=tl.float32)
        for k in range(0, INS, BK):
            # Rows beyond the expert's end and columns beyond OUTS hold other numbers, which only
            # reach elements that are not stored.
            x = x_desc.load([row, k])
            if STORED_OI:
                w = w_desc.load([(expert - first) * OUTS + col, k]).T
            else:
                w = w_desc.load([(expert - first) * INS + k, col])
            acc = tl.dot(x, w, acc, input_precision="ieee")
        rows = row + tl.arange(0, BM)
        cols = col + tl.arange(0, BN)
        valid_row = rows < end
        valid_col = cols < OUTS
        if R > 0:
            rank = tl.arange(0, R)
            p = tl.load(p_ptr + rows[:, None] * R + rank[None, :], valid_row[:, None], 0.0)
            q_ptrs = q_ptr + expert.to(tl.int64) * q_stride_e
            q_ptrs += rank[:, None] * q_stride_r + cols[None, :] * q_stride_o
            q = tl.load(q_ptrs, valid_col[None, :], 0.0)
            acc = tl.dot(p, q, acc, input_precision="ieee")
        if HAS_BIAS:
            bias = tl.load(bias_ptr + expert * OUTS + cols, valid_col, 0.0).to(tl.float32)
            acc += bias[None, :]
        out = out_ptr + rows.to(tl.int64)[:, None] * OUTS + cols[None, :]
        mask = valid_row[:, None] & valid_col[None, :]
        tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _project_kernel(
    x_ptr, a_ptr, p_ptr, copy_ptr, slot_of_row_ptr, starts_ptr, tile_starts_ptr,
    expert_of_tile_ptr, E, x_stride, a_stride_e, a_stride_r, a_stride_i, top_k,
    INS: tl.constexpr, R: tl.constexpr, GATHER: tl.constexpr, COPY: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    if tile < tl.load(tile_starts_ptr + E):
        expert = tl.load(expert_of_tile_ptr + tile)
        row = tl.load(starts_ptr + expert) + (tile - tl.load(tile_starts_ptr + expert)) * BM
        rows = row + tl.arange(0, BM)
        valid = rows < tl.load(starts_ptr + expert + 1)
        source = rows
        if GATHER:
            source = tl.load(slot_of_row_ptr + rows, valid, 0) // top_k
        source = source.to(tl.int64)
        k = tl.arange(0, BK)
        if R > 0:
            rank = tl.arange(0, R)
            acc = tl.zeros([BM, R], dtype=tl.float32)
        for i in range(0, INS, BK):
            inside = (i + k) < INS
            mask = valid[:, None] & inside[None, :]
            x = tl.load(x_ptr + source[:, None] * x_stride + (i + k)[None, :], mask, 0.0)
            if COPY:
                copy = copy_ptr + rows.to(tl.int64)[:, None] * INS + (i + k)[None, :]
                tl.store(copy, x, mask)
            if R > 0:
                a_ptrs = a_ptr + expert.to(tl.int64) * a_stride_e
                a_ptrs += (i + k)[:, None] * a_stride_i + rank[None, :] * a_stride_r
                a = tl.load(a_ptrs, inside[:, None], 0.0)
                acc = tl.dot(x, a, acc, input_precision="ieee")
        if R > 0:
            p = p_ptr + rows[:, None] * R + rank[None, :]
            tl.store(p, acc.to(p_ptr.dtype.element_ty), valid[:, None])


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


@functools.cache
def _num_programs(device: torch.device) -> int:
    """Return the number of multiprocessors, each of which runs one program of `_mm_kernel`."""
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


def _blocks(size: int) -> int:
    """Return the step along K: a divisor of `size`, as a tile must not read the next expert."""
    for block in (64, 32, 16):
        if size % block == 0:
            return block
    raise ValueError(f"{size} inputs: grouped products need a multiple of 16")


def _shape(block_m: int, outs: int) -> tuple[int, int, int]:
    """Return the columns of a tile, the warps and the stages of `_mm_kernel`."""
    block_n = min(256 if block_m >= 128 else 128, max(16, triton.next_power_of_2(outs)))
    return block_n, 8 if block_m * block_n >= 128 * 128 else 4, 3


def _by_expert(routing: Routing, first: int, last: int) -> list[tuple[int, slice]]:
    """Return the rows of each expert, for the references."""
    starts = routing.starts.tolist()
    return [(e, slice(starts[e], starts[e + 1])) for e in range(first, last)]


def gather_reference(x: Tensor, routing: Routing) -> Tensor:
    """Return the rows of x [T, I] that the routing sorts."""
    return x[(routing.slot_of_row // routing.top_k).long()]


def grouped_mm(
    x_SI: Tensor,
    arena: Tensor,
    routing: Routing,
    *,
    stored_oi: bool,
    out: Tensor,
    first: int = 0,
    last: int | None = None,
    p_SR: Tensor | None = None,
    q_ERO: Tensor | None = None,
    bias_EO: Tensor | None = None,
) -> Tensor:
    """Write x M_e + p q_e + bias_e to the rows of the experts [first, last).

    Args:
        x_SI: Sorted rows, contiguous.
        arena: M of those experts: [last - first, O, I] if `stored_oi`, else [last - first, I, O].
        routing: The rows.
        stored_oi: The layout of the arena.
        out: [S, O], contiguous.
        first: First expert of the arena.
        last: Expert after the last; all if None.
        p_SR: The adapter's projection of x, contiguous.
        q_ERO: The adapter's other matrix for all E experts, as a view of any strides.
        bias_EO: Bias of all E experts.
    """
    last = routing.num_experts if last is None else last
    ins, outs = x_SI.shape[1], out.shape[1]
    if not use_kernel(x_SI):
        for e, rows in _by_expert(routing, first, last):
            weight = arena[e - first]
            y = x_SI[rows] @ (weight.t() if stored_oi else weight)
            if p_SR is not None and q_ERO is not None:
                y = y + p_SR[rows] @ q_ERO[e]
            out[rows] = y if bias_EO is None else y + bias_EO[e]
        return out
    block_m, block_k = routing.block, _blocks(ins)
    block_n, num_warps, num_stages = _shape(block_m, outs)
    rank = 0 if p_SR is None else p_SR.shape[1]
    q = x_SI.view(1, *x_SI.shape) if q_ERO is None else q_ERO
    weight = arena.view(-1, arena.shape[-1])
    weight_block = [block_n, block_k] if stored_oi else [block_k, block_n]
    num_programs = _num_programs(x_SI.device)
    _mm_kernel[(num_programs,)](
        TensorDescriptor.from_tensor(x_SI, [block_m, block_k]),
        TensorDescriptor.from_tensor(weight, weight_block),
        out, x_SI if p_SR is None else p_SR, q, x_SI if bias_EO is None else bias_EO,
        routing.starts, routing.tile_starts, routing.expert_of_tile, first, last, num_programs,
        q.stride(0), q.stride(1), q.stride(2),
        INS=ins, OUTS=outs, R=rank, STORED_OI=stored_oi, HAS_BIAS=bias_EO is not None,
        GROUP=_GROUP_TILES, BM=block_m, BN=block_n, BK=block_k,
        num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    return out


def project(
    x: Tensor,
    a_ERI: Tensor | None,
    routing: Routing,
    *,
    gather: bool = False,
    copy_SI: Tensor | None = None,
) -> Tensor | None:
    """Return x A_e^T [S, R] of every row, and copy the gathered rows if asked.

    Args:
        x: Sorted rows [S, I], or with `gather` the tokens' rows [T, I]; unit stride along I.
        a_ERI: The adapter's matrix of all experts, as a view of any strides; None to copy only.
        routing: The rows.
        gather: Whether x is per token.
        copy_SI: Where the rows of x are written, sorted.
    """
    if not use_kernel(x):
        rows_SI = gather_reference(x, routing) if gather else x
        if copy_SI is not None:
            copy_SI.copy_(rows_SI)
        if a_ERI is None:
            return None
        p_SR = x.new_zeros(routing.num_rows, a_ERI.shape[1])
        for e, rows in _by_expert(routing, 0, routing.num_experts):
            p_SR[rows] = rows_SI[rows] @ a_ERI[e].t()
        return p_SR
    rank = 0 if a_ERI is None else a_ERI.shape[1]
    a = x.view(1, *x.shape) if a_ERI is None else a_ERI
    p_SR = x.new_empty(routing.num_rows, rank) if rank else None
    _project_kernel[(routing.max_tiles,)](
        x, a, x if p_SR is None else p_SR, x if copy_SI is None else copy_SI,
        routing.slot_of_row, routing.starts, routing.tile_starts, routing.expert_of_tile,
        routing.num_experts, x.stride(0), a.stride(0), a.stride(1), a.stride(2), routing.top_k,
        INS=x.shape[1], R=rank, GATHER=gather, COPY=copy_SI is not None,
        BM=routing.block, BK=_PROJECT_COLS, num_warps=4, num_stages=3,
    )  # fmt: skip
    return p_SR


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
        p_SR: Sorted rows of R padded columns.
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
        rows_SC = gather_reference(x, routing) if gather else x
        p_SR = p_SR[:, :rank]
        if weights_Tk is not None:
            p_SR = p_SR * weights_Tk.reshape(-1)[routing.slot_of_row.long(), None].to(p_SR.dtype)
        for e, rows in _by_expert(routing, 0, E):
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
