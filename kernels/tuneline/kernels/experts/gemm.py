"""The grouped product: rows that are sorted by expert, times the expert's matrix in the arena.

    out[s] = x'[s] M'_e + bias_e        x' [S, I + R], M'_e [I + R, O]

e is the expert of row s. M'_e is read from the arena (arena.py) in either layout, [O, I + R] or
[I + R, O]. The last R columns of x' and of M' are the adapter's, as in lora.py: base and adapter
take one product and one rounding.

Rows of experts [first, last) are computed by one call; a layer whose arena does not fit runs in
chunks of experts. Rows whose expert is dropped are never written.

An adapter's part added after the loop over K, from operands of its own, cost 11 to 33 % of the
product (H100, Qwen3-30B-A3B): the loop's products then no longer run asynchronously. R more columns
in the loop cost one step of it.

Shapes: S rows, E experts, I inputs, O outputs, R padded rank.
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
        for e, rows in routing.spans(first, last):
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
