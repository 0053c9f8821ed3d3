"""Round a block of columns as GPTQ does: each column's error is made good in the columns after it.

For j = 0 .. B-1, in this order, with s, z the scale and zero point of column j's group:

    q_j     = s * (clamp(round(w_j / s) + z, 0, max_code) - z)
    e_j     = (w_j - q_j) / u_jj
    loss_j  = (w_j - q_j)^2 / u_jj^2
    w_k    -= e_j * u_jk                              for k > j

u is the upper Cholesky factor of the inverse Hessian (Frantar et al. 2022, algorithm 1). Rows are
independent. The chain over j is sequential: with one torch operation after another it takes some 15
launches per column, and the host takes far longer than the GPU. Here a program holds its rows in
registers for all columns of the block.

Every operation rounds as torch's does, and products are not fused with sums, so that the kernel
gives the same bits as the loop in torch.

Shapes: w, q, error, loss [N, B]; u [B, B]; scale, zero [G, N]; group [B]; N output features, B
columns (input features), G groups that the block touches.
"""

# Triton's types declare neither a launch's options nor plain values for constexpr parameters.
# pyright: reportCallIssue=false, reportArgumentType=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from tuneline.kernels.ops._dispatch import use_kernel

ROWS = 16
"""Rows per program: each of its four warps has four rows, whose chains overlap."""


@triton.jit
def _round_kernel(
    w_ptr,
    u_ptr,
    scale_ptr,
    zero_ptr,
    group_ptr,
    q_ptr,
    error_ptr,
    loss_ptr,
    N,
    w_stride,
    u_stride_row,
    u_stride_column,
    scale_stride,
    zero_stride,
    q_stride,
    error_stride,
    loss_stride,
    max_code,
    B: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, B)
    live = row < N
    row = row.to(tl.int64)
    mask = live[:, None] & (column < B)[None, :]
    w = tl.load(w_ptr + row[:, None] * w_stride + column[None, :], mask, 0.0)
    q = tl.zeros([ROWS, B], tl.float32)
    for j in range(B):
        here = (column == j)[None, :]
        w_j = tl.sum(tl.where(here, w, 0.0), 1)
        u_j = tl.load(u_ptr + j * u_stride_row + column * u_stride_column)
        u_jj = tl.load(u_ptr + j * u_stride_row + j * u_stride_column)
        group = tl.load(group_ptr + j)
        scale = tl.load(scale_ptr + group * scale_stride + row, live, 1.0)
        zero = tl.load(zero_ptr + group * zero_stride + row, live, 0.0)
        # Adding and subtracting 1.5 * 2^23 rounds to the nearest integer, halves to even. Larger
        # values are clamped in any case. Comparisons keep NaN, as torch.clamp does.
        code = (tl.div_rn(w_j, scale) + 12582912.0) - 12582912.0 + zero
        code = tl.where(code < 0.0, 0.0, code)
        code = tl.where(code > max_code, max_code, code)
        q_j = scale * (code - zero)
        e_j = tl.div_rn(w_j - q_j, tl.zeros([ROWS], tl.float32) + u_jj)
        q = tl.where(here, q_j[:, None], q)
        w = tl.where((column > j)[None, :], w - e_j[:, None] * u_j[None, :], w)
    # Column j of w was not changed after its turn.
    u_diagonal = tl.load(u_ptr + column * (u_stride_row + u_stride_column))[None, :]
    u_diagonal = tl.zeros([ROWS, B], tl.float32) + u_diagonal
    residual = w - q
    loss = tl.div_rn(residual * residual, u_diagonal * u_diagonal)
    tl.store(q_ptr + row[:, None] * q_stride + column[None, :], q, mask)
    tl.store(
        error_ptr + row[:, None] * error_stride + column[None, :],
        tl.div_rn(residual, u_diagonal),
        mask,
    )
    tl.store(loss_ptr + row[:, None] * loss_stride + column[None, :], loss, mask)


def round_block(
    w: Tensor,
    u: Tensor,
    scale: Tensor,
    zero: Tensor,
    group: Tensor,
    q: Tensor,
    error: Tensor,
    loss: Tensor,
    max_code: int,
) -> None:
    """Round the columns of a block one after another, and write q, error and loss.

    Args:
        w: Weights [N, B], with unit stride along B, a power of two. float32, as all others.
        u: Upper Cholesky factor of the inverse Hessian, its rows and columns of this block [B, B].
        scale: Scale of each group and row [G, N], with unit stride along N.
        zero: Zero point of each group and row, in codes [G, N], with unit stride along N.
        group: Index of each column's group, int32 [B].
        q: Receives the rounded weights [N, B].
        error: Receives the errors that columns after the block have to make good [N, B].
        loss: Receives the squared errors over the squared diagonal of u [N, B].
        max_code: Largest code, 2^bits - 1.
    """
    if not use_kernel(w):
        round_block_reference(w, u, scale, zero, group, q, error, loss, max_code)
        return
    N, B = w.shape
    _round_kernel[(triton.cdiv(N, ROWS),)](
        *(w, u, scale, zero, group, q, error, loss),
        N,
        *(w.stride(0), u.stride(0), u.stride(1), scale.stride(0), zero.stride(0)),
        *(q.stride(0), error.stride(0), loss.stride(0)),
        float(max_code),
        B=B,
        ROWS=ROWS,
        num_warps=4,
        enable_fp_fusion=False,
    )


def round_block_reference(
    w: Tensor,
    u: Tensor,
    scale: Tensor,
    zero: Tensor,
    group: Tensor,
    q: Tensor,
    error: Tensor,
    loss: Tensor,
    max_code: int,
) -> None:
    """Do what `round_block` does, with one torch operation after another, in any float dtype."""
    w = w.clone()
    for j, g in enumerate(group.tolist()):
        code = torch.clamp(torch.round(w[:, j] / scale[g]) + zero[g], 0, max_code)
        q[:, j] = scale[g] * (code - zero[g])
        residual = w[:, j] - q[:, j]
        loss[:, j] = residual.square() / u[j, j].square()
        error[:, j] = residual / u[j, j]
        w[:, j + 1 :] -= error[:, j, None] * u[j, j + 1 :]
