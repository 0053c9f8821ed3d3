"""The second half of a decoder layer: y = x2 + down(act(gate(n2)) * up(n2)), n2 = norm(x2).

Forward and backward are written by hand and run over chunks of tokens, because their temporaries
(three times 2 F numbers per token) set the memory peak of a step with lean layers. The chunks of
inference are larger (limits.py). layer.py says what is stored between forward and backward.

Shapes: T tokens, n tokens per chunk, C hidden size, F intermediate size; see lora.py for K and P.
"""

from __future__ import annotations

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
from tuneline.kernels.decoder.operands import augmented_input, group_operands
from tuneline.kernels.limits import (
    INFERENCE_MLP_CHUNK_TOKENS,
    KEPT_MLP_CHUNK_TOKENS,
    MLP_CHUNK_TOKENS,
)
from tuneline.kernels.ops.activation_lora import activation_lora_backward
from tuneline.kernels.ops.flatten import Scaled
from tuneline.kernels.ops.gated_activation import gated_activation_forward
from tuneline.kernels.ops.lora import LoraGradients, mm_wide
from tuneline.kernels.ops.rms_norm import rms_norm_backward


def _chunks(
    num_tokens: int, kept: bool, narrow: bool = False, inference: bool = False
) -> list[slice]:
    """Split the tokens evenly into the fewest chunks that the limit allows."""
    limit = KEPT_MLP_CHUNK_TOKENS if kept else MLP_CHUNK_TOKENS
    if inference:
        limit = INFERENCE_MLP_CHUNK_TOKENS
    num_chunks = -(-num_tokens // (limit // 2 if narrow else limit))
    size = -(-num_tokens // num_chunks)
    return [slice(start, min(start + size, num_tokens)) for start in range(0, num_tokens, size)]


def mlp_forward(
    x2_TC: Tensor,
    weights: LayerWeights,
    keep: bool,
    *,
    keep_normed: bool,
    overwrite: bool,
    narrow: bool = False,
    inference: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None, Normed | None]:
    """Compute y from x2.

    Args:
        x2_TC: Output of the first half.
        weights: The layer's weights and adapters.
        keep: Return gate and up.
        keep_normed: Return n2 and the rstd of x2.
        overwrite: Write y over x2. This is ignored in a layer with a norm after down_proj, which
            needs all of x2 until the end.
        narrow: Use chunks of half the size.
        inference: Use the chunks of inference.

    Returns:
        y [T, C]; gate and up [T, 2 F] or None; h A_down^T [T, P]; the output of down_proj [T, C] if
        a norm follows down_proj, else None; n2 and the rstd of x2, or None.
    """
    num_tokens, (gate_up, down) = x2_TC.shape[0], weights.dense_mlp()
    sandwich = weights.after_mlp_norm is not None
    in_place = overwrite and not sandwich
    y_TC = x2_TC if in_place else torch.empty_like(x2_TC)
    gate_up_TF = x2_TC.new_empty(num_tokens, gate_up.num_out) if keep else None
    down_input_TP = x2_TC.new_empty(num_tokens, down.num_columns)
    normed_TKP = augmented_input(num_tokens, gate_up, x2_TC) if keep_normed else None
    rstds = []
    gate_up_operands, down_operands = group_operands(gate_up, x2_TC), group_operands(down, x2_TC)
    for rows in _chunks(num_tokens, keep, narrow, inference):
        x_TKP = None if normed_TKP is None else normed_TKP[rows]
        copy_nC: Tensor | None = None
        if not in_place and not sandwich:
            copy_nC = residual_copy(x2_TC[rows], down, y_TC[rows])
        x_TKP, rstd_n = normed_input(
            x2_TC[rows], weights.mlp_norm, weights, gate_up, gate_up_operands, x_TKP,
            copy_TC=copy_nC,
        )  # fmt: skip
        rstds.append(rstd_n)
        out = None if gate_up_TF is None else gate_up_TF[rows]
        gate_up_nF = gate_up_operands.forward(x_TKP, out=out)
        h_TKP = augmented_input(x_TKP.shape[0], down, x2_TC)
        gated_activation_forward(gate_up_nF, weights.activation, out=h_TKP[:, : down.num_in])
        del gate_up_nF, out
        down_operands.write_lora_columns(h_TKP)
        down_input_TP[rows] = h_TKP[:, down.num_in :]
        residual_nC = x2_TC[rows] if copy_nC is None else copy_nC
        down_operands.forward(
            h_TKP,
            residual_TN=None if sandwich else residual_nC,
            scale=weights.branch_scale,
            out=y_TC[rows],
        )
    rstd_T = rstds[0] if len(rstds) == 1 else torch.cat(rstds)
    normed = None if normed_TKP is None else (normed_TKP, rstd_T)
    if weights.after_mlp_norm is None:
        return y_TC, gate_up_TF, down_input_TP, None, normed
    sum_TC = add_normed(x2_TC, y_TC, weights.after_mlp_norm, weights)
    return sum_TC, gate_up_TF, down_input_TP, y_TC, normed


def mlp_backward(
    dy_TC: Tensor,
    dy_TCP: Tensor | None,
    x2_TC: Tensor,
    gate_up_TF: Tensor | None,
    down_input_TP: Tensor,
    d_TC: Tensor | None,
    normed: Normed | None,
    weights: LayerWeights,
) -> tuple[Tensor, list[Scaled]]:
    """Return dx2, and the gradients of gate_up's and down's adapters.

    The rows of dx2 end with P uninitialised columns, in which `attention_half_backward` can store G
    of o_proj.

    Args:
        dy_TC: Gradient of the layer's output.
        dy_TCP: The rows of dy_TC followed by P columns for G of down_proj, or None.
        x2_TC: Output of the first half.
        gate_up_TF: Gate and up [T, 2 F]; recomputed if None.
        down_input_TP: h A_down^T of the forward.
        d_TC: Output of down_proj if a norm follows down_proj, else None.
        normed: n2 and the rstd of x2; recomputed if None.
        weights: The layer's weights and adapters.
    """
    gate_up, down = weights.dense_mlp()
    num_tokens, num_hidden = x2_TC.shape
    kept = gate_up_TF is not None
    dd_TC = dy_TC
    if weights.after_mlp_norm is not None:
        assert d_TC is not None
        dd_TC, dy_TCP = normed_gradient(dy_TC, d_TC, weights.after_mlp_norm, weights), None
    if weights.branch_scale != 1:
        dd_TC, dy_TCP = dd_TC * weights.branch_scale, None
    gate_up_operands = group_operands(gate_up, x2_TC, packs=False)
    down_operands = group_operands(down, x2_TC, packs=False)
    gate_up_grads, down_grads = LoraGradients(gate_up), LoraGradients(down)
    dx2_TCP = x2_TC.new_empty(num_tokens, num_hidden + weights.o.num_columns)
    for rows in _chunks(num_tokens, kept):
        x2_nC, dd_nC = x2_TC[rows], dd_TC[rows]
        x_TKP, rstd_n = (
            normed_input(x2_nC, weights.mlp_norm, weights, gate_up, gate_up_operands)
            if normed is None
            else (normed[0][rows], normed[1][rows])
        )
        gate_up_nF = gate_up_operands.forward(x_TKP) if gate_up_TF is None else gate_up_TF[rows]
        room_nCP = None if dy_TCP is None else dy_TCP[rows]
        dh_nF, g_TP = down_operands.input_gradient(dd_nC, room_nCP)
        num_in = gate_up.num_in
        # One pass over dh, gate and up gives the gradients of gate and up, of down's A and of
        # gate_up's B.
        along = activation_lora_backward(
            dh_nF,
            gate_up_nF,
            weights.activation,
            down=down,
            gate_up=gate_up,
            g_TP=g_TP,
            xa_TP=x_TKP[:, num_in:],
            inplace=not kept,
        )
        del gate_up_nF, dh_nF
        if along.da_down is not None:
            down_grads.add_a(along.da_down)
            down_grads.add_b(down.blocks(mm_wide(dd_nC.t(), down_input_TP[rows])))
        dn_nC, g_TP = gate_up_operands.input_gradient(along.d_gate_up)
        if g_TP is not None and along.db_gate_up is not None:
            gate_up_grads.add_a(mm_wide(g_TP.t(), x_TKP[:, :num_in]))
            gate_up_grads.add_b(along.db_gate_up)
        del along
        rms_norm_backward(
            dn_nC,
            x2_nC,
            weights.mlp_norm,
            rstd_n,
            gemma=weights.gemma,
            dresidual=dy_TC[rows],
            out=dx2_TCP[rows, :num_hidden],
        )
    return dx2_TCP, [*gate_up_grads.split(), *down_grads.split()]
