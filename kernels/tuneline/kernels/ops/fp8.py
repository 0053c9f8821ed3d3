"""Rows in 8-bit floats (e4m3) for Hopper's fp8 GEMM: activations, NF4 weights and their transpose.

    s_t = max_k |x_tk| / 448;  x8_tk = round(x_tk / s_t)               quantize_rows
    W8[n, k] = round(w[n, k] / s_n)                                    operand of the forward
    V8[k, n] = round(w[n, k] / s_k), written transposed                operand of the input gradient
    Y = (x8 W8^T) s_t s_n                                              scaled_mm

w is the NF4 weight, dequantised to float32 and not rounded to bf16 before it is divided by s. The
scales s_n and s_k of a weight are arguments, so no pass over the weights has to find them: an NF4
block represents its largest weight exactly, so the largest absmax of the blocks is the largest
weight. fp8 GEMMs need the summed dimension as the last one of both operands, so the input gradient
needs a transposed copy of the weight.

Shapes: x [T, K]; W [N, K]; s_t [T], s_n [N], s_k [K] float32.
"""

# Triton's types declare neither a launch's options nor plain values for constexpr parameters.
# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl
from torch import Tensor

from tuneline.kernels.ops.nf4 import NF4Weight, dequantize_nf4_reference, load_absmax

LARGEST = 448.0
"""The largest e4m3 number."""
SMALLEST_ROW = 1e-12
"""Lower bound of a row's maximum magnitude, so that the scale of a row of zeros is not 0. The
kernel repeats the values of LARGEST and SMALLEST_ROW as literals."""

_WORDS = 512
_TILE_ROWS = 64
_TILE_COLS = 128


@triton.jit
def _rows_kernel(
    x_ptr, side_ptr, out_ptr, scale_ptr, floor_ptr,
    x_stride, x_step, side_stride, out_stride,
    K: tl.constexpr, P: tl.constexpr, HAS_FLOOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * x_stride + col * x_step, col < K, 0.0).to(tl.float32)
    largest = tl.maximum(tl.max(tl.abs(x), 0), 1e-12)
    if HAS_FLOOR:
        largest = tl.maximum(largest, tl.load(floor_ptr))
    if P > 0:
        p = tl.arange(0, P)
        side = tl.load(side_ptr + row * side_stride + p).to(tl.float32)
        largest = tl.maximum(largest, tl.max(tl.abs(side), 0))
        side *= 448.0 / largest
        tl.store(out_ptr + row * out_stride + K + p, side.to(out_ptr.dtype.element_ty))
    tl.store(scale_ptr + row, largest / 448.0)
    y = x * (448.0 / largest)
    tl.store(out_ptr + row * out_stride + col, y.to(out_ptr.dtype.element_ty), col < K)


@triton.jit
def _weight_kernel(
    words_ptr, absmax_ptr, code_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, scale_ptr,
    out_ptr, num_words, out_stride, K: tl.constexpr, NESTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    word = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = word < num_words
    bits = tl.load(words_ptr + word, mask, 0)
    absmax = load_absmax(
        word // 8, mask, absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, NESTED
    )
    row = word // (K // 8)
    absmax /= tl.load(scale_ptr + row, mask, 1.0)
    lane = tl.arange(0, 8)
    nibble = (bits[:, None] >> ((4 * lane) ^ 4)[None, :]) & 15
    w = tl.load(code_ptr + nibble) * absmax[:, None]
    start = row.to(tl.int64) * out_stride + (word % (K // 8)) * 8
    out_ptrs = out_ptr + start[:, None] + lane[None, :]
    tl.store(out_ptrs, w.to(out_ptr.dtype.element_ty), mask[:, None])


@triton.jit
def _transposed_kernel(
    words_ptr, absmax_ptr, code_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, scale_ptr,
    out_ptr, N, out_stride, K: tl.constexpr, NESTED: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    word = tl.program_id(1) * (COLS // 8) + tl.arange(0, COLS // 8)
    index = row[:, None] * (K // 8) + word[None, :]
    mask = (row < N)[:, None] & (word < K // 8)[None, :]
    bits = tl.load(words_ptr + index, mask, 0)
    absmax = load_absmax(
        index // 8, mask, absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, NESTED
    )
    shift = (4 * tl.arange(0, 8)) ^ 4
    nibble = (bits[:, :, None] >> shift[None, None, :]) & 15
    w = tl.reshape(tl.load(code_ptr + nibble) * absmax[:, :, None], [ROWS, COLS])
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    w = tl.trans(w) / tl.load(scale_ptr + col, col < K, 1.0)[:, None]
    out_ptrs = out_ptr + col[:, None].to(tl.int64) * out_stride + row[None, :]
    tl.store(out_ptrs, w.to(out_ptr.dtype.element_ty), (col < K)[:, None] & (row < N)[None, :])


def quantize_rows_reference(x_TK: Tensor, *, floor: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Compute `quantize_rows` in plain torch; same arguments, except `side_TP` and `out`."""
    wide = x_TK.float()
    largest = wide.abs().amax(1).clamp_min(SMALLEST_ROW)
    if floor is not None:
        largest = torch.maximum(largest, floor)
    return (wide * (LARGEST / largest)[:, None]).to(torch.float8_e4m3fn), largest / LARGEST


def quantize_rows(
    x_TK: Tensor,
    *,
    side_TP: Tensor | None = None,
    floor: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Quantise rows to e4m3: return x8 [T, K + P], and the scale [T] of each row.

    Args:
        x_TK: Values, of any strides.
        side_TP: P more columns of the same rows; P is a power of two and its stride is 1.
        floor: Scalar tensor on the device: lower bound of the maximum magnitude that gives a row's
            scale.
        out: Where x8 is written, with unit stride along its columns.
    """
    if not x_TK.is_cuda:
        whole = x_TK if side_TP is None else torch.cat([x_TK, side_TP], 1)
        x8, scale = quantize_rows_reference(whole, floor=floor)
        return x8 if out is None else out.copy_(x8), scale
    T, K = x_TK.shape
    P = 0 if side_TP is None else side_TP.shape[1]
    x8 = x_TK.new_empty(T, K + P, dtype=torch.float8_e4m3fn) if out is None else out
    scale_T = torch.empty(T, dtype=torch.float32, device=x_TK.device)
    block = triton.next_power_of_2(K)
    _rows_kernel[(T,)](
        x_TK, x_TK if side_TP is None else side_TP, x8, scale_T,
        scale_T if floor is None else floor,
        x_TK.stride(0), x_TK.stride(1), 0 if side_TP is None else side_TP.stride(0), x8.stride(0),
        K=K, P=P, HAS_FLOOR=floor is not None, BLOCK=block,
        num_warps=max(1, min(16, block // 1024)),
    )  # fmt: skip
    return x8, scale_T


def nf4_to_fp8(weight: NF4Weight, scale: Tensor, *, out: Tensor, transposed: bool = False) -> None:
    """Write an NF4 weight, divided by the given scales, as e4m3.

    Args:
        weight: NF4 weight [N, K].
        scale: Divisor per row of the result: float32 [N], or [K] if transposed.
        out: Where the result is written: [N, K], or [K, N] if transposed.
        transposed: Write the transpose.
    """
    N, K = weight.shape
    if not out.is_cuda:
        wide = dequantize_nf4_reference(dataclasses.replace(weight, dtype=torch.float32))
        wide = wide.t() if transposed else wide
        out.copy_((wide / scale[:, None]).to(out.dtype))
        return
    nested = weight.nested_absmax is not None
    pointers = (
        weight.packed.view(torch.int32), weight.absmax, weight.code,
        weight.nested_absmax if nested else weight.absmax,
        weight.nested_code if nested else weight.code,
        weight.offset if nested else weight.code, scale, out,
    )  # fmt: skip
    if transposed:
        grid = (triton.cdiv(N, _TILE_ROWS), triton.cdiv(K, _TILE_COLS))
        _transposed_kernel[grid](
            *pointers, N, out.stride(0), K=K, NESTED=nested, ROWS=_TILE_ROWS, COLS=_TILE_COLS,
            num_warps=4,
        )  # fmt: skip
        return
    num_words = N * K // 8
    _weight_kernel[(triton.cdiv(num_words, _WORDS),)](
        *pointers, num_words, out.stride(0), K=K, NESTED=nested, BLOCK=_WORDS, num_warps=4
    )


def scaled_mm(
    x8_TK: Tensor, x_scale_T: Tensor, w8_NK: Tensor, w_scale_N: Tensor,
    *, dtype: torch.dtype, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return (x8 W8^T) times the scales of both operands' rows, [T, N]; sums are in float32.

    Args:
        x8_TK: Rows in e4m3.
        x_scale_T: Scale per row of x8, float32.
        w8_NK: Weight in e4m3.
        w_scale_N: Scale per row of w8, float32.
        dtype: Dtype of the result.
        out: Where the result is written.
    """
    if not x8_TK.is_cuda:
        y = (x8_TK.float() * x_scale_T[:, None]) @ (w8_NK.float() * w_scale_N[:, None]).t()
        return y.to(dtype) if out is None else out.copy_(y)
    scales = (x_scale_T[:, None], w_scale_N[None, :])
    if out is None:
        return torch._scaled_mm(x8_TK, w8_NK.t(), *scales, out_dtype=dtype, use_fast_accum=True)
    return torch._scaled_mm(
        x8_TK, w8_NK.t(), *scales, out_dtype=dtype, use_fast_accum=True, out=out
    )


def largest_weight(weights: list[NF4Weight]) -> Tensor:
    """Return the largest |w| of all weights, which is their largest absmax, as a float32 scalar."""
    return torch.stack([weight.block_absmax().max() for weight in weights]).max()
