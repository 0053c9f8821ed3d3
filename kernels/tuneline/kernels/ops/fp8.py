"""Rows in 8-bit floats (e4m3) for Hopper's fp8 GEMM: activations, NF4 weights and their transpose.

    s_t = max_k |x_tk| / 448;  x8_tk = round(x_tk / s_t)               quantize_rows
    s = L / 448, L = max |w|
    W8[n, k] = round(w[n, k] / s)                                      nf4_to_fp8, for the forward
    V8[k, n] = round(w[n, k] / s), transposed                          for the input gradient
    Y = (x8 W8^T) s_t s                                                scaled_mm

w is the NF4 weight, dequantised to float32 and not rounded to bf16 before it is divided by s. No
pass over the weights has to find L: an NF4 block represents its largest weight exactly, so the
largest absmax of the blocks is the largest weight. fp8 GEMMs need the summed dimension as the last
one of both operands, so the input gradient needs a transposed copy of the weight.

The columns of an adapter lie beside W8 and V8 and have their scale s, which does not change when
the adapter does. If an adapter's largest number exceeds L, its columns are divided by the factor

    c = max(1, peak / L),  peak = max |side|                           quantize_side

and the columns of the activations that they are multiplied by are multiplied by c, before s_t is
computed (`quantize_rows` with a side).

Shapes: x [T, K]; W [N, K]; s_t [T] float32; s, L and peak scalars on the device, float32.
"""

# Triton's types declare neither a launch's options nor plain values for constexpr parameters.
# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from tuneline.kernels.ops.nf4 import NF4Weight, dequantize_nf4_reference, load_absmax

LARGEST = 448.0
"""The largest e4m3 number."""
SMALLEST_ROW = 1e-12
"""Lower bound of a maximum magnitude, so that the scale of zeros is not 0. The kernels repeat the
values of LARGEST and SMALLEST_ROW as literals."""

_WORDS = 512
_TILE_ROWS = 64
_TILE_COLS = 128
_SIDE_NUMBERS = 4096


@triton.jit
def _rows_kernel(
    x_ptr, side_ptr, out_ptr, scale_ptr, peak_ptr, largest_ptr,
    x_stride, x_step, side_stride, out_stride,
    K: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * x_stride + col * x_step, col < K, 0.0).to(tl.float32)
    largest = tl.maximum(tl.max(tl.abs(x), 0), 1e-12)
    if P > 0:
        p = tl.arange(0, P)
        side = tl.load(side_ptr + row * side_stride + p).to(tl.float32)
        side *= tl.maximum(1.0, tl.load(peak_ptr) / tl.load(largest_ptr))
        largest = tl.maximum(largest, tl.max(tl.abs(side), 0))
        side *= 448.0 / largest
        tl.store(out_ptr + row * out_stride + K + p, side.to(out_ptr.dtype.element_ty))
    tl.store(scale_ptr + row, largest / 448.0)
    y = x * (448.0 / largest)
    tl.store(out_ptr + row * out_stride + col, y.to(out_ptr.dtype.element_ty), col < K)


@triton.jit
def _side_kernel(
    side_ptr, out_ptr, peak_ptr, largest_ptr, R, row_stride, column_stride, out_stride,
    P: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    p = tl.arange(0, P)[None, :]
    side = tl.load(side_ptr + row * row_stride + p * column_stride, row < R, 0.0).to(tl.float32)
    side *= 448.0 / tl.maximum(tl.load(largest_ptr), tl.load(peak_ptr))
    tl.store(out_ptr + row * out_stride + p, side.to(out_ptr.dtype.element_ty), row < R)


@triton.jit
def _weight_kernel(
    words_ptr, absmax_ptr, code_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, largest_ptr,
    out_ptr, num_words, out_stride, K: tl.constexpr, NESTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    word = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = word < num_words
    bits = tl.load(words_ptr + word, mask, 0)
    absmax = load_absmax(
        word // 8, mask, absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, NESTED
    )
    absmax *= 448.0 / tl.load(largest_ptr)
    row = word // (K // 8)
    lane = tl.arange(0, 8)
    nibble = (bits[:, None] >> ((4 * lane) ^ 4)[None, :]) & 15
    w = tl.load(code_ptr + nibble) * absmax[:, None]
    start = row.to(tl.int64) * out_stride + (word % (K // 8)) * 8
    out_ptrs = out_ptr + start[:, None] + lane[None, :]
    tl.store(out_ptrs, w.to(out_ptr.dtype.element_ty), mask[:, None])


@triton.jit
def _transposed_kernel(
    words_ptr, absmax_ptr, code_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, largest_ptr,
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
    absmax *= 448.0 / tl.load(largest_ptr)
    shift = (4 * tl.arange(0, 8)) ^ 4
    nibble = (bits[:, :, None] >> shift[None, None, :]) & 15
    w = tl.reshape(tl.load(code_ptr + nibble) * absmax[:, :, None], [ROWS, COLS])
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    out_ptrs = out_ptr + col[:, None].to(tl.int64) * out_stride + row[None, :]
    mask = (col < K)[:, None] & (row < N)[None, :]
    tl.store(out_ptrs, tl.trans(w).to(out_ptr.dtype.element_ty), mask)


@dataclass(frozen=True, slots=True)
class Side:
    """P more columns of rows, whose counterparts in the other operand `quantize_side` converts."""

    values_TP: Tensor
    """P is a power of two, and the stride of the columns is 1."""
    peak: Tensor
    """Largest magnitude of the counterparts."""
    largest: Tensor
    """L of the weights beside the counterparts."""


def quantize_rows_reference(x_TK: Tensor, side: Side | None = None) -> tuple[Tensor, Tensor]:
    """Compute `quantize_rows` in plain torch; same arguments."""
    wide = x_TK.float()
    if side is not None:
        factor = (side.peak / side.largest).clamp_min(1)
        wide = torch.cat([wide, side.values_TP.float() * factor], 1)
    largest = wide.abs().amax(1).clamp_min(SMALLEST_ROW)
    return (wide * (LARGEST / largest)[:, None]).to(torch.float8_e4m3fn), largest / LARGEST


def quantize_rows(x_TK: Tensor, side: Side | None = None) -> tuple[Tensor, Tensor]:
    """Quantise rows to e4m3: return x8 [T, K + P], and the scale [T] of each row.

    Args:
        x_TK: Values, of any strides.
        side: P more columns of the same rows; None: P is 0.
    """
    if not x_TK.is_cuda:
        return quantize_rows_reference(x_TK, side)
    T, K = x_TK.shape
    P = 0 if side is None else side.values_TP.shape[1]
    x8 = x_TK.new_empty(T, K + P, dtype=torch.float8_e4m3fn)
    scale_T = torch.empty(T, dtype=torch.float32, device=x_TK.device)
    pointers = (x_TK, x8, scale_T, scale_T, scale_T)
    if side is not None:
        pointers = (side.values_TP, x8, scale_T, side.peak, side.largest)
    block = triton.next_power_of_2(K)
    _rows_kernel[(T,)](
        x_TK, *pointers,
        x_TK.stride(0), x_TK.stride(1), 0 if side is None else side.values_TP.stride(0),
        x8.stride(0), K=K, P=P, BLOCK=block, num_warps=max(1, min(8, block // 2048)),
    )  # fmt: skip
    return x8, scale_T


def quantize_side(side_RP: Tensor, *, peak: Tensor, largest: Tensor, out: Tensor) -> None:
    """Write an adapter's columns, divided by their factor and the weights' scale, as e4m3.

    Args:
        side_RP: s B [N, P] or A^T [K, P], of any strides; P is a power of two.
        peak: Largest magnitude of `side_RP`.
        largest: L of the weights.
        out: Where the result is written, with unit stride along its columns.
    """
    if not out.is_cuda:
        out.copy_(side_RP.float() * (LARGEST / torch.maximum(largest, peak)))
        return
    R, P = side_RP.shape
    rows = max(1, _SIDE_NUMBERS // P)
    _side_kernel[(triton.cdiv(R, rows),)](
        side_RP, out, peak, largest, R, *side_RP.stride(), out.stride(0), P=P, ROWS=rows,
        num_warps=4,
    )  # fmt: skip


def nf4_to_fp8(
    weight: NF4Weight, largest: Tensor, *, out: Tensor, transposed: bool = False
) -> None:
    """Write an NF4 weight, divided by its scale L / 448, as e4m3.

    Args:
        weight: NF4 weight [N, K].
        largest: L, at least the largest magnitude of the weight.
        out: Where the result is written: [N, K], or [K, N] if transposed.
        transposed: Write the transpose.
    """
    N, K = weight.shape
    if not out.is_cuda:
        wide = dequantize_nf4_reference(dataclasses.replace(weight, dtype=torch.float32))
        wide = wide.t() if transposed else wide
        out.copy_(wide * (LARGEST / largest))
        return
    nested = weight.nested_absmax is not None
    pointers = (
        weight.packed.view(torch.int32), weight.absmax, weight.code,
        weight.nested_absmax if nested else weight.absmax,
        weight.nested_code if nested else weight.code,
        weight.offset if nested else weight.code, largest, out,
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
    """Return the largest |w| of all weights, which is their largest absmax, as a float32 scalar.

    It is at least SMALLEST_ROW, because weights are divided by it.
    """
    peaks = torch.stack([weight.block_absmax().max() for weight in weights])
    return peaks.max().clamp_min(SMALLEST_ROW)
