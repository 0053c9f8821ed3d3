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

W is dequantised into an arena that is freed after its products; no gradient of its shape exists.
The forward stores x, A1 x, A2 h, the routing, and gu if asked; otherwise the backward computes gu
again. It never needs d. The arena holds all experts or, beyond `ARENA_BYTES`, a chunk of them.

Shapes: T tokens, k experts per token, S = T k rows, E experts, H hidden size, F intermediate size,
r rank, R padded rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tuneline.kernels.ops.experts_activation import (
    ExpertActivation,
    expert_activation_backward,
    expert_activation_forward,
)
from tuneline.kernels.ops.experts_combine import combine
from tuneline.kernels.ops.experts_gemm import grouped_mm, outer, project
from tuneline.kernels.ops.experts_route import Routing, route
from tuneline.kernels.ops.experts_stack import (
    ExpertLora,
    ExpertStack,
    LoraPair,
    dequantize_experts,
    dequantize_experts_reference,
)

ARENA_BYTES = 2 * 2**30
"""Most bytes of dequantised experts at once; a projection that needs more runs in chunks."""

_MIN_RANK = 16


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
    """What the forward leaves for the backward; None for what does not exist or was not kept."""

    xa_SR: Tensor | None
    ha_SR: Tensor | None
    gate_up_SF: Tensor | None


class _Adapter:
    """A (R rows) and s B (R columns) of a projection's experts, in the dtype of the products."""

    def __init__(self, pair: LoraPair, like: Tensor) -> None:
        experts, rank, ins = pair.a.shape
        outs = pair.b.shape[1]
        padded = max(_MIN_RANK, 1 << (rank - 1).bit_length())
        self.pair = pair
        self.a_ERI = like.new_empty(experts, padded, ins)
        self.sb_EOR = like.new_empty(experts, outs, padded)
        if padded != rank:
            self.a_ERI[:, rank:] = 0
            self.sb_EOR[:, :, rank:] = 0
        self.a_ERI[:, :rank] = pair.a.detach()
        torch.mul(pair.b.detach(), pair.scaling, out=self.sb_EOR[:, :, :rank])


def _adapter(pair: LoraPair | None, like: Tensor) -> _Adapter | None:
    return None if pair is None else _Adapter(pair, like)


class _Arena:
    """The dequantised experts of one projection, in as many chunks as `ARENA_BYTES` asks for."""

    def __init__(self, stack: ExpertStack, routing: Routing, like: Tensor) -> None:
        self._stack, self._routing, self._like = stack, routing, like
        per_expert = stack.num_out * stack.num_in * like.element_size()
        most = max(1, ARENA_BYTES // per_expert)
        self._size = -(-stack.num_experts // -(-stack.num_experts // most))
        self._whole: Tensor | None = None

    def _chunks(self) -> Iterator[tuple[int, int, Tensor]]:
        stack = self._stack
        for first in range(0, stack.num_experts, self._size):
            last = min(first + self._size, stack.num_experts)
            weight = self._whole
            if weight is None:
                weight = self._like.new_empty(last - first, *stack.stored_shape)
                dequantize_experts(stack, self._routing.starts, first=first, last=last, out=weight)
            if self._size >= stack.num_experts:
                self._whole = weight
            yield first, last, weight
            del weight

    def forward(self, x_SI: Tensor, p_SR: Tensor | None, adapter: _Adapter | None) -> Tensor:
        """Return the projection of sorted rows."""
        stack = self._stack
        out = x_SI.new_empty(x_SI.shape[0], stack.num_out)
        for first, last, weight in self._chunks():
            grouped_mm(
                x_SI, weight, self._routing, stored_oi=not stack.transposed, out=out, first=first,
                last=last, p_SR=p_SR,
                q_ERO=None if adapter is None else adapter.sb_EOR.transpose(1, 2),
                bias_EO=stack.bias,
            )  # fmt: skip
        return out

    def backward(self, dy_SO: Tensor, g_SR: Tensor | None, adapter: _Adapter | None) -> Tensor:
        """Return the gradient of the rows from that of their projection."""
        stack = self._stack
        out = dy_SO.new_empty(dy_SO.shape[0], stack.num_in)
        for first, last, weight in self._chunks():
            grouped_mm(
                dy_SO, weight, self._routing, stored_oi=stack.transposed, out=out, first=first,
                last=last, p_SR=g_SR, q_ERO=None if adapter is None else adapter.a_ERI,
            )  # fmt: skip
        return out


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
    rows_SH = x_TH.new_empty(routing.num_rows, x_TH.shape[1])
    adapter = _adapter(experts.lora.gate_up, x_TH)
    a_ERI = None if adapter is None else adapter.a_ERI
    xa_SR = project(x_TH, a_ERI, routing, gather=True, copy_SI=rows_SH)
    gate_up_SF = _Arena(experts.gate_up, routing, x_TH).forward(rows_SH, xa_SR, adapter)
    del rows_SH, adapter
    h_SF = expert_activation_forward(gate_up_SF, routing, experts.activation)
    saved_gate_up = gate_up_SF if keep_gate_up else None
    del gate_up_SF
    adapter = _adapter(experts.lora.down, x_TH)
    ha_SR = None if adapter is None else project(h_SF, adapter.a_ERI, routing)
    rows_SH = _Arena(experts.down, routing, x_TH).forward(h_SF, ha_SR, adapter)
    y_TH = combine(rows_SH, routing, weights_Tk=weights_Tk, residual_TC=residual_TH, out=out)
    return y_TH, SavedExperts(xa_SR, ha_SR, saved_gate_up)


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
    down = _adapter(experts.lora.down, x_TH)
    rows_SH = x_TH.new_empty(routing.num_rows, x_TH.shape[1])
    sb_ERO = None if down is None else down.sb_EOR.transpose(1, 2)
    g_SR = project(dy_TH, sb_ERO, routing, gather=True, copy_SI=rows_SH)
    dh_SF = _Arena(experts.down, routing, x_TH).backward(rows_SH, g_SR, down)
    gate_up, arena = _adapter(experts.lora.gate_up, x_TH), _Arena(experts.gate_up, routing, x_TH)
    if saved.gate_up_SF is None:
        project(x_TH, None, routing, gather=True, copy_SI=rows_SH)
        gate_up_SF = arena.forward(rows_SH, saved.xa_SR, gate_up)
    else:
        gate_up_SF = saved.gate_up_SF.clone()
    del rows_SH
    d_gate_up_SF, h_SF, dw_Tk = expert_activation_backward(
        dh_SF, gate_up_SF, weights_Tk, routing, experts.activation
    )
    del dh_SF, gate_up_SF
    if experts.down.bias is not None:
        dw_Tk = dw_Tk + _bias_gradient(dy_TH, experts.down.bias, routing).to(dw_Tk.dtype)
    down_grads: list[Tensor] = []
    if down is not None and g_SR is not None and saved.ha_SR is not None:
        rank = down.pair.rank
        down_grads = [
            outer(g_SR, h_SF, routing, rank=rank, weights_Tk=weights_Tk).to(down.pair.a.dtype),
            outer(
                saved.ha_SR, dy_TH, routing, rank=rank, scale=down.pair.scaling, gather=True,
                weights_Tk=weights_Tk, transposed=True,
            ).to(down.pair.b.dtype),
        ]  # fmt: skip
    del h_SF, down
    grads: list[Tensor] = []
    g_SR = None
    if gate_up is not None and saved.xa_SR is not None:
        pair = gate_up.pair
        g_SR = project(d_gate_up_SF, gate_up.sb_EOR.transpose(1, 2), routing)
        assert g_SR is not None
        grads = [
            outer(g_SR, x_TH, routing, rank=pair.rank, gather=True).to(pair.a.dtype),
            outer(
                saved.xa_SR, d_gate_up_SF, routing, rank=pair.rank, scale=pair.scaling,
                transposed=True,
            ).to(pair.b.dtype),
        ]  # fmt: skip
    grads += down_grads
    if not need_dx:
        return None, dw_Tk, grads
    dx_SH = arena.backward(d_gate_up_SF, g_SR, gate_up)
    return combine(dx_SH, routing), dw_Tk, grads


def _bias_gradient(dy_TH: Tensor, bias_EH: Tensor, routing: Routing) -> Tensor:
    """Return <dy[t], bias of slot (t, j)'s expert> [T, k]; zero for a dropped slot."""
    row = routing.row_of_slot.view(-1, routing.top_k)
    expert = (torch.searchsorted(routing.starts, row, right=True) - 1).clamp(min=0)
    dots_TE = dy_TH.to(torch.promote_types(dy_TH.dtype, torch.float32)) @ bias_EH.t().to(
        torch.promote_types(dy_TH.dtype, torch.float32)
    )
    return dots_TE.gather(1, expert).masked_fill(row < 0, 0.0)


class _ExpertsFunction(torch.autograd.Function):
    """Autograd function of `experts_mlp`."""

    @staticmethod
    def forward(ctx: Any, x, index, weights, experts, keep_gate_up, *parameters):  # noqa: D102
        gate_up = experts.gate_up
        block = tile_rows(*index.shape, gate_up.num_experts)
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
        routing = Routing(*tensors[:5], ctx.block, weights.shape[1])
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
