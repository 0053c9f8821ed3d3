"""Sum the experts' rows of each token, weighted or not.

    y[t] = residual[t] + sum_j c[t, j] rows[row_of_slot[t k + j]]

c is the routing weight in the forward and 1 in the backward; a dropped slot adds nothing. The sum
is taken in float32 in the order of j, so it does not depend on how the rows are scheduled.

Shapes: T tokens, k experts per token, S = T k rows, C hidden size.
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

_BLOCK = 1024
_NUM_WARPS = 4


@triton.jit
def _combine_kernel(
    rows_ptr, weights_ptr, residual_ptr, out_ptr, row_of_slot_ptr, residual_stride, out_stride,
    C: tl.constexpr, TOP_K: tl.constexpr, WEIGHTED: tl.constexpr, RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    blocks: tl.constexpr = (C + BLOCK - 1) // BLOCK
    token = (tl.program_id(0) // blocks).to(tl.int64)
    col = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = col < C
    acc = tl.zeros([BLOCK], dtype=tl.float32)
    if RESIDUAL:
        acc += tl.load(residual_ptr + token * residual_stride + col, mask, 0.0).to(tl.float32)
    for j in tl.static_range(TOP_K):
        row = tl.load(row_of_slot_ptr + token * TOP_K + j)
        kept = row >= 0
        value = tl.load(rows_ptr + row.to(tl.int64) * C + col, mask & kept, 0.0).to(tl.float32)
        if WEIGHTED:
            value *= tl.load(weights_ptr + token * TOP_K + j).to(tl.float32)
        acc += value
    tl.store(out_ptr + token * out_stride + col, acc.to(out_ptr.dtype.element_ty), mask)


def combine(
    rows_SC: Tensor,
    routing: Routing,
    *,
    weights_Tk: Tensor | None = None,
    residual_TC: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Return the sum of each token's rows [T, C], plus the residual if given.

    Args:
        rows_SC: Sorted rows, contiguous.
        routing: The rows.
        weights_Tk: Weight per slot; 1 if None.
        residual_TC: Added to the sum; unit stride along C.
        out: Where the result is written, unit stride along C; may be the residual.
    """
    T, C = routing.num_rows // routing.top_k, rows_SC.shape[1]
    out = rows_SC.new_empty(T, C) if out is None else out
    if not use_kernel(rows_SC):
        wide = torch.promote_types(rows_SC.dtype, torch.float32)
        row = routing.row_of_slot.long().view(T, routing.top_k)
        value = rows_SC[row.clamp(min=0)].to(wide).masked_fill((row < 0)[..., None], 0.0)
        if weights_Tk is not None:
            value = value * weights_Tk[..., None].to(wide)
        total = value.sum(1)
        return out.copy_(total if residual_TC is None else total + residual_TC)
    block = min(_BLOCK, triton.next_power_of_2(C))
    residual = rows_SC if residual_TC is None else residual_TC
    _combine_kernel[(T * triton.cdiv(C, block),)](
        rows_SC, rows_SC if weights_Tk is None else weights_Tk.contiguous(), residual, out,
        routing.row_of_slot, residual.stride(0), out.stride(0),
        C=C, TOP_K=routing.top_k, WEIGHTED=weights_Tk is not None,
        RESIDUAL=residual_TC is not None, BLOCK=block, num_warps=_NUM_WARPS,
    )  # fmt: skip
    return out
