"""The first half of a decoder layer: x2 = x + o_proj(attention(rope(qkv(norm(x))))).

Forward and backward are written by hand; layer.py says what is stored between them.

Shapes: B rows of L tokens, T = B L, S selected tokens, C hidden size, N outputs of a group; see
lora.py for K and P.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tuneline.kernels.decoder.layer_weights import (
    LayerWeights,
    Normed,
    add_normed,
    normed_gradient,
    normed_input,
    residual_copy,
)
from tuneline.kernels.decoder.operands import (
    Operands,
    augmented_input,
    group_operands,
)
from tuneline.kernels.ops.attention import (
    AttentionConfig,
    AttentionPlan,
    attention_backward,
    attention_forward,
)
from tuneline.kernels.ops.flatten import Scaled
from tuneline.kernels.ops.lora import LoraGradients, LoraGroup
from tuneline.kernels.ops.rms_norm import rms_norm_backward
from tuneline.kernels.ops.rope import rope_backward, rope_forward


@dataclass(frozen=True, slots=True)
class Saved:
    """Which intermediates the attention half saves in addition to x.

    The backward recomputes the others.
    """

    qkv: bool = False
    """Whether to store q, k and v: after the rotation, or in families with head norms, before the
    head norm."""
    output: bool = False
    """Whether to store the output and the log-sum-exp of the attention."""
    branch: bool = False
    """Whether to store x2, or in families with a norm after o_proj, the output of o_proj."""


@dataclass(slots=True)
class AttentionHalf:
    """Intermediates between x and x2; `Saved` says which of the first four are stored."""

    qkv_TN: Tensor | None = None
    o_input_TKP: Tensor | None = None
    branch_TC: Tensor | None = None
    attention_saved: tuple[Tensor, ...] = ()
    normed: Normed | None = None
    q_BLHD: Tensor | None = None
    k_BLGD: Tensor | None = None
    o_operands: Operands | None = None


def split_heads(
    qkv_TN: Tensor, shape: torch.Size, config: AttentionConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """Return views of [T, N]: q [B, L, H, D], k and v [B, L, G, D]."""
    heads_BLND = qkv_TN.view(shape[0], shape[1], -1, config.head_dim)
    sizes = [config.num_heads, config.num_kv_heads, config.num_kv_heads]
    q, k, v = heads_BLND.split(sizes, 2)
    return q, k, v


def complete(
    half: AttentionHalf,
    x_TC: Tensor,
    shape: torch.Size,
    cos: Tensor,
    sin: Tensor,
    weights: LayerWeights,
    plan: AttentionPlan,
    *,
    selected_S: Tensor | None = None,
    overwrite: bool = False,
) -> Tensor:
    """Compute the intermediates that `half` lacks, and return x2.

    Args:
        half: The stored intermediates; the others are None or empty, and are filled in.
        x_TC: Input of the layer.
        shape: Shape of the input, (B, L, C).
        cos: Rope table [B or 1, L, R].
        sin: Rope table [B or 1, L, R].
        weights: The layer's weights and adapters.
        plan: The sequences of this forward.
        selected_S: Indices of the tokens whose x2 is returned; None: all tokens.
        overwrite: Write x2 over x. This is ignored in a layer with a norm after o_proj.
    """
    rotated = half.qkv_TN is not None and weights.q_norm is None
    group, norm = weights.o, weights.after_attention_norm
    copy_TC: Tensor | None = None
    if half.qkv_TN is None:
        if half.branch_TC is None and norm is None and selected_S is None and not overwrite:
            copy_TC = residual_copy(x_TC, group)
        operands = group_operands(weights.qkv, x_TC)
        half.normed = normed_input(
            x_TC, weights.attention_norm, weights, weights.qkv, operands, copy_TC=copy_TC
        )
        half.qkv_TN = operands.forward(half.normed[0])
        del operands
    q, k, v = split_heads(half.qkv_TN, shape, weights.attention)
    if weights.rotates and not rotated:
        q, k = rope_forward(
            q,
            k,
            cos,
            sin,
            q_weight=weights.q_norm,
            k_weight=weights.k_norm,
            eps=weights.eps,
            gemma=weights.gemma,
            out=(q, k) if weights.q_norm is None else None,
        )
    half.q_BLHD, half.k_BLGD = q, k
    if half.o_input_TKP is None:
        half.o_input_TKP = augmented_input(x_TC.shape[0], group, x_TC)
        a_BLHD = _heads(half.o_input_TKP, group, q.shape)
        half.attention_saved = attention_forward(q, k, v, plan, weights.attention, out=a_BLHD)
        if selected_S is not None:
            half.o_input_TKP = half.o_input_TKP.index_select(0, selected_S)
            x_TC = x_TC.index_select(0, selected_S)
            overwrite = True
        half.o_operands = group_operands(group, x_TC)
        half.o_operands.write_lora_columns(half.o_input_TKP)
    if half.branch_TC is None:
        if half.o_operands is None:
            half.o_operands = group_operands(group, x_TC)
        if overwrite and norm is None:
            copy_TC = x_TC
        residual_TC = x_TC if copy_TC is None else copy_TC
        half.branch_TC = half.o_operands.forward(
            half.o_input_TKP,
            residual_TN=residual_TC if norm is None else None,
            scale=weights.branch_scale,
            out=copy_TC,
        )
    return half.branch_TC if norm is None else add_normed(x_TC, half.branch_TC, norm, weights)


def _heads(o_input_TKP: Tensor, group: LoraGroup, shape: torch.Size) -> Tensor:
    """Return the attention's output as a view [B, L, H, D] of o_proj's input."""
    return o_input_TKP[:, : group.num_in].unflatten(0, shape[:2]).view(shape)


def attention_half_backward(
    dx2_TCP: Tensor,
    x_TC: Tensor,
    half: AttentionHalf,
    cos: Tensor,
    sin: Tensor,
    weights: LayerWeights,
    plan: AttentionPlan,
    *,
    need_dx: bool,
) -> tuple[Tensor | None, list[Scaled], list[Scaled]]:
    """Return dx, and the gradients of qkv's and o's adapters.

    The rows of dx end with P uninitialised columns, in which the `mlp_backward` of the preceding
    layer can store G of down_proj.

    Args:
        dx2_TCP: Gradient of x2, followed by P columns for G of o_proj.
        x_TC: Input of the layer.
        half: The intermediates, completed by `complete`.
        cos: Rope table [B or 1, L, R].
        sin: Rope table [B or 1, L, R].
        weights: The layer's weights and adapters.
        plan: The sequences of this forward.
        need_dx: Compute dx; if False, None is returned instead.
    """
    q_BLHD, k_BLGD, o_input_TKP = half.q_BLHD, half.k_BLGD, half.o_input_TKP
    assert q_BLHD is not None and k_BLGD is not None
    assert o_input_TKP is not None and half.qkv_TN is not None
    shape, config, group = q_BLHD.shape, weights.attention, weights.o
    dx2_TC = dx2_TCP[:, : group.num_out]
    do_TCP: Tensor | None = dx2_TCP
    do_TC = dx2_TC
    if weights.after_attention_norm is not None:
        assert half.branch_TC is not None
        do_TCP = None
        do_TC = normed_gradient(dx2_TC, half.branch_TC, weights.after_attention_norm, weights)
    if weights.branch_scale != 1:
        do_TC, do_TCP = do_TC * weights.branch_scale, None
    operands = half.o_operands or group_operands(group, x_TC, packs=False)
    half.o_operands = None
    da_TK, g_TP = operands.input_gradient(do_TC, do_TCP)
    del operands
    o_grads = LoraGradients(group)
    o_grads.add(do_TC, g_TP, o_input_TKP[:, : group.num_in], o_input_TKP[:, group.num_in :])
    q_in, k_in, v = split_heads(half.qkv_TN, shape, config)
    dqkv_TN = torch.empty_like(half.qkv_TN)
    dq_out, dk_out, dv_out = split_heads(dqkv_TN, shape, config)
    dq, dk = attention_backward(
        da_TK.view(shape),
        q_BLHD,
        k_BLGD,
        v,
        _heads(o_input_TKP, group, shape),
        half.attention_saved,
        plan,
        config,
        out=(dq_out, dk_out, dv_out),
    )
    if weights.rotates:
        rope_backward(
            dq,
            dk,
            cos,
            sin,
            q=q_in,
            k=k_in,
            q_weight=weights.q_norm,
            k_weight=weights.k_norm,
            eps=weights.eps,
            gemma=weights.gemma,
            out=(dq_out, dk_out),
        )
    else:
        dq_out.copy_(dq)
        dk_out.copy_(dk)
    del dq, dk
    operands = group_operands(weights.qkv, x_TC, packs=False)
    if half.normed is None:
        half.normed = normed_input(x_TC, weights.attention_norm, weights, weights.qkv, operands)
    x_TKP, rstd_T = half.normed
    dn_TC: Tensor | None = None
    if need_dx:
        dn_TC, g_TP = operands.input_gradient(dqkv_TN)
    else:
        g_TP = operands.lora_gradient(dqkv_TN)
    num_in = weights.qkv.num_in
    qkv_grads = LoraGradients(weights.qkv)
    qkv_grads.add(dqkv_TN, g_TP, x_TKP[:, :num_in], x_TKP[:, num_in:])
    if dn_TC is None:
        return None, qkv_grads.split(), o_grads.split()
    dx_TCP = x_TC.new_empty(x_TC.shape[0], num_in + weights.mlp_columns)
    rms_norm_backward(
        dn_TC,
        x_TC,
        weights.attention_norm,
        rstd_T,
        gemma=weights.gemma,
        dresidual=dx2_TC,
        out=dx_TCP[:, :num_in],
    )
    return dx_TCP, qkv_grads.split(), o_grads.split()
