"""RMSNorm, fused with the residual addition before it.

    s = x + residual                                (rounded to x's dtype; s = x without residual)
    n = s * rstd,  rstd = 1 / sqrt(mean(s^2) + eps) (float32)
    y = weight * round(n)                           (Llama: n is rounded to x's dtype first)
    y = round(n * (1 + weight))                     (Gemma: all in float32, rounded once)

    dn = dy * weight
    ds = rstd * (dn - n * mean(dn * n)) + dresidual
    dweight = sum over tokens of dy * n

Shapes: x, residual, y [..., K]; weight [K]; rstd [T] float32, where T is the product of the sizes
before K.
"""

# Triton's types declare neither a launch's options nor plain values for constexpr parameters.
# pyright: reportCallIssue=false, reportArgumentType=false

from typing import overload

import torch
import triton
import triton.language as tl
from torch import Tensor

from tuneline.kernels.ops._dispatch import rows, use_kernel

_BACKWARD_ROWS = 16
"""Number of tokens over which one program sums the weight gradient; the programs' sums are added
afterwards, which avoids atomics."""
_COLS_PER_WARP = 512


@triton.jit
def _fwd_kernel(
    x_ptr, residual_ptr, weight_ptr, y_ptr, sum_ptr, rstd_ptr,
    x_stride, residual_stride, y_stride, sum_stride, eps,
    K: tl.constexpr, BLOCK: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_SUM: tl.constexpr,
    GEMMA: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < K
    x = tl.load(x_ptr + row * x_stride + cols, mask=mask, other=0.0)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + row * residual_stride + cols, mask=mask, other=0.0)
        s = (x.to(tl.float32) + residual.to(tl.float32)).to(sum_ptr.dtype.element_ty)
    else:
        s = x
    if HAS_SUM:
        tl.store(sum_ptr + row * sum_stride + cols, s, mask=mask)
    wide = s.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(wide * wide, axis=0) / K + eps)
    tl.store(rstd_ptr + row, rstd)
    n = wide * rstd
    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    if GEMMA:
        y = n * (1.0 + weight)
    else:
        y = n.to(x_ptr.dtype.element_ty).to(tl.float32) * weight
    tl.store(y_ptr + row * y_stride + cols, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _bwd_kernel(
    dy_ptr, x_ptr, weight_ptr, rstd_ptr, dresidual_ptr, dx_ptr, partial_ptr,
    dy_stride, x_stride, dresidual_stride, dx_stride, T,
    K: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    HAS_DRESIDUAL: tl.constexpr, NEED_DWEIGHT: tl.constexpr, GEMMA: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    in_row = cols < K
    weight = tl.load(weight_ptr + cols, mask=in_row, other=0.0).to(tl.float32)
    if GEMMA:
        weight += 1.0
    dweight = tl.zeros([BLOCK], dtype=tl.float32)
    for i in range(ROWS):
        row = program * ROWS + i
        mask = in_row & (row < T)
        dy = tl.load(dy_ptr + row * dy_stride + cols, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + row * x_stride + cols, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row, mask=row < T, other=0.0)
        n = x * rstd
        dn = dy * weight
        dx = rstd * (dn - n * (tl.sum(dn * n, axis=0) / K))
        if HAS_DRESIDUAL:
            dresidual_ptrs = dresidual_ptr + row * dresidual_stride + cols
            dx += tl.load(dresidual_ptrs, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + row * dx_stride + cols, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if NEED_DWEIGHT:
            dweight += dy * n
    if NEED_DWEIGHT:
        tl.store(partial_ptr + program * K + cols, dweight, mask=in_row)


def rms_norm_forward(
    x: Tensor, weight: Tensor, eps: float, *,
    residual: Tensor | None = None, gemma: bool = False, out: Tensor | None = None,
    sum_out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:  # fmt: skip
    """Return (y, s or None, rstd [T]) without recording a gradient.

    s is returned if there is a residual or `sum_out`.

    Args:
        x: Input [..., K].
        weight: Scale [K].
        eps: Added to the mean square.
        residual: Tensor [..., K] added to x before the norm.
        gemma: Use Gemma's equation.
        out: Where y is written: the shape of x, any dtype and row stride (e.g. a slice of a wider
            buffer).
        sum_out: Where s is written, in the shape of x; a new tensor if None.
    """
    y = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
    if not use_kernel(x):
        total = x if residual is None else x + residual
        y.copy_(rms_norm_reference(total, weight, eps, gemma=gemma))
        wide = total if total.dtype == torch.float64 else total.float()
        rstd = torch.rsqrt(wide.square().mean(-1) + eps).reshape(-1)
        if sum_out is not None:
            return y, sum_out.copy_(total), rstd
        return y, None if residual is None else total, rstd
    x_TK, y_TK = rows(x), y.view(-1, y.shape[-1])
    T, K = x_TK.shape
    s = sum_out
    if s is None and residual is not None:
        s = torch.empty_like(x, memory_format=torch.contiguous_format)
    residual_TK = x_TK if residual is None else rows(residual)
    s_TK = x_TK if s is None else s.view(T, K)
    rstd_T = torch.empty(T, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(K)
    _fwd_kernel[(T,)](
        x_TK, residual_TK, weight, y_TK, s_TK, rstd_T,
        x_TK.stride(0), residual_TK.stride(0), y_TK.stride(0), s_TK.stride(0), eps,
        K=K, BLOCK=block, HAS_RESIDUAL=residual is not None, HAS_SUM=s is not None, GEMMA=gemma,
        num_warps=max(1, min(16, block // _COLS_PER_WARP)),
    )  # fmt: skip
    return y, s, rstd_T


def rms_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, *, gemma: bool,
    dresidual: Tensor | None = None, need_dweight: bool = False, out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Return (dx, dweight or None).

    Args:
        dy: Gradient of the output [..., K].
        x: Input of the norm [..., K], after the residual addition.
        weight: Scale [K].
        rstd: Result of `rms_norm_forward` [T], float32.
        gemma: Use Gemma's equation.
        dresidual: Gradient [..., K] that is added to dx.
        need_dweight: Compute dweight [K] too.
        out: Where dx is written, [T, K].
    """
    if not use_kernel(x):
        rstd = rstd.view(*x.shape[:-1], 1)
        n, dn = x * rstd, dy * (1 + weight if gemma else weight).to(rstd.dtype)
        dx = rstd * (dn - n * (dn * n).mean(-1, keepdim=True))
        dx = (dx if dresidual is None else dx + dresidual).to(x.dtype)
        dx = dx if out is None else out.copy_(dx)
        return dx, (dy * n).flatten(0, -2).sum(0).to(weight.dtype) if need_dweight else None
    dy_TK, x_TK = rows(dy), rows(x)
    T, K = x_TK.shape
    dx_TK = torch.empty(T, K, dtype=x.dtype, device=x.device) if out is None else out
    dresidual_TK = dx_TK if dresidual is None else rows(dresidual)
    num_rows = _BACKWARD_ROWS if need_dweight else 1
    num_programs = triton.cdiv(T, num_rows)
    partial = torch.empty(num_programs if need_dweight else 0, K, device=x.device)
    block = triton.next_power_of_2(K)
    _bwd_kernel[(num_programs,)](
        dy_TK, x_TK, weight, rstd, dresidual_TK, dx_TK, partial,
        dy_TK.stride(0), x_TK.stride(0), dresidual_TK.stride(0), dx_TK.stride(0), T,
        K=K, BLOCK=block, ROWS=num_rows,
        HAS_DRESIDUAL=dresidual is not None, NEED_DWEIGHT=need_dweight, GEMMA=gemma,
        num_warps=max(1, min(16, block // _COLS_PER_WARP)),
    )  # fmt: skip
    return dx_TK.view(x.shape), partial.sum(0).to(weight.dtype) if need_dweight else None


class RMSNormFunction(torch.autograd.Function):
    """Autograd function of `rms_norm`; returns y, or (y, new residual) if a residual is given."""

    @staticmethod
    def forward(ctx, x, residual, weight, eps, gemma):  # noqa: D102
        ctx.set_materialize_grads(False)
        y, s, rstd = rms_norm_forward(x, weight, eps, residual=residual, gemma=gemma)
        ctx.save_for_backward(x if s is None else s, weight, rstd)
        ctx.gemma, ctx.has_residual = gemma, residual is not None
        return (y, s) if ctx.has_residual else y

    @staticmethod
    def backward(ctx, dy, ds=None):  # noqa: D102
        x, weight, rstd = ctx.saved_tensors
        if dy is None:  # Only the new residual was used.
            return ds, ds, None, None, None
        dx, dweight = rms_norm_backward(
            dy, x, weight, rstd, gemma=ctx.gemma, dresidual=ds, need_dweight=ctx.needs_input_grad[2]
        )
        return dx, dx if ctx.has_residual else None, dweight, None, None


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float, *, gemma: bool = False) -> Tensor:
    """Compute `rms_norm` in plain torch, as transformers does; without `residual` and `out`."""
    wide = x if x.dtype == torch.float64 else x.float()
    n = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    y = n * (1 + weight.to(n.dtype)) if gemma else weight * n.to(x.dtype)
    return y.to(x.dtype)


@overload
def rms_norm(
    x: Tensor, weight: Tensor, eps: float, *,
    residual: None = None, gemma: bool = False, out: Tensor | None = None,
) -> Tensor: ...  # fmt: skip
@overload
def rms_norm(
    x: Tensor, weight: Tensor, eps: float, *,
    residual: Tensor, gemma: bool = False, out: Tensor | None = None,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def rms_norm(x, weight, eps, *, residual=None, gemma=False, out=None):
    """Return y, or (y, new residual) if a residual is given.

    Args:
        x: Input [..., K]; differentiable unless `out` is given.
        weight: Scale [K]; differentiable unless `out` is given.
        eps: Added to the mean square.
        residual: Tensor [..., K] added to x before the norm; the sum is returned too.
        gemma: Use Gemma's equation: all in float32, scaled by 1 + weight.
        out: Where y is written, in the shape of x; allowed only if no gradient is recorded.

    Raises:
        ValueError: `out` is given although a gradient has to be recorded.
    """
    if out is None:
        return RMSNormFunction.apply(x, residual, weight, eps, gemma)
    inputs = [x, weight] if residual is None else [x, weight, residual]
    if torch.is_grad_enabled() and any(t.requires_grad for t in inputs):
        raise ValueError("rms_norm(out=...) records no gradient: call it under torch.no_grad()")
    y, s, _ = rms_norm_forward(x, weight, eps, residual=residual, gemma=gemma, out=out)
    return y if residual is None else (y, s)
