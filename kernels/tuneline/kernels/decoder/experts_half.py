"""The second half of a decoder layer with routed experts: y = x2 + experts(n2), n2 = norm(x2).

The router is the stock module. Its backward is autograd's, of a second run on n2: a router is
frozen, but its weights and logits depend on n2.

Shapes: T tokens, k experts per token, E experts, C hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tuneline.kernels.decoder.layer_weights import LayerWeights, Normed
from tuneline.kernels.experts.mlp import (
    SavedExperts,
    experts_backward,
    experts_forward,
    tile_rows,
)
from tuneline.kernels.experts.route import Routing, route
from tuneline.kernels.ops.flatten import Scaled
from tuneline.kernels.ops.rms_norm import rms_norm_backward, rms_norm_forward

NUM_SAVED = 8
"""Tensors that `experts_half_forward` returns for the backward."""


def experts_half_forward(
    x2_TC: Tensor, weights: LayerWeights, keep: bool, *, keep_normed: bool, overwrite: bool
) -> tuple[Tensor, tuple[Tensor, ...], list[Tensor | None], Normed | None]:
    """Compute y from x2.

    Args:
        x2_TC: Output of the first half.
        weights: The layer's weights and adapters.
        keep: Whether to store gate and up.
        keep_normed: Return n2 and the rstd of x2.
        overwrite: Write y over x2.

    Returns:
        y [T, C]; logits, weights and indices of the router; NUM_SAVED tensors for the backward; n2
        and the rstd of x2, or None.
    """
    routed = weights.routed
    assert routed is not None
    n2_TC, _, rstd_T = rms_norm_forward(x2_TC, weights.mlp_norm, weights.eps, gemma=weights.gemma)
    logits_TE, weights_Tk, index_Tk = routed.router(n2_TC)
    num_experts = routed.experts.gate_up.num_experts
    block = tile_rows(index_Tk.shape[0], routed.top_k, num_experts)
    routing = route(index_Tk, num_experts, block)
    y_TC, saved = experts_forward(
        n2_TC,
        weights_Tk,
        routing,
        routed.experts,
        keep_gate_up=keep,
        residual_TH=x2_TC,
        out=x2_TC if overwrite else None,
    )
    tensors = [saved.xa_SR, saved.ha_SR, saved.gate_up_SF, *routing.tensors()]
    normed = (n2_TC, rstd_T) if keep_normed else None
    return y_TC, (logits_TE, weights_Tk, index_Tk), tensors, normed


def experts_half_backward(
    dy_TC: Tensor,
    dlogits_TE: Tensor | None,
    x2_TC: Tensor,
    saved: Sequence[Any],
    normed: Normed | None,
    weights: LayerWeights,
) -> tuple[Tensor, list[Scaled]]:
    """Return dx2, and the gradients of the experts' adapters.

    The rows of dx2 end with P uninitialised columns, in which `attention_half_backward` can store G
    of o_proj.

    Args:
        dy_TC: Gradient of the layer's output.
        dlogits_TE: Gradient of the router's logits, or None.
        x2_TC: Output of the first half.
        saved: The tensors that the forward returned.
        normed: n2 and the rstd of x2; recomputed if None.
        weights: The layer's weights and adapters.
    """
    routed = weights.routed
    assert routed is not None
    if normed is None:
        n2_TC, _, rstd_T = rms_norm_forward(
            x2_TC, weights.mlp_norm, weights.eps, gemma=weights.gemma
        )
    else:
        n2_TC, rstd_T = normed
    with torch.enable_grad(), torch.autocast(x2_TC.device.type, enabled=False):
        leaf_TC = n2_TC.detach().requires_grad_()
        logits_TE, weights_Tk, _ = routed.router(leaf_TC)
    num_experts = routed.experts.gate_up.num_experts
    block = tile_rows(weights_Tk.shape[0], routed.top_k, num_experts)
    routing = Routing.of_tensors(saved[3:], block, routed.top_k)
    dn_TC, dw_Tk, grads = experts_backward(
        dy_TC, n2_TC, weights_Tk.detach(), routing, routed.experts, SavedExperts(*saved[:3])
    )
    assert dn_TC is not None
    outputs, gradients = [weights_Tk], [dw_Tk.to(weights_Tk.dtype)]
    if dlogits_TE is not None:
        outputs, gradients = [*outputs, logits_TE], [*gradients, dlogits_TE]
    (drouter_TC,) = torch.autograd.grad(outputs, leaf_TC, gradients)
    dn_TC += drouter_TC
    num_tokens, num_hidden = x2_TC.shape
    dx2_TCP = x2_TC.new_empty(num_tokens, num_hidden + weights.o.num_columns)
    rms_norm_backward(
        dn_TC,
        x2_TC,
        weights.mlp_norm,
        rstd_T,
        gemma=weights.gemma,
        dresidual=dy_TC,
        out=dx2_TCP[:, :num_hidden],
    )
    return dx2_TCP, [Scaled(grad) for grad in grads]
