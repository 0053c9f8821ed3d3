"""One decoder layer, forward and backward by hand, with a choice of what is kept in between.

    n1 = norm(x);  q, k, v = qkv(n1);  a = attention(rope(q), rope(k), v);  o = o_proj(a)
    x2 = x + o                          (Gemma: x + norm(o))
    n2 = norm(x2);  h = act(gate(n2)) * up(n2);  d = down(h)
    y  = x2 + d                         (Gemma: x2 + norm(d))

A *lean* layer keeps x and h A_down^T (1/64 of h), and Gemma's d. Its backward computes the layer
again up to gate and up, but neither down_proj (27 % of a Llama layer's multiplications) nor the
activation's forward, which the activation's backward yields on the way. With a host stash it
parks x there, and of q, k, v, a and x2 what can be copied behind the forward (`budget.parked`):
a Llama's backward then computes gate and up alone. The last layer *holds* them where they are:
its backward begins before a copy could be back. A *kept* layer saves q, k, v, a, x2, gate and up,
and computes only norms again, or nothing at all where it keeps their outputs too. All run the
same kernels on the same numbers: the choice changes no bit of a gradient, but for the MLP's
adapters beyond 4096 tokens, where kept layers sum over longer chunks.

The two halves are in attention_half.py and mlp_half.py.

Shapes: B rows of L tokens, T = B L, C hidden size, F intermediate size; see lora.py for P.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tuneline.kernels.decoder.attention_half import (
    AttentionHalf,
    Saved,
    attention_half_backward,
    complete,
)
from tuneline.kernels.decoder.layer_weights import LayerWeights, Normed
from tuneline.kernels.decoder.mlp_half import mlp_backward, mlp_forward
from tuneline.kernels.decoder.stash import HostStash
from tuneline.kernels.ops.attention import AttentionPlan


@dataclass(slots=True)
class Handover:
    """The gradient that a layer's backward gave last, with room for G beside each row.

    The layer before gets a view of its first C columns, knows it again and saves a copy.
    """

    dx_TCP: Tensor | None = None

    def room_for(self, dy_TC: Tensor, num_columns: int) -> Tensor | None:
        """Return the whole of dy's rows if they are what was given last, and wide enough."""
        room, self.dx_TCP = self.dx_TCP, None
        if room is None or room.data_ptr() != dy_TC.data_ptr() or room.stride() != dy_TC.stride():
            return None
        return room if room.shape[1] == dy_TC.shape[1] + num_columns else None


@dataclass(frozen=True, slots=True)
class LayerCall:
    """What one forward hands to each layer beside x: who attends to whom, what to keep."""

    plan: AttentionPlan
    keep: bool = False
    keep_normed: bool = False
    """Whether a kept layer keeps n1 and n2 as well."""
    stash: HostStash | None = None
    """Where x and what is in `waits` wait, unless the layer keeps or holds them."""
    waits: Saved = Saved()
    holds: bool = False
    """Whether they wait on the device."""
    fetches: bool = False
    """Whether the layer before parks, and this one does not: its backward calls them back."""
    handover: Handover | None = None
    """One for all layers of a forward."""

    @property
    def parks(self) -> bool:
        """Whether the layer's tensors wait in the host's memory."""
        return self.stash is not None and not (self.keep or self.holds)

    @property
    def saved(self) -> Saved:
        """What the backward finds of the first half."""
        if self.keep:
            return Saved(True, True, True)
        return self.waits if self.parks or self.holds else Saved()


def fused_layer(
    x_BLC: Tensor, cos: Tensor, sin: Tensor, weights: LayerWeights, call: LayerCall
) -> Tensor:
    """Return y [B, L, C]; differentiable in x and the adapters."""
    return _LayerFunction.apply(x_BLC, cos, sin, weights, call, *weights.parameters())


class _LayerFunction(torch.autograd.Function):
    """See the module's docstring."""

    @staticmethod
    def forward(ctx: Any, x_BLC, cos, sin, weights, call, *parameters):  # noqa: D102
        y_BLC, parkable, rest = layer_forward(x_BLC, cos, sin, weights, call)
        saved = [x_BLC, *parkable, *rest]
        ctx.weights, ctx.call, ctx.ticket, ctx.num_parked = weights, call, None, 0
        ctx.before = call.stash.last if call.fetches else None
        if call.parks:
            ctx.num_parked = 1 + len(parkable)
            ctx.ticket = call.stash.put(saved[: ctx.num_parked])
        ctx.num_saved = len(saved)
        ctx.save_for_backward(cos, sin, *saved[ctx.num_parked :], *parameters)
        return y_BLC

    @staticmethod
    def backward(ctx: Any, dy_BLC):  # noqa: D102
        # Unpacking checks that no adapter was changed in place since the forward.
        cos, sin, *rest = ctx.saved_tensors
        saved = rest[: ctx.num_saved - ctx.num_parked]
        if ctx.before is not None:
            ctx.call.stash.begin(ctx.before)
        if ctx.ticket is not None:
            saved = [*ctx.call.stash.get(ctx.ticket), *saved]
        dx_BLC, grads = layer_backward(
            dy_BLC, saved, cos, sin, ctx.weights, ctx.call, need_dx=ctx.needs_input_grad[0]
        )
        return dx_BLC, None, None, None, None, *grads


def layer_forward(
    x_BLC: Tensor, cos: Tensor, sin: Tensor, weights: LayerWeights, call: LayerCall
) -> tuple[Tensor, list[Tensor | None], list[Tensor | None]]:
    """Return y and what the backward wants beside x: what may be parked, and the rest.

    Records no gradient.
    """
    x_TC, wanted = x_BLC.reshape(-1, x_BLC.shape[-1]), call.saved
    half = AttentionHalf()
    x2_TC = complete(half, x_TC, x_BLC.shape, cos, sin, weights, call.plan)
    normed = half.normed if call.keep_normed else None
    attention_saved = half.attention_saved if wanted.output else ()
    parkable: list[Tensor | None] = [half.qkv_TN] if wanted.qkv else []
    parkable += [half.o_input_TKP] if wanted.output else []
    parkable += [half.branch_TC] if wanted.branch else []
    del half
    y_TC, gate_up_TF, down_input_TP, d_TC, mlp_normed = mlp_forward(
        x2_TC, weights, call.keep, keep_normed=call.keep_normed, overwrite=not wanted.branch
    )
    if d_TC is not None:
        parkable.append(d_TC)
    rest: list[Tensor | None] = []
    if normed is not None and mlp_normed is not None:
        rest += [*normed, *mlp_normed]
    rest += [down_input_TP, gate_up_TF, *attention_saved]
    return y_TC.view(x_BLC.shape), parkable, rest


def layer_backward(
    dy_BLC: Tensor,
    saved: Sequence[Any],
    cos: Tensor,
    sin: Tensor,
    weights: LayerWeights,
    call: LayerCall,
    *,
    need_dx: bool = True,
) -> tuple[Tensor | None, list[Tensor]]:
    """Return dx and the gradients of `weights.parameters()`; `saved` is x and `layer_forward`'s.

    Nobody asks for the first layer's dx: then qkv's product with the frozen weights is saved.
    """
    # By position: None only where the layer has no such tensor.
    x_BLC, *saved = saved
    x_TC = x_BLC.reshape(-1, x_BLC.shape[-1])
    dy_TC = dy_BLC.reshape(x_TC.shape)
    half, found, d_TC = AttentionHalf(), call.saved, None
    if found.qkv:
        half.qkv_TN, *saved = saved
    if found.output:
        half.o_input_TKP, *saved = saved
    if found.branch:
        half.branch_TC, *saved = saved
    if weights.after_mlp_norm is not None:
        d_TC, *saved = saved
    mlp_normed: Normed | None = None
    if call.keep_normed:
        half.normed, mlp_normed, saved = tuple(saved[:2]), tuple(saved[2:4]), saved[4:]
    down_input_TP, gate_up_TF, *attention_saved = saved
    half.attention_saved = tuple(attention_saved)
    x2_TC = complete(half, x_TC, x_BLC.shape, cos, sin, weights, call.plan)
    if not call.keep_normed:
        # The MLP's backward is a step's peak: the norm is computed again after it.
        half.normed = None
    handover = Handover() if call.handover is None else call.handover
    dy_TCP = handover.room_for(dy_TC, weights.down.num_columns)
    dx2_TCP, gate_up_grads, down_grads = mlp_backward(
        dy_TC, dy_TCP, x2_TC, gate_up_TF, down_input_TP, d_TC, mlp_normed, weights
    )
    dx_TCP, qkv_grads, o_grads = attention_half_backward(
        dx2_TCP, x_TC, half, cos, sin, weights, call.plan, need_dx=need_dx
    )
    grads = [g for part in (qkv_grads, o_grads, gate_up_grads, down_grads) for g in part]
    if dx_TCP is None:
        return None, grads
    handover.dx_TCP = dx_TCP
    return dx_TCP[:, : x_TC.shape[1]].unflatten(0, x_BLC.shape[:2]), grads
