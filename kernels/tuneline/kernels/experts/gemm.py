"""Grouped products over rows that are sorted by expert: large ones, and LoRA's skinny ones.

    grouped_mm      out[s] = x'[s] M'_e + bias_e        x' [S, I + R], M'_e [I + R, O]
    project         p[s]   = x[s] A_e^T                 A_e [R, I]; can also gather x
    outer           d[e]   = sum over e's rows of (c p)[s]^T x[s]       [R, C]

e is the expert of row s. M'_e is read from the arena (experts_arena.py) in either layout,
[O, I + R] or [I + R, O]. The last R columns of x' and of M' are the adapter's, as in lora.py: base
and adapter take one product and one rounding. c is an optional weight per row.

Rows of experts [first, last) are computed by one call; a layer whose arena does not fit runs in
chunks of experts. Rows whose expert is dropped are never written.

An adapter's part added after the loop over K, from operands of its own, cost 11 to 33 % of the
product (H100, Qwen3-30B-A3B): the loop's products then no longer run asynchronously. R more columns
in the loop cost one step of it.

Shapes: S rows, E experts, I inputs, O outputs, R padded rank, C columns.
"""

# Triton's types declare neither a launch's options nor plain values for constexpr parameters.
# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from tuneline.kernels.experts.route import Routing
from tuneline.kernels.ops._dispatch import use_kernel

_GROUP_TILES = 16
"""Tiles of rows that run side by side over the same columns of an expert's weight; more rows than
these read the weight from memory again."""

_STEP = 64
"""Columns of x and of the weight that a step of the loop over K reads."""

_EPILOGUE_BYTES = 33 * 1024
"""Shared memory in which `_mm_kernel` orders a tile for its stores."""

_OUTER_ROWS = 64
_OUTER_COLS = 128
_PROJECT_COLS = 64


@triton.jit
def _mm_kernel(
    x_desc, w_desc, out_ptr, bias_ptr, starts_ptr, tile_starts_ptr, expert_of_tile_ptr,
    first, last, num_programs, out_stride,
    INS: tl.constexpr, OUTS: tl.constexpr, STORED_OI: tl.constexpr, HAS_BIAS: tl.constexpr,
    GROUP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
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
            # Both descriptors give zeros beyond INS. Rows beyond the expert's end and columns
            # beyond OUTS hold other numbers, which only reach elements that are not stored.
            x = x_desc.load([row, k])
            if STORED_OI:
                w = w_desc.load([expert - first, col, k]).reshape(BN, BK).T
            else:
                w = w_desc.load([expert - first, k, col]).reshape(BK, BN)
            acc = tl.dot(x, w, acc, input_precision="ieee")
        rows = row + tl.arange(0, BM)
        cols = col + tl.arange(0, BN)
        if HAS_BIAS:
            bias = tl.load(bias_ptr + expert * OUTS + cols, cols < OUTS, 0.0).to(tl.float32)
            acc += bias[None, :]
        out = out_ptr + rows.to(tl.int64)[:, None] * out_stride + cols[None, :]
        mask = (rows < end)[:, None] & (cols < OUTS)[None, :]
        tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=mask)


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


@functools.cache
def _num_programs(device: torch.device) -> int:
    """Return the number of multiprocessors, each of which runs one program of `_mm_kernel`."""
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _shape(block_m: int, outs: int, itemsize: int, device: torch.device) -> tuple[int, int, int]:
    """Return the columns of a tile, the warps and the stages of `_mm_kernel`.

    Hopper's matrix unit reads both operands from shared memory, so a tile of 256 columns fits the
    registers. Other GPUs have 128 columns, and as many stages as fit their shared memory.
    """
    widest = min(256, max(16, triton.next_power_of_2(outs)))
    if device.type != "cuda":
        return min(128, widest), 4, 2
    properties: Any = torch.cuda.get_device_properties(device)
    if properties.major != 9 or block_m < 64 or itemsize > 2:
        widest = min(widest, 64 if itemsize > 2 else 128)
    room = properties.shared_memory_per_block_optin - _EPILOGUE_BYTES
    stages = max(2, min(4, room // ((block_m + widest) * _STEP * itemsize)))
    return widest, 8 if block_m * widest >= 128 * 128 else 4, stages


def _by_expert(routing: Routing, first: int, last: int) -> list[tuple[int, slice]]:
    """Return the rows of each expert, for the references."""
    starts = routing.starts.tolist()
    return [(e, slice(starts[e], starts[e + 1])) for e in range(first, last)]


def grouped_mm(
    x_SI: Tensor,
    arena: Tensor,
    routing: Routing,
    *,
    stored_oi: bool,
    out: Tensor,
    first: int = 0,
    last: int | None = None,
    bias_EO: Tensor | None = None,
) -> Tensor:
    """Write x' M'_e + bias_e to the rows of the experts [first, last).

    Args:
        x_SI: Sorted rows [S, I + R], unit stride along the columns.
        arena: M' of those experts, unit stride along the last dimension: [last - first, O,
            I + R] if `stored_oi`, else [last - first, I + R, O]. More rows and columns than these
            are ignored.
        routing: The rows.
        stored_oi: The layout of the arena.
        out: [S, O], unit stride along O.
        first: First expert of the arena.
        last: Expert after the last; all if None.
        bias_EO: Bias of all E experts.
    """
    last = routing.num_experts if last is None else last
    ins, outs = x_SI.shape[1], out.shape[1]
    if not use_kernel(x_SI):
        for e, rows in _by_expert(routing, first, last):
            weight = arena[e - first]
            m_IO = weight[:outs, :ins].t() if stored_oi else weight[:ins, :outs]
            # torch 2.13 on a CPU multiplies bfloat16 slices of wider rows wrongly.
            y = x_SI[rows].contiguous() @ m_IO.contiguous()
            out[rows] = y if bias_EO is None else y + bias_EO[e]
        return out
    block_m, block_k = routing.block, min(_STEP, max(16, triton.next_power_of_2(ins)))
    block_n, num_warps, num_stages = _shape(block_m, outs, x_SI.element_size(), x_SI.device)
    # The descriptor's end along K gives zeros to the last step of the loop.
    weight = arena[:, :, :ins] if stored_oi else arena[:, :ins]
    weight_block = [1, block_n, block_k] if stored_oi else [1, block_k, block_n]
    num_programs = _num_programs(x_SI.device)
    _mm_kernel[(num_programs,)](
        _descriptor(x_SI, [block_m, block_k]), _descriptor(weight, weight_block),
        out, out if bias_EO is None else bias_EO,
        routing.starts, routing.tile_starts, routing.expert_of_tile, first, last, num_programs,
        out.stride(0),
        INS=ins, OUTS=outs, STORED_OI=stored_oi, HAS_BIAS=bias_EO is not None,
        GROUP=_GROUP_TILES, BM=block_m, BN=block_n, BK=block_k,
        num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    return out


def _descriptor(x: Tensor, block: list[int]) -> TensorDescriptor:
    return TensorDescriptor(x, list(x.shape), list(x.stride()), block)


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
        for e, rows in _by_expert(routing, first, last):
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
