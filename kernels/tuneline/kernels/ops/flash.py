"""Flash attention for packed rows, windows and softcaps (no library has a backward with softcap).

    s_ij = scale q_i . k_j;  c_ij = cap tanh(s_ij / cap) with a softcap, else s_ij
    p_ij = exp(c_ij - lse_i) over j <= i, i - j < window, j in i's sequence;  o_i = sum_j p_ij v_j

    delta_i = do_i . o_i
    dc_ij = p_ij (do_i . v_j - delta_i);  ds_ij = dc_ij (1 - (c_ij / cap)^2)
    dq_i = scale sum_j ds_ij k_j;  dk_j = scale sum_i ds_ij q_i;  dv_j = sum_i p_ij do_i

Scores are never written to GPU memory. The rows of a tile are a few queries in each of PACK query
heads that share one key head, so all rows read the same keys. Such a tile spans fewer positions
than a tile of one head, so more tiles lie completely above the causal diagonal and are skipped.
This matters for short sequences (1.5 times fewer tiles for 217 tokens and 4 query heads per key
head). One program computes a block of queries (forward, dq) or a block of keys (dk and dv, summed
over all query heads that share the key head). Nothing is added atomically, so the same inputs give
the same bits. Blocks that the mask hides completely are skipped. The reference is in attention.py.

Shapes: T tokens of all sequences, laid end to end; q, o [T, H, D]; k, v [T, G, D] with H / G query
heads per key head; cu_seqlens [S + 1] int32; lse, delta [H, T] float32.
"""

# Triton's types declare neither a launch's options nor plain values for constexpr parameters.
# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
import triton
import triton.language as tl
from torch import Tensor

_LOG2E = tl.constexpr(1.4426950408889634)
_HIDDEN = tl.constexpr(-1e30)
_MIN_QUERIES = 16
"""Minimum number of queries per tile. With fewer, keys would be read more often without a gain."""


@dataclass(frozen=True, slots=True)
class Blocks:
    """Tile size in rows (heads times queries) and keys; warps and pipeline stages of a program."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int


# The fastest of 14 tile shapes on an H100 (benchmarks/attention.py --sweep) for heads of 128 and
# packed rows with GSM8K's lengths, with one exception: a forward with tiles of 128 x 32 takes 6 %
# less time on an H100, but spills registers on Ampere. For heads over 128, Hopper's tiles need 192
# KiB of shared memory. The tiles of all other GPUs need 96 KiB, because L4, A10 and L40S have 99
# KiB; they were compiled for these GPUs, where they spill no register, but not measured.
def _forward_blocks(head_dim: int, is_hopper: bool) -> Blocks:
    if head_dim <= 128:
        return Blocks(64, 32, 4, 2)
    return Blocks(128, 64, 8, 2) if is_hopper else Blocks(64, 64, 8, 1)


def _dq_blocks(head_dim: int, is_hopper: bool) -> Blocks:
    if head_dim <= 128:
        return Blocks(64, 32, 4, 2)
    return Blocks(128, 64, 8, 1) if is_hopper else Blocks(64, 32, 8, 1)


def _dkdv_blocks(head_dim: int, is_hopper: bool) -> Blocks:
    if head_dim <= 128:
        return Blocks(32, 64, 4, 2)
    return Blocks(64, 64, 8, 2) if is_hopper else Blocks(32, 32, 8, 2)


def _is_hopper(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.get_device_capability(tensor.device) == (9, 0)


@triton.jit
def _cap_scores(s, cap, CAPPED: tl.constexpr):
    """Return the capped scores c and dc/ds."""
    if CAPPED:
        # t = tanh(s / cap), as tanh(x) = 1 - 2 / (exp(2 x) + 1), which is exact at both infinities.
        t = 1.0 - 2.0 / (tl.exp2(s * (2.0 * _LOG2E / cap)) + 1.0)
        c = cap * t
        slope = 1.0 - t * t
    else:
        c = s
        slope = tl.full(s.shape, 1.0, tl.float32)
    return c, slope


@triton.jit
def _visible(query, key, length, WINDOW: tl.constexpr):
    seen = (key <= query) & (key < length) & (query < length)
    if WINDOW > 0:
        seen = seen & (query - key < WINDOW)
    return seen


@triton.jit
def _fwd_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, cu_seqlens_ptr, T, scale, cap,
    q_stride, q_head, k_stride, k_head, v_stride, v_head, o_stride, o_head,
    D: tl.constexpr, WIDTH: tl.constexpr, SHARED: tl.constexpr, WINDOW: tl.constexpr,
    CAPPED: tl.constexpr, PACK: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    sequence, head = tl.program_id(2), tl.program_id(1) * PACK
    kv_head = head // SHARED
    begin = tl.load(cu_seqlens_ptr + sequence)
    length = tl.load(cu_seqlens_ptr + sequence + 1) - begin
    # The blocks with the most keys start first, so that blocks with few keys fill the last wave.
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * (ROWS // PACK)
    if first >= length:
        return
    head += tl.arange(0, ROWS) // (ROWS // PACK)
    query, col = first + tl.arange(0, ROWS) % (ROWS // PACK), tl.arange(0, WIDTH)
    in_head = (col < D)[None, :]
    rows = (begin + query).to(tl.int64)[:, None]
    inside = (query < length)[:, None] & in_head
    q_rows = rows * q_stride + head[:, None] * q_head
    q = tl.load(q_ptr + q_rows + col[None, :], inside, 0.0)
    k_base = k_ptr + begin.to(tl.int64) * k_stride + kv_head * k_head
    v_base = v_ptr + begin.to(tl.int64) * v_stride + kv_head * v_head
    top = tl.full([ROWS], _HIDDEN, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    o = tl.zeros([ROWS, WIDTH], tl.float32)
    lowest = 0
    if WINDOW > 0:
        lowest = tl.maximum(first - WINDOW + 1, 0) // KEYS * KEYS
    for start in range(lowest, tl.minimum(first + ROWS // PACK, length), KEYS):
        key = start + tl.arange(0, KEYS)
        there = (key < length)[:, None] & in_head
        k = tl.load(k_base + key.to(tl.int64)[:, None] * k_stride + col[None, :], there, 0.0)
        v = tl.load(v_base + key.to(tl.int64)[:, None] * v_stride + col[None, :], there, 0.0)
        c, _ = _cap_scores(tl.dot(q, tl.trans(k), input_precision="ieee") * scale, cap, CAPPED)
        seen = _visible(query[:, None], key[None, :], length, WINDOW)
        c = tl.where(seen, c * _LOG2E, _HIDDEN)
        new_top = tl.maximum(top, tl.max(c, 1))
        p = tl.where(seen, tl.exp2(c - new_top[:, None]), 0.0)
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(p, 1)
        o = tl.dot(p.to(v.dtype), v, o * shrink[:, None], input_precision="ieee")
        top = new_top
    total = tl.where(query < length, total, 1.0)
    o = o / total[:, None]
    out = o_ptr + rows * o_stride + head[:, None] * o_head + col[None, :]
    tl.store(out, o.to(o_ptr.dtype.element_ty), inside)
    # lse is in base 2, because the backward uses exp2.
    tl.store(lse_ptr + head * T + begin + query, top + tl.log2(total), query < length)


@triton.jit
def _dq_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, do_ptr, dq_ptr, lse_ptr, delta_ptr, cu_seqlens_ptr, T, scale, cap,
    q_stride, q_head, k_stride, k_head, v_stride, v_head, o_stride, o_head,
    do_stride, do_head, dq_stride, dq_head,
    D: tl.constexpr, WIDTH: tl.constexpr, SHARED: tl.constexpr, WINDOW: tl.constexpr,
    CAPPED: tl.constexpr, PACK: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Compute dq, and delta for `_dkdv_kernel`, which runs next."""
    sequence, head = tl.program_id(2), tl.program_id(1) * PACK
    kv_head = head // SHARED
    begin = tl.load(cu_seqlens_ptr + sequence)
    length = tl.load(cu_seqlens_ptr + sequence + 1) - begin
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * (ROWS // PACK)
    if first >= length:
        return
    head += tl.arange(0, ROWS) // (ROWS // PACK)
    query, col = first + tl.arange(0, ROWS) % (ROWS // PACK), tl.arange(0, WIDTH)
    in_head = (col < D)[None, :]
    rows = (begin + query).to(tl.int64)[:, None]
    inside = (query < length)[:, None] & in_head
    heads = head[:, None]
    do = tl.load(do_ptr + rows * do_stride + heads * do_head + col[None, :], inside, 0.0)
    o = tl.load(o_ptr + rows * o_stride + heads * o_head + col[None, :], inside, 0.0)
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    tl.store(delta_ptr + head * T + begin + query, delta, query < length)
    q = tl.load(q_ptr + rows * q_stride + heads * q_head + col[None, :], inside, 0.0)
    lse = tl.load(lse_ptr + head * T + begin + query, query < length, 0.0)
    k_base = k_ptr + begin.to(tl.int64) * k_stride + kv_head * k_head
    v_base = v_ptr + begin.to(tl.int64) * v_stride + kv_head * v_head
    dq = tl.zeros([ROWS, WIDTH], tl.float32)
    lowest = 0
    if WINDOW > 0:
        lowest = tl.maximum(first - WINDOW + 1, 0) // KEYS * KEYS
    for start in range(lowest, tl.minimum(first + ROWS // PACK, length), KEYS):
        key = start + tl.arange(0, KEYS)
        there = (key < length)[:, None] & in_head
        k = tl.load(k_base + key.to(tl.int64)[:, None] * k_stride + col[None, :], there, 0.0)
        v = tl.load(v_base + key.to(tl.int64)[:, None] * v_stride + col[None, :], there, 0.0)
        c, slope = _cap_scores(tl.dot(q, tl.trans(k), input_precision="ieee") * scale, cap, CAPPED)
        seen = _visible(query[:, None], key[None, :], length, WINDOW)
        p = tl.where(seen, tl.exp2(c * _LOG2E - lse[:, None]), 0.0)
        dp = tl.dot(do, tl.trans(v), input_precision="ieee")
        ds = p * (dp - delta[:, None]) * slope
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    out = dq_ptr + rows * dq_stride + heads * dq_head + col[None, :]
    tl.store(out, (dq * scale).to(dq_ptr.dtype.element_ty), inside)


@triton.jit
def _dkdv_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, dk_ptr, dv_ptr, lse_ptr, delta_ptr, cu_seqlens_ptr, T, scale, cap,
    q_stride, q_head, k_stride, k_head, v_stride, v_head,
    do_stride, do_head, dk_stride, dk_head, dv_stride, dv_head,
    D: tl.constexpr, WIDTH: tl.constexpr, SHARED: tl.constexpr, WINDOW: tl.constexpr,
    CAPPED: tl.constexpr, PACK: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Compute dk and dv; scores are transposed (keys first), because both sums run over queries."""
    sequence, kv_head = tl.program_id(2), tl.program_id(1)
    begin = tl.load(cu_seqlens_ptr + sequence)
    length = tl.load(cu_seqlens_ptr + sequence + 1) - begin
    first = tl.program_id(0) * KEYS
    if first >= length:
        return
    key, col = first + tl.arange(0, KEYS), tl.arange(0, WIDTH)
    in_head = (col < D)[None, :]
    rows = (begin + key).to(tl.int64)[:, None]
    inside = (key < length)[:, None] & in_head
    k = tl.load(k_ptr + rows * k_stride + kv_head * k_head + col[None, :], inside, 0.0)
    v = tl.load(v_ptr + rows * v_stride + kv_head * v_head + col[None, :], inside, 0.0)
    dk = tl.zeros([KEYS, WIDTH], tl.float32)
    dv = tl.zeros([KEYS, WIDTH], tl.float32)
    end = length
    if WINDOW > 0:
        end = tl.minimum(length, first + KEYS + WINDOW - 1)
    row = tl.arange(0, ROWS)
    for shared in range(SHARED // PACK):
        head = kv_head * SHARED + shared * PACK + row // (ROWS // PACK)
        q_base = q_ptr + begin.to(tl.int64) * q_stride + head[:, None] * q_head
        do_base = do_ptr + begin.to(tl.int64) * do_stride + head[:, None] * do_head
        for start in range(first // (ROWS // PACK) * (ROWS // PACK), end, ROWS // PACK):
            query = start + row % (ROWS // PACK)
            there = (query < length)[:, None] & in_head
            wide = query.to(tl.int64)[:, None]
            q = tl.load(q_base + wide * q_stride + col[None, :], there, 0.0)
            do = tl.load(do_base + wide * do_stride + col[None, :], there, 0.0)
            lse = tl.load(lse_ptr + head * T + begin + query, query < length, 0.0)
            delta = tl.load(delta_ptr + head * T + begin + query, query < length, 0.0)
            s = tl.dot(k, tl.trans(q), input_precision="ieee") * scale
            c, slope = _cap_scores(s, cap, CAPPED)
            seen = _visible(query[None, :], key[:, None], length, WINDOW)
            p = tl.where(seen, tl.exp2(c * _LOG2E - lse[None, :]), 0.0)
            dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
            dp = tl.dot(v, tl.trans(do), input_precision="ieee")
            ds = p * (dp - delta[None, :]) * slope
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    dk_out = dk_ptr + rows * dk_stride + kv_head * dk_head + col[None, :]
    dv_out = dv_ptr + rows * dv_stride + kv_head * dv_head + col[None, :]
    tl.store(dk_out, (dk * scale).to(dk_ptr.dtype.element_ty), inside)
    tl.store(dv_out, dv.to(dv_ptr.dtype.element_ty), inside)


def _pack(shared: int, blocks: Blocks) -> int:
    """Return the heads per tile: the largest power of two that divides `shared` and fits."""
    return min(shared & -shared, blocks.rows // _MIN_QUERIES)


def _sizes(
    q: Tensor, k: Tensor, window: int | None, softcap: float | None, blocks: Blocks
) -> dict[str, int | bool]:
    head_dim, shared = q.shape[2], q.shape[1] // k.shape[1]
    return {
        "D": head_dim,
        "WIDTH": max(16, cast(int, triton.next_power_of_2(head_dim))),
        "SHARED": shared,
        "PACK": _pack(shared, blocks),
        "WINDOW": window or 0,
        "CAPPED": softcap is not None,
        "ROWS": blocks.rows,
        "KEYS": blocks.keys,
        "num_warps": blocks.num_warps,
        "num_stages": blocks.num_stages,
    }


def _strides(*tensors: Tensor) -> list[int]:
    assert all(t.stride(2) == 1 for t in tensors), "heads must be contiguous"
    return [stride for t in tensors for stride in t.stride()[:2]]


def flash_forward(
    q_THD: Tensor,
    k_TGD: Tensor,
    v_TGD: Tensor,
    cu_seqlens: Tensor,
    longest: int,
    *,
    out: Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Write o into `out` and return lse [H, T] in base 2.

    Args:
        q_THD: Queries. q, k, v and `out` have unit stride along D and any other strides.
        k_TGD: Keys.
        v_TGD: Values.
        cu_seqlens: Bounds of the S sequences, int32 [S + 1].
        longest: Length of the longest sequence, or more.
        out: Where o is written, [T, H, D].
        scale: Factor of the scores.
        window: Number of tokens that a query sees, itself included; None for all.
        softcap: Cap of the scores; None for no cap.
    """
    T, H, D = q_THD.shape
    lse_HT = torch.empty(H, T, dtype=torch.float32, device=q_THD.device)
    blocks = _forward_blocks(D, _is_hopper(q_THD))
    pack = _pack(H // k_TGD.shape[1], blocks)
    grid = (triton.cdiv(longest, blocks.rows // pack), H // pack, cu_seqlens.numel() - 1)
    _fwd_kernel[grid](
        q_THD, k_TGD, v_TGD, out, lse_HT, cu_seqlens, T, scale, softcap or 1.0,
        *_strides(q_THD, k_TGD, v_TGD, out),
        **_sizes(q_THD, k_TGD, window, softcap, blocks),
    )  # fmt: skip
    return lse_HT


def flash_backward(
    do_THD: Tensor,
    q_THD: Tensor,
    k_TGD: Tensor,
    v_TGD: Tensor,
    o_THD: Tensor,
    lse_HT: Tensor,
    cu_seqlens: Tensor,
    longest: int,
    *,
    out: tuple[Tensor, Tensor, Tensor],
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> None:
    """Write dq, dk and dv into `out`.

    Args:
        do_THD: Gradient of o. All tensors [T, ., D] have unit stride along D and any other strides.
        q_THD: Queries.
        k_TGD: Keys.
        v_TGD: Values.
        o_THD: Output of the forward.
        lse_HT: Result of `flash_forward`.
        cu_seqlens: Bounds of the S sequences, int32 [S + 1].
        longest: Length of the longest sequence, or more.
        out: Where dq, dk and dv are written, in the shapes of q, k and v.
        scale: Factor of the scores.
        window: Number of tokens that a query sees, itself included; None for all.
        softcap: Cap of the scores; None for no cap.
    """
    T, H, D = q_THD.shape
    dq, dk, dv = out
    delta_HT = torch.empty_like(lse_HT)
    num_sequences = cu_seqlens.numel() - 1
    blocks = _dq_blocks(D, _is_hopper(q_THD))
    pack = _pack(H // k_TGD.shape[1], blocks)
    _dq_kernel[(triton.cdiv(longest, blocks.rows // pack), H // pack, num_sequences)](
        q_THD, k_TGD, v_TGD, o_THD, do_THD, dq, lse_HT, delta_HT, cu_seqlens,
        T, scale, softcap or 1.0,
        *_strides(q_THD, k_TGD, v_TGD, o_THD, do_THD, dq),
        **_sizes(q_THD, k_TGD, window, softcap, blocks),
    )  # fmt: skip
    blocks = _dkdv_blocks(D, _is_hopper(q_THD))
    _dkdv_kernel[(triton.cdiv(longest, blocks.keys), k_TGD.shape[1], num_sequences)](
        q_THD, k_TGD, v_TGD, do_THD, dk, dv, lse_HT, delta_HT, cu_seqlens,
        T, scale, softcap or 1.0,
        *_strides(q_THD, k_TGD, v_TGD, do_THD, dk, dv),
        **_sizes(q_THD, k_TGD, window, softcap, blocks),
    )  # fmt: skip
