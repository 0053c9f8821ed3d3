"""Dequantise a bitsandbytes NF4 weight in one launch, with LoRA columns or rows appended to it.

    w[i] = round(code[nibble(i)] * absmax[i // 64])
    absmax[j] = nested_code[u8(j)] * nested_absmax[j // 256] + offset     (double quantisation)

i counts the elements of the [N, K] weight row by row; byte b holds elements 2b (high nibble) and
2b + 1 (low). Each product and sum is rounded to float32 (no fused multiply-add), and the result
is rounded once to the output's dtype. The result is bit-exact with bitsandbytes.

The same launch can append a LoRA matrix, for a GEMM that computes base and adapter at once:

    lora_b [N, R]:  out [N, K + P] = [W | 0 .. lora_scale * B .. 0]   B at column K + lora_column
    lora_a [R, K]:  out [N + P, K] = [W ; A ; 0]
"""

# Triton's types declare neither a launch's options nor plain values for constexpr parameters.
# pyright: reportCallIssue=false, reportArgumentType=false

import dataclasses
from typing import Any

import torch
import triton
import triton.language as tl

from tuneline.kernels.ops._dispatch import use_kernel

_BLOCK_WORDS = 512
_NUM_WARPS = 4
_SIDE_ROWS = 64
_SIDE_COLS = 64


@triton.jit
def load_absmax(
    block, mask, absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, NESTED: tl.constexpr
):
    """Return the absmax of quantisation blocks; every kernel that reads NF4 calls this function."""
    if NESTED:
        q = tl.load(absmax_ptr + block, mask=mask, other=0).to(tl.int32)
        scale = tl.load(nested_absmax_ptr + block // 256, mask=mask, other=0.0)
        absmax = tl.load(nested_code_ptr + q) * scale + tl.load(offset_ptr)
    else:
        absmax = tl.load(absmax_ptr + block, mask=mask, other=0.0)
    return absmax


@triton.jit
def store_weight(
    program, words_ptr, absmax_ptr, code_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr,
    out_ptr, num_words, out_stride, K: tl.constexpr, NESTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Dequantise BLOCK words.

    One int32 word holds 8 weights, all of the same row and quantisation block. In bfloat16 these 8
    weights take 16 bytes, which a thread stores at once.
    """
    word = program * BLOCK + tl.arange(0, BLOCK)
    mask = word < num_words
    # Each word is read once and each weight is written once, so neither should evict other data
    # from the L2 cache (this is 3 % faster on an H100).
    bits = tl.load(words_ptr + word, mask=mask, other=0, eviction_policy="evict_first")
    absmax = load_absmax(
        word // 8, mask, absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, NESTED
    )
    lane = tl.arange(0, 8)
    shift = (4 * lane) ^ 4  # The even element is the high nibble of its byte.
    nibble = (bits[:, None] >> shift[None, :]) & 15
    w = tl.load(code_ptr + nibble) * absmax[:, None]
    start = (word // (K // 8)).to(tl.int64) * out_stride + (word % (K // 8)) * 8
    out_ptrs = out_ptr + start[:, None] + lane[None, :]
    w = w.to(out_ptr.dtype.element_ty)
    tl.store(out_ptrs, w, mask=mask[:, None], cache_modifier=".cs")


@triton.jit
def _store_side(
    program, side_ptr, out_ptr, out_stride, stride_row, stride_col, scale,
    first_row, first_col, num_rows, num_cols, src_rows, src_cols, src_shift,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Fill one tile of the pad with values of the scaled LoRA matrix, and with 0 outside them."""
    col_tiles = tl.cdiv(num_cols, COLS)
    row = (program // col_tiles) * ROWS + tl.arange(0, ROWS)
    col = (program % col_tiles) * COLS + tl.arange(0, COLS)
    src_col = col - src_shift
    has_source = (row < src_rows)[:, None] & ((src_col >= 0) & (src_col < src_cols))[None, :]
    src_ptrs = side_ptr + row[:, None] * stride_row + src_col[None, :] * stride_col
    value = tl.load(src_ptrs, mask=has_source, other=0.0).to(tl.float32) * scale
    start = (first_row + row).to(tl.int64) * out_stride
    out_ptrs = out_ptr + start[:, None] + (first_col + col)[None, :]
    mask = (row < num_rows)[:, None] & (col < num_cols)[None, :]
    tl.store(out_ptrs, value.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _fwd_kernel(
    words_ptr, absmax_ptr, code_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, out_ptr,
    side_ptr, num_words, out_stride, side_stride_row, side_stride_col, side_scale,
    side_row, side_col, side_rows, side_cols, side_src_rows, side_src_cols, side_shift,
    K: tl.constexpr, NESTED: tl.constexpr, BLOCK: tl.constexpr,
    SIDE_ROWS: tl.constexpr, SIDE_COLS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    num_main = tl.cdiv(num_words, BLOCK)
    if program < num_main:
        store_weight(
            program, words_ptr, absmax_ptr, code_ptr, nested_absmax_ptr, nested_code_ptr,
            offset_ptr, out_ptr, num_words, out_stride, K, NESTED, BLOCK,
        )  # fmt: skip
    else:
        _store_side(
            program - num_main, side_ptr, out_ptr, out_stride, side_stride_row, side_stride_col,
            side_scale, side_row, side_col, side_rows, side_cols,
            side_src_rows, side_src_cols, side_shift, SIDE_ROWS, SIDE_COLS,
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class NF4Weight:
    """A weight [N, K] in bitsandbytes' layout.

    Attributes:
        packed: uint8, N * K / 2 bytes.
        absmax: One per block of 64 weights: float32, or uint8 with double quantisation.
        code: The 16 levels, float32.
        shape: (N, K).
        dtype: Dtype of the dequantised weight.
        nested_absmax: float32, one per block of 256 absmax. This and the two following attributes
            are None without double quantisation.
        nested_code: The 256 levels of absmax, float32.
        offset: Added to every absmax, float32, 0-dimensional.
    """

    packed: torch.Tensor
    absmax: torch.Tensor
    code: torch.Tensor
    shape: tuple[int, int]
    dtype: torch.dtype
    nested_absmax: torch.Tensor | None = None
    nested_code: torch.Tensor | None = None
    offset: torch.Tensor | None = None

    @classmethod
    def from_bnb(cls, param: Any) -> "NF4Weight":
        """Wrap a bitsandbytes `Params4bit`, sharing its memory.

        Raises:
            ValueError: The weight is not NF4 in blocks of 64, the nested block size is not 256, or
                K is not a multiple of 8.
        """
        state = getattr(param, "quant_state", None)
        if state is None:
            raise ValueError("the parameter has no quant_state: move it to its device first")
        nested = state.state2 if state.nested else None
        if state.quant_type != "nf4" or state.blocksize != 64:
            raise ValueError(
                f"quant_type={state.quant_type!r}, blocksize={state.blocksize}: only nf4 in "
                "blocks of 64 is supported; load with bnb_4bit_quant_type='nf4'"
            )
        if nested is not None and nested.blocksize != 256:
            raise ValueError(f"nested blocksize {nested.blocksize}: only 256 is supported")
        if len(state.shape) != 2 or state.shape[1] % 8:
            raise ValueError(f"shape {tuple(state.shape)}: need 2 sizes, the last a multiple of 8")
        return cls(
            packed=param.data.view(torch.uint8).reshape(-1),
            absmax=state.absmax,
            code=state.code,
            shape=(state.shape[0], state.shape[1]),
            dtype=state.dtype,
            nested_absmax=None if nested is None else nested.absmax,
            nested_code=None if nested is None else nested.code,
            offset=None if nested is None else state.offset,
        )

    def block_absmax(self) -> torch.Tensor:
        """Return the largest |w| of every block of 64, float32."""
        if self.nested_absmax is None or self.nested_code is None or self.offset is None:
            return self.absmax
        scale = self.nested_absmax.repeat_interleave(256)[: self.absmax.numel()]
        return self.nested_code[self.absmax.int()] * scale + self.offset


def dequantize_nf4_reference(
    w: NF4Weight,
    *,
    out: torch.Tensor | None = None,
    lora_a: torch.Tensor | None = None,
    lora_b: torch.Tensor | None = None,
    lora_scale: float = 1.0,
    lora_column: int = 0,
) -> torch.Tensor:
    """Compute `dequantize_nf4` in plain torch; same arguments."""
    N, K = w.shape
    out = _output(w, out, lora_a, lora_b, lora_column)
    nibbles = torch.stack([w.packed >> 4, w.packed & 15], dim=-1).view(-1)
    absmax = w.block_absmax().repeat_interleave(64)[: N * K]  # The last block may be short.
    out[:N, :K] = (w.code[nibbles.int()] * absmax).view(N, K).to(out.dtype)
    if lora_b is not None:
        out[:, K:] = 0
        scaled = lora_b.float() * lora_scale
        out[:, K + lora_column : K + lora_column + lora_b.shape[1]] = scaled.to(out.dtype)
    if lora_a is not None:
        out[N : N + lora_a.shape[0]] = lora_a.to(out.dtype)
        out[N + lora_a.shape[0] :] = 0
    return out


def _output(
    w: NF4Weight,
    out: torch.Tensor | None,
    lora_a: torch.Tensor | None,
    lora_b: torch.Tensor | None,
    lora_column: int,
) -> torch.Tensor:
    """Check `out`, or allocate it with a pad of a multiple of 64, which cuBLAS needs for speed."""
    N, K = w.shape
    if lora_a is not None and lora_b is not None:
        raise ValueError("lora_a adds rows and lora_b adds columns: pass one of them")
    num_rows = 0 if lora_a is None else lora_a.shape[0]
    num_cols = 0 if lora_b is None else lora_column + lora_b.shape[1]
    if out is None:
        shape = (N + -(-num_rows // 64) * 64, K + -(-num_cols // 64) * 64)
        return torch.empty(shape, dtype=w.dtype, device=w.packed.device)
    exact_rows, exact_cols = lora_a is None, lora_b is None
    if (
        out.shape[0] < N + num_rows
        or (exact_rows and out.shape[0] != N)
        or out.shape[1] < K + num_cols
        or (exact_cols and out.shape[1] != K)
    ):
        raise ValueError(
            f"out is {tuple(out.shape)}: the weight {w.shape} needs {num_rows} more rows and "
            f"{num_cols} more columns for LoRA, and no pad on a side without it"
        )
    return out


def dequantize_nf4(
    w: NF4Weight,
    *,
    out: torch.Tensor | None = None,
    lora_a: torch.Tensor | None = None,
    lora_b: torch.Tensor | None = None,
    lora_scale: float = 1.0,
    lora_column: int = 0,
) -> torch.Tensor:
    """Return the weight [N, K], followed by columns of lora_scale * B or rows of A if given.

    Args:
        w: The quantised weight.
        out: Where the result is written, with unit stride along K. The rows or columns beyond
            [N, K] (the pad) are filled with A or B, and the rest of the pad with zeros.
        lora_a: [R, K], any float dtype; written to rows N to N + R of the output.
        lora_b: [N, R], any float dtype; written to the output from column K + lora_column on.
        lora_scale: Multiplies lora_b in float32.
        lora_column: First column of B in the pad. With a different column for each of several
            stacked weights, their B matrices form a block diagonal.
    """
    if not use_kernel(w.code):
        return dequantize_nf4_reference(
            w, out=out, lora_a=lora_a, lora_b=lora_b, lora_scale=lora_scale, lora_column=lora_column
        )
    N, K = w.shape
    out = _output(w, out, lora_a, lora_b, lora_column)
    num_words = N * K // 8
    # First row and column of the pad, its size, the size of A or B, first column of B in the pad.
    if lora_b is not None:
        side, place = lora_b, (0, K, N, out.shape[1] - K, *lora_b.shape, lora_column)
    elif lora_a is not None:
        side, place = lora_a, (N, 0, out.shape[0] - N, K, *lora_a.shape, 0)
    else:
        side, place = w.code.view(1, -1), (0, 0, 0, 0, 0, 0, 0)
    tiles = triton.cdiv(place[2], _SIDE_ROWS) * triton.cdiv(place[3], _SIDE_COLS)
    nested = w.nested_absmax is not None
    _fwd_kernel[(triton.cdiv(num_words, _BLOCK_WORDS) + tiles,)](
        w.packed.view(torch.int32), w.absmax, w.code,
        w.nested_absmax if nested else w.absmax, w.nested_code if nested else w.code,
        w.offset if nested else w.code, out, side,
        num_words, out.stride(0), side.stride(0), side.stride(1),
        lora_scale if lora_b is not None else 1.0, *place,
        K=K, NESTED=nested, BLOCK=_BLOCK_WORDS, SIDE_ROWS=_SIDE_ROWS, SIDE_COLS=_SIDE_COLS,
        num_warps=_NUM_WARPS, enable_fp_fusion=False,
    )  # fmt: skip
    return out
