"""One decoder layer with hand-written forward and backward, and a choice of what it stores.

    n1 = norm(x);  q, k, v = qkv(n1);  a = attention(rope(q), rope(k), v);  o = o_proj(a)
    x2 = x + o                          (sandwich norms: x + norm(o))
    n2 = norm(x2);  h = act(gate(n2)) * up(n2);  d = down(h)
    y  = x2 + d                         (sandwich norms: x2 + norm(d))

A *lean* layer stores x and h A_down^T (1/64 of the size of h), and d if a norm follows down_proj.
Its backward recomputes the layer up to gate and up. It recomputes neither down_proj (27 % of a
Llama layer's multiplications) nor h in a separate step, because the activation's backward computes
h anyway. With a host stash (stash.py), a lean layer also *parks* tensors, which means that it
offloads them to host memory: x, and those of q, k, v, a and x2 that can be copied while the forward
runs (`budget.parked`). The backward of a Llama layer then recomputes gate and up alone. The last
layer *holds* the same tensors on the device, because its backward starts before they could be
copied to the host and back.

A *kept* layer stores q, k, v, a, x2, gate and up on the device. Its backward recomputes only n1 and
n2, or nothing if the layer stores n1 and n2 too.

All choices run the same kernels on the same numbers and give the same gradients bit for bit, with
two exceptions. For more than 4096 tokens, the gradients of the MLP's adapters differ, because kept
layers sum over longer chunks. For more than 2048 tokens, a *narrow* layer multiplies fewer rows at
a time, which cuBLAS may round differently.

The halves are in attention_half.py, mlp_half.py and, for a mixture of experts, experts_half.py. A
lean layer with experts computes gate and up again, and a kept one stores them. Its function also
returns what the router returned; the router's logits are differentiable, for the auxiliary loss.

Without gradients, the last layer can compute o_proj and the MLP for selected tokens only.

Shapes: B rows of L tokens, T = B L, S selected tokens, C hidden size, F intermediate size; see
lora.py for P.
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
from tuneline.kernels.decoder.experts_half import (
    NUM_SAVED,
    experts_half_backward,
    experts_half_forward,
)
from tuneline.kernels.decoder.layer_weights import LayerWeights, Normed
from tuneline.kernels.decoder.mlp_half import mlp_backward, mlp_forward
from tuneline.kernels.decoder.stash import HostStash, Ticket
from tuneline.kernels.ops.attention import AttentionPlan
from tuneline.kernels.ops.flatten import Scaled


@dataclass(slots=True)
class Handover:
    """The last dx that a layer's backward returned, in rows with extra columns for G (lora.py).

    Autograd passes a view of the first C columns to the preceding layer as dy. The backward of that
    layer recognises the view and writes G into the extra columns, instead of copying dy.
    """

    dx_TCP: Tensor | None = None

    def room_for(self, dy_TC: Tensor, num_columns: int) -> Tensor | None:
        """Return dy's rows with `num_columns` extra columns if dy is the last dx, else None."""
        room, self.dx_TCP = self.dx_TCP, None
        if room is None or room.data_ptr() != dy_TC.data_ptr() or room.stride() != dy_TC.stride():
            return None
        return room if room.shape[1] == dy_TC.shape[1] + num_columns else None


@dataclass(frozen=True, slots=True)
class LayerCall:
    """What a forward passes to a layer in addition to x: the sequences, and what to store."""

    plan: AttentionPlan
    keep: bool = False
    keep_normed: bool = False
    """Whether a kept layer also stores n1 and n2."""
    stash: HostStash | None = None
    """Host memory for x and the tensors of `waits`; not used if `keep` or `holds` is set."""
    waits: Saved = Saved()
    """Which intermediates a lean layer stores in addition to x, if it parks or holds them."""
    holds: bool = False
    """Whether a lean layer stores x and the tensors of `waits` on the device, not on the host."""
    fetches: bool = False
    """Whether the preceding layer parks and this layer does not. The backward of this layer then
    starts the copy of the preceding layer's tensors back to the device."""
    narrow: bool = False
    """Whether the MLP's forward runs over chunks of half the size, because the head, which is kept
    in host memory, arrives on the device meanwhile."""
    handover: Handover | None = None
    """Shared by all layers of a forward."""
    inference: bool = False
    """Whether the MLP's forward runs over the larger chunks of inference."""
    overwrites: bool = False
    """Whether the layer may write over x, because nothing reads x after it; without gradients."""
    selected_S: Tensor | None = None
    """Indices of the tokens whose y is computed, for a forward of one row without gradients; None:
    all tokens."""

    @property
    def parks(self) -> bool:
        """Whether the layer's tensors are offloaded to host memory."""
        return self.stash is not None and not (self.keep or self.holds)

    @property
    def saved(self) -> Saved:
        """Which intermediates of the attention half are stored for the backward."""
        if self.keep:
            return Saved(True, True, True)
        return self.waits if self.parks or self.holds else Saved()

    def park(self, tensors: list[Any]) -> Ticket:
        """Start the copies of a parking layer's tensors to the host."""
        assert self.stash is not None
        return self.stash.put(tensors)


def fused_layer(
    x_BLC: Tensor, cos: Tensor, sin: Tensor, weights: LayerWeights, call: LayerCall
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return the layer's output y [B, L, C] and what its router returned, if it has one.

    Args:
        x_BLC: Input, differentiable.
        cos: Rope table [B or 1, L, R].
        sin: Rope table [B or 1, L, R].
        weights: The layer's weights and adapters; the adapters are differentiable.
        call: The sequences, and what to store.
    """
    outputs = _LayerFunction.apply(x_BLC, cos, sin, weights, call, *weights.parameters())
    return (outputs, ()) if weights.routed is None else (outputs[0], outputs[1:])


class _LayerFunction(torch.autograd.Function):
    """Autograd function of the layer; see the module's docstring."""

    @staticmethod
    def forward(ctx: Any, x_BLC, cos, sin, weights, call, *parameters):  # noqa: D102
        y_BLC, routing, ctx.ticket, saved = layer_forward(x_BLC, cos, sin, weights, call)
        ctx.weights, ctx.call, ctx.num_saved = weights, call, len(saved)
        ctx.before = call.stash.last if call.fetches else None
        ctx.save_for_backward(cos, sin, *saved, *parameters)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*routing[1:])
        return (y_BLC, *routing) if routing else y_BLC

    @staticmethod
    def backward(ctx: Any, dy_BLC, dlogits_TE=None, *_):  # noqa: D102
        # Autograd raises here if an adapter changed in place after the forward.
        cos, sin, *tensors = ctx.saved_tensors
        saved, parameters = tensors[: ctx.num_saved], tensors[ctx.num_saved :]
        if ctx.before is not None:
            ctx.call.stash.begin(ctx.before)
        if ctx.ticket is not None:
            saved = [*ctx.call.stash.get(ctx.ticket), *saved]
        dx_BLC, grads = layer_backward(
            dy_BLC, saved, cos, sin, ctx.weights, ctx.call, dlogits_TE=dlogits_TE,
            need_dx=ctx.needs_input_grad[0],
        )  # fmt: skip
        values = [grad.value(p.dtype) for grad, p in zip(grads, parameters, strict=True)]
        return dx_BLC, None, None, None, None, *values


def layer_forward(
    x_BLC: Tensor, cos: Tensor, sin: Tensor, weights: LayerWeights, call: LayerCall
) -> tuple[Tensor, tuple[Tensor, ...], Ticket | None, list[Tensor | None]]:
    """Compute the layer without recording a gradient.

    Args:
        x_BLC: Input.
        cos: Rope table [B or 1, L, R].
        sin: Rope table [B or 1, L, R].
        weights: The layer's weights and adapters.
        call: The sequences, and what to store.

    Returns:
        y [B, L, C], or [1, S, C] of the selected tokens; what the router returned, or nothing in a
        layer without router; the ticket of the tensors that were offloaded to host memory, if the
        layer parks; and the tensors for the backward that stay on the device.
    """
    x_TC, wanted = x_BLC.reshape(-1, x_BLC.shape[-1]), call.saved
    half = AttentionHalf()
    x2_TC = complete(
        half, x_TC, x_BLC.shape, cos, sin, weights, call.plan,
        selected_S=call.selected_S, overwrite=call.overwrites,
    )  # fmt: skip
    normed = half.normed if call.keep_normed else None
    attention_saved = half.attention_saved if wanted.output else ()
    parkable: list[Any] = [x_BLC]
    parkable += [half.qkv_TN] if wanted.qkv else []
    parkable += [half.o_input_TKP] if wanted.output else []
    parkable += [half.branch_TC] if wanted.branch else []
    del half
    ticket = None
    if call.fetches and call.stash is not None:
        call.stash.settle()
    if call.parks and weights.after_mlp_norm is None:
        # Copied while the MLP runs. The preceding layer's copies end here, which frees their memory
        # before the MLP takes its own.
        ticket, parkable = call.park(parkable), []
    routing: tuple[Tensor, ...] = ()
    if weights.routed is None:
        y_TC, gate_up_TF, down_input_TP, d_TC, mlp_normed = mlp_forward(
            x2_TC,
            weights,
            call.keep,
            keep_normed=call.keep_normed,
            overwrite=not wanted.branch,
            narrow=call.narrow,
            inference=call.inference,
        )
        mlp_saved: list[Tensor | None] = [down_input_TP, gate_up_TF]
        if d_TC is not None:
            parkable.append(d_TC)
    else:
        y_TC, routing, mlp_saved, mlp_normed = experts_half_forward(
            x2_TC, weights, call.keep, keep_normed=call.keep_normed, overwrite=not wanted.branch
        )
    if call.parks and ticket is None:
        ticket, parkable = call.park(parkable), []
    saved: list[Tensor | None] = parkable
    if normed is not None and mlp_normed is not None:
        saved += [*normed, *mlp_normed]
    saved += [*mlp_saved, *attention_saved]
    return y_TC.view(x_BLC.shape[0], -1, x_BLC.shape[2]), routing, ticket, saved


def layer_backward(
    dy_BLC: Tensor,
    saved: Sequence[Any],
    cos: Tensor,
    sin: Tensor,
    weights: LayerWeights,
    call: LayerCall,
    *,
    dlogits_TE: Tensor | None = None,
    need_dx: bool = True,
) -> tuple[Tensor | None, list[Scaled]]:
    """Return dx [B, L, C] and the gradients of `weights.parameters()`.

    Args:
        dy_BLC: Gradient of the output.
        saved: The tensors that `layer_forward` offloaded or returned, in this order.
        cos: Rope table [B or 1, L, R].
        sin: Rope table [B or 1, L, R].
        weights: The layer's weights and adapters.
        call: The `call` of the forward.
        dlogits_TE: Gradient of the router's logits, or None.
        need_dx: Compute dx; if False, None is returned instead. The first layer's dx is rarely
            needed, and without dx one GEMM with qkv's frozen weights is avoided.
    """
    # The tensors are in the order of `layer_forward`.
    x_BLC, *saved = saved
    x_TC = x_BLC.reshape(-1, x_BLC.shape[-1])
    dy_TC = dy_BLC.reshape(x_TC.shape)
    half, present, d_TC = AttentionHalf(), call.saved, None
    if present.qkv:
        half.qkv_TN, *saved = saved
    if present.output:
        half.o_input_TKP, *saved = saved
    if present.branch:
        half.branch_TC, *saved = saved
    if weights.after_mlp_norm is not None:
        d_TC, *saved = saved
    mlp_normed: Normed | None = None
    if call.keep_normed:
        half.normed, mlp_normed, saved = tuple(saved[:2]), tuple(saved[2:4]), saved[4:]
    num_mlp_saved = 2 if weights.routed is None else NUM_SAVED
    mlp_saved, half.attention_saved = saved[:num_mlp_saved], tuple(saved[num_mlp_saved:])
    x2_TC = complete(half, x_TC, x_BLC.shape, cos, sin, weights, call.plan)
    if not call.keep_normed:
        # The MLP's backward is the memory peak of a step, so n1 is freed here and recomputed later.
        half.normed = None
    handover = Handover() if call.handover is None else call.handover
    dy_TCP = handover.room_for(dy_TC, weights.mlp_columns)
    if weights.routed is None:
        down_input_TP, gate_up_TF = mlp_saved
        dx2_TCP, mlp_grads = mlp_backward(
            dy_TC, dy_TCP, x2_TC, gate_up_TF, down_input_TP, d_TC, mlp_normed, weights
        )
    else:
        dx2_TCP, mlp_grads = experts_half_backward(
            dy_TC, dlogits_TE, x2_TC, mlp_saved, mlp_normed, weights
        )
    dx_TCP, qkv_grads, o_grads = attention_half_backward(
        dx2_TCP, x_TC, half, cos, sin, weights, call.plan, need_dx=need_dx
    )
    grads = [*qkv_grads, *o_grads, *mlp_grads]
    if dx_TCP is None:
        return None, grads
    handover.dx_TCP = dx_TCP
    return dx_TCP[:, : x_TC.shape[1]].unflatten(0, x_BLC.shape[:2]), grads
