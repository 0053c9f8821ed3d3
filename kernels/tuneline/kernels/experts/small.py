"""The grouped product for few rows per expert: NF4 is decoded inside the loop over K.

    out[s] = x[s] W_e^T + p[s] q_e + bias_e      or      out[s] = x[s] W_e + p[s] q_e

With many rows, an expert's weight is worth decoding once into the arena. With few, writing and
reading 16 bits per weight takes longer than the product, so each tile decodes the 4 bits it needs.
The decoded numbers are those of the arena, bit for bit.

Shapes: S rows, E experts, I inputs, O outputs, R padded rank.
"""

# Triton's types declare neither a launch's options nor plain values for constexpr parameters.
# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tuneline.kernels.experts.route import Routing
from tuneline.kernels.experts.stack import ExpertStack
from tuneline.kernels.ops.nf4 import load_absmax

_COLUMNS = 128
_STEP = 64


@triton.jit
def _small_kernel(
    x_ptr, words_ptr, absmax_ptr, code_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr,
    out_ptr, q_ptr, bias_ptr, starts_ptr, tile_starts_ptr, expert_of_tile_ptr,
    num_experts, x_stride, out_stride, q_stride_e, q_stride_r, q_stride_o,
    num_words, num_absmax, num_nested,
    INS: tl.constexpr, OUTS: tl.constexpr, R: tl.constexpr, STORED_OI: tl.constexpr,
    HAS_BIAS: tl.constexpr, NESTED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    columns: tl.constexpr = (OUTS + BN - 1) // BN
    tile = tl.program_id(0) // columns
    if tile < tl.load(tile_starts_ptr + num_experts):
        expert = tl.load(expert_of_tile_ptr + tile)
        row = tl.load(starts_ptr + expert) + (tile - tl.load(tile_starts_ptr + expert)) * BM
        rows = row + tl.arange(0, BM)
        valid = rows < tl.load(starts_ptr + expert + 1)
        col = (tl.program_id(0) % columns) * BN
        wide = expert.to(tl.int64)
        x_ptrs = x_ptr + rows.to(tl.int64)[:, None] * x_stride
        lane = tl.arange(0, 8)
        shift = (4 * lane) ^ 4  # The even element is the high nibble of its byte.
        acc = tl.zeros([BM, BN], dtype=tl.float32)
        for k in range(0, INS, BK):
            ins = k + tl.arange(0, BK)
            x = tl.load(x_ptrs + ins[None, :], valid[:, None] & (ins < INS)[None, :], 0.0)
            if STORED_OI:
                w_row = col + tl.arange(0, BN)
                w_word = k // 8 + tl.arange(0, BK // 8)
                word = w_row[:, None] * (INS // 8) + w_word[None, :]
                inside = (w_row < OUTS)[:, None] & (w_word < INS // 8)[None, :]
            else:
                w_row = k + tl.arange(0, BK)
                w_word = col // 8 + tl.arange(0, BN // 8)
                word = w_row[:, None] * (OUTS // 8) + w_word[None, :]
                inside = (w_row < INS)[:, None] & (w_word < OUTS // 8)[None, :]
            bits = tl.load(words_ptr + wide * num_words + word, inside, 0)
            absmax = load_absmax(
                word // 8, inside, absmax_ptr + wide * num_absmax,
                nested_absmax_ptr + wide * num_nested, nested_code_ptr, offset_ptr + expert, NESTED,
            )  # fmt: skip
            nibble = (bits[:, :, None] >> shift[None, None, :]) & 15
            w = tl.load(code_ptr + nibble) * absmax[:, :, None]
            w = w.to(x_ptr.dtype.element_ty)
            if STORED_OI:
                w = tl.trans(tl.reshape(w, [BN, BK]))
            else:
                w = tl.reshape(w, [BK, BN])
            acc = tl.dot(x, w, acc, input_precision="ieee")
        cols = col + tl.arange(0, BN)
        if R > 0:
            rank = tl.arange(0, R)
            p = tl.load(x_ptrs + INS + rank[None, :], valid[:, None], 0.0)
            q_ptrs = q_ptr + wide * q_stride_e
            q_ptrs += rank[:, None] * q_stride_r + cols[None, :] * q_stride_o
            q = tl.load(q_ptrs, (cols < OUTS)[None, :], 0.0)
            acc = tl.dot(p, q, acc, input_precision="ieee")
        if HAS_BIAS:
            bias = tl.load(bias_ptr + wide * OUTS + cols, cols < OUTS, 0.0).to(tl.float32)
            acc += bias[None, :]
        out = out_ptr + rows.to(tl.int64)[:, None] * out_stride + cols[None, :]
        mask = valid[:, None] & (cols < OUTS)[None, :]
        tl.store(out, acc.to(out_ptr.dtype.element_ty), mask)


def small_mm(
    x_SI: Tensor,
    stack: ExpertStack,
    routing: Routing,
    *,
    forward: bool,
    out: Tensor,
    q_ERO: Tensor | None = None,
) -> Tensor:
    """Write the projection of all rows, or the gradient of its input.

    Args:
        x_SI: Sorted rows [S, I + R], unit stride along the columns; the last R are the adapter's.
        stack: The quantised experts.
        routing: The rows.
        forward: Whether to compute the projection; otherwise the gradient of its input.
        out: [S, O], unit stride along O.
        q_ERO: The adapter's other matrix of all experts, as a view of any strides, or None.
    """
    outs = out.shape[1]
    rank = 0 if q_ERO is None else q_ERO.shape[1]
    ins = x_SI.shape[1] - rank
    q = x_SI.view(1, *x_SI.shape) if q_ERO is None else q_ERO
    nested = stack.nested_absmax
    bias = stack.bias if forward else None
    block_n = min(_COLUMNS, max(16, triton.next_power_of_2(outs)))
    _small_kernel[(routing.max_tiles * triton.cdiv(outs, block_n),)](
        x_SI, stack.packed.view(torch.int32), stack.absmax, stack.code,
        stack.absmax if nested is None else nested,
        stack.code if stack.nested_code is None else stack.nested_code,
        stack.code if stack.offset is None else stack.offset,
        out, q, out if bias is None else bias,
        routing.starts, routing.tile_starts, routing.expert_of_tile, routing.num_experts,
        x_SI.stride(0), out.stride(0), q.stride(0), q.stride(1), q.stride(2),
        ins * outs // 8, stack.absmax.shape[1], 0 if nested is None else nested.shape[1],
        INS=ins, OUTS=outs, R=rank, STORED_OI=forward != stack.transposed,
        HAS_BIAS=bias is not None, NESTED=nested is not None,
        BM=routing.block, BN=block_n, BK=min(_STEP, max(16, triton.next_power_of_2(ins))),
        num_warps=4, num_stages=3, enable_fp_fusion=False,
    )  # fmt: skip
    return out
