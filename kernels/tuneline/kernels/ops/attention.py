"""Causal attention over dense batches and packed rows, by the fastest backend for each case.

    s_ij = scale q_i . k_j;  s = cap tanh(s / cap) with a softcap
    p_i  = softmax over j <= i, i - j < window, j in i's sequence;  o_i = sum_j p_ij v_j

Backends (ms on an H100, forward / backward; left for 4 rows of 2048 tokens, right for 8192 tokens
packed from rows with GSM8K's lengths; 32 + 8 heads of 128; benchmarks/attention.py):

    cudnn       dense, no window, heads of 64 or 128      0.30 / 0.96     -
                (96 and 256 too on Hopper)
    own         flash.py: packed, a window, or a softcap  0.60 / 1.52     0.13 / 0.39
                (no library's backward has a softcap)
    flash       torch's aten op: heads over 128, packed   0.53 / 1.7      0.30 / 0.78
                or with a window, without a softcap
    reference   CPU, float32, float64

The aten ops are called directly, because the layer's backward is written by hand and torch's public
varlen function has neither GQA nor a window in 2.11. No backend repeats keys for GQA.

Shapes: B batch, T tokens of one row, H query heads, G key/value heads, D head size. Packed rows
have B = 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tuneline.kernels.ops.copy_rows import copy_rows
from tuneline.kernels.ops.flash import flash_backward, flash_forward

CUDNN_HEAD_DIMS = (64, 128)
CUDNN_HOPPER_HEAD_DIMS = (64, 96, 128, 256)
OWN_MAX_HEAD_DIM = 128
"""Widest head for flash.py, except with a softcap. Wider heads fill the registers, so the aten op
is faster than flash.py; but the aten op has no softcap."""


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """The sequences of one forward: the rows of a batch, or sequences packed into one row."""

    sequence_lengths: tuple[int, ...] | None = None
    cu_seqlens: Tensor | None = None

    @classmethod
    def packed(cls, starts: list[int], num_tokens: int, device: torch.device) -> AttentionPlan:
        """Build the plan of one packed row from the index of each sequence's first token."""
        bounds = [*starts, num_tokens]
        cu_seqlens = torch.tensor(bounds, dtype=torch.int32).to(device, non_blocking=True)
        lengths = tuple(b - a for a, b in zip(bounds[:-1], bounds[1:], strict=True))
        return cls(sequence_lengths=lengths, cu_seqlens=cu_seqlens)

    def longest(self, row_length: int) -> int:
        """Return the length of the longest sequence; `row_length` if the rows are not packed."""
        return row_length if self.sequence_lengths is None else max(self.sequence_lengths)


@dataclass(frozen=True, slots=True)
class AttentionConfig:
    """Sizes and options of a layer's attention; `window` includes the query's own token."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    window: int | None = None
    softcap: float | None = None


def attention_forward(
    q_BTHD: Tensor,
    k_BTGD: Tensor,
    v_BTGD: Tensor,
    plan: AttentionPlan,
    config: AttentionConfig,
    *,
    out: Tensor,
) -> tuple[Tensor, ...]:
    """Write the attention's output into `out`; return the tensors that the backward needs.

    Args:
        q_BTHD: Queries.
        k_BTGD: Keys.
        v_BTGD: Values.
        plan: The sequences of this forward.
        config: Sizes and options of the layer's attention.
        out: Where the output is written, [B, T, H, D] with contiguous heads; may be a slice of
            wider rows. The aten ops allocate their own output, which is then copied into `out`.
    """
    backend = _backend(q_BTHD, plan, config)
    if backend == "reference":
        out.copy_(attention_reference(q_BTHD, k_BTGD, v_BTGD, plan, config))
        return ()
    if backend == "cudnn":
        output, lse, _, _, _, _, seed, offset, _ = (
            torch.ops.aten._scaled_dot_product_cudnn_attention.default(
                q_BTHD.transpose(1, 2),
                k_BTGD.transpose(1, 2),
                v_BTGD.transpose(1, 2),
                None,
                True,
                0.0,
                True,
                False,
                scale=config.scale,
            )
        )
        _copy_heads(output.transpose(1, 2), out)
        return lse, seed, offset
    longest = plan.longest(q_BTHD.shape[1])
    if backend == "own":
        q, k, v = (t.flatten(0, 1) for t in (q_BTHD, k_BTGD, v_BTGD))
        cu_seqlens = _cu_seqlens(plan, q_BTHD)
        lse = flash_forward(
            q, k, v, cu_seqlens, longest, out=out.flatten(0, 1),
            scale=config.scale, window=config.window, softcap=config.softcap,
        )  # fmt: skip
        return lse, cu_seqlens
    q, k, v = _varlen(plan, q_BTHD, k_BTGD, v_BTGD)
    output, lse, state, unused, _ = torch.ops.aten._flash_attention_forward.default(
        q,
        k,
        v,
        plan.cu_seqlens,
        plan.cu_seqlens,
        longest,
        longest,
        0.0,
        True,
        False,
        scale=config.scale,
        **_window_arguments(longest, config),
    )
    _copy_heads(output.view(q_BTHD.shape), out)
    return lse, state, unused


def attention_backward(
    dout_BTHD: Tensor,
    q_BTHD: Tensor,
    k_BTGD: Tensor,
    v_BTGD: Tensor,
    out_BTHD: Tensor,
    saved: tuple[Tensor, ...],
    plan: AttentionPlan,
    config: AttentionConfig,
    *,
    out: tuple[Tensor, Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """Write dv into the last tensor of `out`; return dq and dk.

    The returned dq and dk may be the first two tensors of `out` or newly allocated tensors. The
    caller passes them to `rope_backward`, which writes its results into `out`.

    Args:
        dout_BTHD: Gradient of the output.
        q_BTHD: Queries.
        k_BTGD: Keys.
        v_BTGD: Values.
        out_BTHD: Output of the forward.
        saved: The tensors that `attention_forward` returned.
        plan: The sequences of this forward.
        config: Sizes and options of the layer's attention.
        out: Where dv is written, and dq and dk may be written, in the shapes of q, k and v.
    """
    dv_out = out[2]
    backend = _backend(q_BTHD, plan, config)
    if backend == "reference":
        with torch.enable_grad():
            q, k, v = (t.detach().requires_grad_() for t in (q_BTHD, k_BTGD, v_BTGD))
            again = attention_reference(q, k, v, plan, config)
        dq, dk, dv = torch.autograd.grad(again, (q, k, v), dout_BTHD)
        dv_out.copy_(dv)
        return dq, dk
    if backend == "cudnn":
        lse, seed, offset = saved
        length = q_BTHD.shape[1]
        grads = torch.ops.aten._scaled_dot_product_cudnn_attention_backward.default(
            dout_BTHD.transpose(1, 2),
            q_BTHD.transpose(1, 2),
            k_BTGD.transpose(1, 2),
            v_BTGD.transpose(1, 2),
            out_BTHD.transpose(1, 2),
            lse,
            seed,
            offset,
            None,
            None,
            None,
            length,
            length,
            0.0,
            True,
            scale=config.scale,
        )
        dq, dk, dv = (grad.transpose(1, 2) for grad in grads)
        _copy_heads(dv, dv_out)
        return dq, dk
    longest = plan.longest(q_BTHD.shape[1])
    if backend == "own":
        lse, cu_seqlens = saved
        tensors = (dout_BTHD, q_BTHD, k_BTGD, v_BTGD, out_BTHD)
        dout, q, k, v, o = (t.flatten(0, 1) for t in tensors)
        flash_backward(
            dout, q, k, v, o, lse, cu_seqlens, longest,
            out=(out[0].flatten(0, 1), out[1].flatten(0, 1), dv_out.flatten(0, 1)),
            scale=config.scale, window=config.window, softcap=config.softcap,
        )  # fmt: skip
        return out[0], out[1]
    lse, state, unused = saved
    q, k, v, o, dout = _varlen(plan, q_BTHD, k_BTGD, v_BTGD, out_BTHD, dout_BTHD)
    dq, dk, dv = torch.ops.aten._flash_attention_backward.default(
        dout,
        q,
        k,
        v,
        o,
        lse,
        plan.cu_seqlens,
        plan.cu_seqlens,
        longest,
        longest,
        0.0,
        True,
        state,
        unused,
        scale=config.scale,
        **_window_arguments(longest, config),
    )
    _copy_heads(dv.view(v_BTGD.shape), dv_out)
    return dq.view(q_BTHD.shape), dk.view(k_BTGD.shape)


def _copy_heads(heads_BTHD: Tensor, out_BTHD: Tensor) -> None:
    copy_rows(heads_BTHD.flatten(2).flatten(0, 1), out_BTHD.flatten(2).flatten(0, 1))


def attention_reference(
    q_BTHD: Tensor, k_BTGD: Tensor, v_BTGD: Tensor, plan: AttentionPlan, config: AttentionConfig
) -> Tensor:
    """Compute the module's equation in plain torch, one sequence at a time.

    Args:
        q_BTHD: Queries.
        k_BTGD: Keys.
        v_BTGD: Values.
        plan: The sequences of this forward.
        config: Sizes and options of the layer's attention.

    Returns:
        The output [B, T, H, D].
    """
    lengths = plan.sequence_lengths or (q_BTHD.shape[1],)
    sequences = zip(*(t.split(lengths, 1) for t in (q_BTHD, k_BTGD, v_BTGD)), strict=True)
    return torch.cat([_one_sequence(q, k, v, config) for q, k, v in sequences], 1)


def _one_sequence(q: Tensor, k: Tensor, v: Tensor, config: AttentionConfig) -> Tensor:
    length = q.shape[1]
    repeats = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(repeats, 2), v.repeat_interleave(repeats, 2)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * config.scale
    if config.softcap is not None:
        scores = torch.tanh(scores / config.softcap) * config.softcap
    index = torch.arange(length, device=q.device)
    distance = index[:, None] - index[None, :]
    hidden = distance < 0
    if config.window is not None:
        hidden = hidden | (distance >= config.window)
    scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
    wide = torch.promote_types(scores.dtype, torch.float32)
    probabilities = torch.softmax(scores, -1, dtype=wide).to(q.dtype)
    return torch.einsum("bhij,bjhd->bihd", probabilities, v)


def _backend(q_BTHD: Tensor, plan: AttentionPlan, config: AttentionConfig) -> str:
    if not q_BTHD.is_cuda or q_BTHD.element_size() != 2:
        return "reference"
    if config.softcap is not None:
        return "own"
    windowed = config.window is not None and config.window < plan.longest(q_BTHD.shape[1])
    hopper = torch.cuda.get_device_capability(q_BTHD.device) == (9, 0)
    head_dims = CUDNN_HOPPER_HEAD_DIMS if hopper else CUDNN_HEAD_DIMS
    if plan.sequence_lengths is None and not windowed and config.head_dim in head_dims:
        return "cudnn"
    return "own" if config.head_dim <= OWN_MAX_HEAD_DIM else "flash"


def _cu_seqlens(plan: AttentionPlan, q_BTHD: Tensor) -> Tensor:
    """Return the sequences' bounds as token indices; each row of a dense batch is a sequence."""
    if plan.cu_seqlens is not None:
        return plan.cu_seqlens
    batch, length = q_BTHD.shape[:2]
    stop = (batch + 1) * length
    return torch.arange(0, stop, length, dtype=torch.int32, device=q_BTHD.device)


def _varlen(plan: AttentionPlan, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Drop the batch dimension of a packed row: the varlen kernels take [T, H, D]."""
    return tensors if plan.cu_seqlens is None else tuple(t.squeeze(0) for t in tensors)


def _window_arguments(longest: int, config: AttentionConfig) -> dict[str, int]:
    """Return aten's window arguments, or none if the window hides no key.

    aten's window does not count the query's own token.
    """
    if config.window is None or config.window >= longest:
        return {}
    return {"window_size_left": config.window - 1, "window_size_right": 0}
