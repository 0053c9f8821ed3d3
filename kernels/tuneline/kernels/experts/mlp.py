"""The MLPs of routed experts over frozen NF4 weights, with LoRA, forward and backward by hand.

    gu[s] = W1_e x[t] + s1 B1_e A1_e x[t] + b1_e        row s is token t's choice of expert e
    h[s]  = act(gu[s])
    d[s]  = W2_e h[s] + s2 B2_e A2_e h[s] + b2_e
    y[t]  = sum_j w[t, j] d[row of (t, j)]

Backward, with dys[s] = dy[t] of row s and everything before the routing weight marked by ':

    g2 = dys (s2 B2)     dh' = dys W2 + g2 A2     dw = <dh', h> + <dys, b2>
    dgu = w dh' act'     g1 = dgu (s1 B1)         dx[t] = sum_j (dgu W1 + g1 A1)[row of (t, j)]
    dA1 = sum g1^T x     dB1 = s1 sum dgu^T (A1 x)     dA2 = sum (w g2)^T h
    dB2 = s2 sum dys^T (w A2 h)                        the sums are over each expert's rows

W is dequantised into an arena (arena.py) that is freed after its products; no gradient of
its shape exists. The forward stores x, A2 h and the routing. It also stores gu and A1 x if asked;
otherwise the backward computes them again. It never needs d.

Shapes: T tokens, k experts per token, S = T k rows, E experts, H hidden size, F intermediate size,
r rank, R padded rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tuneline.kernels.experts.activation import (
    ExpertActivation,
    expert_activation_backward,
    expert_activation_forward,
)
from tuneline.kernels.experts.arena import Arena, new_rows
from tuneline.kernels.experts.combine import combine
from tuneline.kernels.experts.route import Routing, route
from tuneline.kernels.experts.skinny import outer
from tuneline.kernels.experts.stack import (
    ExpertLora,
    ExpertStack,
    LoraPair,
    dequantize_experts_reference,
)


@dataclass(frozen=True, slots=True)
class Experts:
    """The frozen weights and the adapters of a layer's routed experts."""

    gate_up: ExpertStack
    down: ExpertStack
    activation: ExpertActivation = ExpertActivation()
    lora: ExpertLora = ExpertLora()

    def __post_init__(self) -> None:
        """Check that the projections fit together.

        Raises:
            ValueError: Sizes of the two stacks differ.
        """
        gate_up, down = self.gate_up, self.down
        if (gate_up.num_experts, gate_up.num_in) != (down.num_experts, down.num_out) or (
            gate_up.num_out != 2 * down.num_in
        ):
            raise ValueError(
                f"gate_up is {gate_up.num_experts} x [{gate_up.num_out}, {gate_up.num_in}], down "
                f"{down.num_experts} x [{down.num_out}, {down.num_in}]: they do not fit together"
            )

    def parameters(self) -> list[Tensor]:
        """Return the adapters' tensors, in the order of the gradients of `experts_backward`."""
        pairs = (self.lora.gate_up, self.lora.down)
        return [tensor for pair in pairs if pair is not None for tensor in (pair.a, pair.b)]


@dataclass(frozen=True, slots=True)
class SavedExperts:
    """What the forward stores; None for what does not exist or is computed again."""

    xa_SR: Tensor | None
    ha_SR: Tensor | None
    gate_up_SF: Tensor | None


def tile_rows(num_tokens: int, top_k: int, num_experts: int) -> int:
    """Return the rows per tile: 128 for many rows per expert, fewer for few rows."""
    per_expert = num_tokens * top_k // max(1, num_experts)
    return 128 if per_expert >= 128 else 64 if per_expert >= 32 else 16


def experts_forward(
    x_TH: Tensor,
    weights_Tk: Tensor,
    routing: Routing,
    experts: Experts,
    *,
    keep_gate_up: bool,
    residual_TH: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, SavedExperts]:
    """Return y [T, H] and what the backward needs, without recording a gradient.

    Args:
        x_TH: Input, unit stride along H.
        weights_Tk: Routing weights.
        routing: The rows.
        experts: The layer's experts.
        keep_gate_up: Whether to store gate and up.
        residual_TH: Added to the result.
        out: Where y is written; may be the residual.
    """
    num_rows, gate_up, down = routing.num_rows, experts.gate_up, experts.down
    arena = Arena(gate_up, experts.lora.gate_up, routing, x_TH)
    rows_SH = new_rows(num_rows, gate_up.num_in, arena.rank, x_TH)
    gate_up_SF = x_TH.new_empty(num_rows, gate_up.num_out)
    xa_SR = arena.product(rows_SH, forward=True, out=gate_up_SF, tokens=x_TH)
    del rows_SH
    arena = Arena(down, experts.lora.down, routing, x_TH)
    h_SF = new_rows(num_rows, down.num_in, arena.rank, x_TH)
    expert_activation_forward(gate_up_SF, routing, experts.activation, out=h_SF[:, : down.num_in])
    saved_gate_up = gate_up_SF if keep_gate_up else None
    del gate_up_SF
    rows_SH = x_TH.new_empty(num_rows, down.num_out)
    ha_SR = arena.product(h_SF, forward=True, out=rows_SH)
    y_TH = combine(rows_SH, routing, weights_Tk=weights_Tk, residual_TC=residual_TH, out=out)
    return y_TH, SavedExperts(xa_SR if keep_gate_up else None, ha_SR, saved_gate_up)


def experts_backward(
    dy_TH: Tensor,
    x_TH: Tensor,
    weights_Tk: Tensor,
    routing: Routing,
    experts: Experts,
    saved: SavedExperts,
    *,
    need_dx: bool = True,
) -> tuple[Tensor | None, Tensor, list[Tensor]]:
    """Return dx [T, H], dw [T, k] in float32 or wider, and the gradients of `parameters()`.

    Args:
        dy_TH: Gradient of y, unit stride along H.
        x_TH: Input of the forward, unit stride along H.
        weights_Tk: Routing weights.
        routing: The rows.
        experts: The layer's experts.
        saved: What the forward returned; a stored gate and up is not overwritten.
        need_dx: Whether to compute dx; None is returned otherwise.
    """
    num_rows, gate_up, down, lora = routing.num_rows, experts.gate_up, experts.down, experts.lora
    arena = Arena(down, lora.down, routing, x_TH)
    rows_SH = new_rows(num_rows, down.num_out, arena.rank, x_TH)
    dh_SF = x_TH.new_empty(num_rows, down.num_in)
    g_SR = arena.product(rows_SH, forward=False, out=dh_SF, tokens=dy_TH)
    del rows_SH
    arena = Arena(gate_up, lora.gate_up, routing, x_TH)
    grads_SF = new_rows(num_rows, gate_up.num_out, arena.rank, x_TH)
    d_gate_up_SF = grads_SF[:, : gate_up.num_out]
    gate_up_SF, xa_SR = saved.gate_up_SF, saved.xa_SR
    if gate_up_SF is None:
        # The gradient overwrites it.
        gate_up_SF = d_gate_up_SF
        rows_SH = new_rows(num_rows, gate_up.num_in, arena.rank, x_TH)
        xa_SR = arena.product(rows_SH, forward=True, out=gate_up_SF, tokens=x_TH)
        del rows_SH
    dw_Tk = expert_activation_backward(
        dh_SF, gate_up_SF, weights_Tk, routing, experts.activation, out=d_gate_up_SF
    )
    h_SF = dh_SF
    del gate_up_SF, dh_SF
    if down.bias is not None:
        dw_Tk += _bias_gradient(dy_TH, down.bias, routing)
    down_grads: list[Tensor] = []
    if lora.down is not None and g_SR is not None and saved.ha_SR is not None:
        rank = lora.down.rank
        down_grads = [
            outer(g_SR, h_SF, routing, rank=rank, weights_Tk=weights_Tk).to(lora.down.a.dtype),
            outer(
                saved.ha_SR, dy_TH, routing, rank=rank, scale=lora.down.scaling, gather=True,
                weights_Tk=weights_Tk, transposed=True,
            ).to(lora.down.b.dtype),
        ]  # fmt: skip
    del h_SF
    dx_TH = None
    dx_SH = x_TH.new_empty(num_rows, gate_up.num_in)
    g_SR = arena.product(grads_SF, forward=False, out=dx_SH)
    if need_dx:
        dx_TH = combine(dx_SH, routing)
    del dx_SH, arena
    grads: list[Tensor] = []
    if lora.gate_up is not None and g_SR is not None and xa_SR is not None:
        rank = lora.gate_up.rank
        grads = [
            outer(g_SR, x_TH, routing, rank=rank, gather=True).to(lora.gate_up.a.dtype),
            outer(
                xa_SR, d_gate_up_SF, routing, rank=rank, scale=lora.gate_up.scaling,
                transposed=True,
            ).to(lora.gate_up.b.dtype),
        ]  # fmt: skip
    return dx_TH, dw_Tk, grads + down_grads


def _bias_gradient(dy_TH: Tensor, bias_EH: Tensor, routing: Routing) -> Tensor:
    """Return <dy[t], bias of slot (t, j)'s expert> [T, k]; zero for a dropped slot."""
    row = routing.row_of_slot.view(-1, routing.top_k)
    expert = (torch.searchsorted(routing.starts, row, right=True) - 1).clamp(min=0)
    wide = torch.promote_types(dy_TH.dtype, torch.float32)
    dots_TE = dy_TH.to(wide) @ bias_EH.t().to(wide)
    return dots_TE.gather(1, expert).masked_fill(row < 0, 0.0)


class _ExpertsFunction(torch.autograd.Function):
    """Autograd function of `experts_mlp`."""

    @staticmethod
    def forward(ctx: Any, x, index, weights, experts, keep_gate_up, *parameters):  # noqa: D102
        gate_up = experts.gate_up
        block = tile_rows(index.shape[0], index.shape[1], gate_up.num_experts)
        routing = route(index, gate_up.num_experts, block)
        y, saved = experts_forward(x, weights, routing, experts, keep_gate_up=keep_gate_up)
        ctx.experts, ctx.block = experts, block
        ctx.save_for_backward(
            x, weights, saved.xa_SR, saved.ha_SR, saved.gate_up_SF, *routing.tensors(), *parameters
        )
        return y

    @staticmethod
    def backward(ctx: Any, dy):  # noqa: D102
        # Autograd raises here if an adapter changed in place after the forward.
        x, weights, xa, ha, gate_up, *tensors = ctx.saved_tensors
        routing = Routing.of_tensors(tensors[:5], ctx.block, weights.shape[1])
        dy = dy if dy.stride(-1) == 1 and dy.stride(0) >= dy.shape[1] else dy.contiguous()
        dx, dw, grads = experts_backward(
            dy, x, weights, routing, ctx.experts, SavedExperts(xa, ha, gate_up),
            need_dx=ctx.needs_input_grad[0],
        )  # fmt: skip
        return dx, None, dw.to(weights.dtype), None, None, *grads


def experts_mlp_reference(
    x: Tensor,
    index: Tensor,
    weights: Tensor,
    gate_up: ExpertStack,
    down: ExpertStack,
    *,
    activation: ExpertActivation,
    lora: ExpertLora | None = None,
) -> Tensor:
    """Compute `experts_mlp` in plain torch, differentiable by autograd; for any dtype of x."""
    lora = ExpertLora() if lora is None else lora

    def linear(rows: Tensor, stack: ExpertStack, pair: LoraPair | None, expert: int) -> Tensor:
        weight = dequantize_experts_reference(stack, first=expert, last=expert + 1)[0]
        weight = (weight.t() if stack.transposed else weight).to(x.dtype)
        y = rows @ weight.t()
        if pair is not None:
            low = rows @ pair.a[expert].to(x.dtype).t()
            y = y + pair.scaling * (low @ pair.b[expert].to(x.dtype).t())
        return y if stack.bias is None else y + stack.bias[expert].to(x.dtype)

    y = torch.zeros_like(x)
    for expert in range(gate_up.num_experts):
        token, choice = torch.where(index == expert)
        h = activation.apply(linear(x[token], gate_up, lora.gate_up, expert))
        d = linear(h, down, lora.down, expert) * weights[token, choice, None].to(x.dtype)
        y = y.index_add(0, token, d)
    return y


def experts_mlp(
    x: Tensor,
    index: Tensor,
    weights: Tensor,
    gate_up: ExpertStack,
    down: ExpertStack,
    *,
    activation: ExpertActivation,
    lora: ExpertLora | None = None,
    keep_gate_up: bool = True,
) -> Tensor:
    """Return y [T, H], differentiable in x, weights and the adapters.

    Args:
        x: Tokens [T, H].
        index: Experts of each token [T, k]; an index outside of [0, E) drops the choice.
        weights: Routing weights [T, k].
        gate_up: The stack of gate and up, N = 2 F and K = H.
        down: The stack of down, N = H and K = F.
        activation: The activation between them.
        lora: The adapters; None trains no expert.
        keep_gate_up: Whether to store gate and up [S, 2 F] for the backward, which computes them
            again otherwise.
    """
    experts = Experts(gate_up, down, activation, ExpertLora() if lora is None else lora)
    x = x if x.stride(-1) == 1 else x.contiguous()
    return _ExpertsFunction.apply(x, index, weights, experts, keep_gate_up, *experts.parameters())
