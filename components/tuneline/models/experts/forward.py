"""The forward pass of experts in NF4, for all families that transformers has.

transformers' modules of experts look up their forward method in a public registry. The method below
computes what transformers' `grouped_mm` computes, with the router, the biases and the activation of
the module, and adds to each expert its own low-rank update:

    y = x W_e^T + s (x A_e^T) B_e^T        for each token x that the router sends to expert e

Where `use_kernels` asks for it, the usual activations run in `kernels.experts`. Otherwise one
expert is dequantised at a time, and again in the backward pass: nothing of the size of a stack is
kept in 16 bits.

Shapes: T tokens, k experts per token, S = T k rows sorted by expert, E experts, r the rank.
"""

from typing import Any

import torch
from transformers.activations import GELUTanh, SiLUActivation
from transformers.integrations.moe import (
    ALL_EXPERTS_FUNCTIONS,
    _default_apply_gate,
    grouped_mm_experts_forward,
)

from tuneline.kernels.binding_experts import expert_stack
from tuneline.kernels.experts.activation import ExpertActivation
from tuneline.kernels.experts.mlp import experts_mlp
from tuneline.kernels.experts.stack import ExpertLora, ExpertStack, LoraPair
from tuneline.kernels.ops.nf4 import NF4Weight, dequantize_nf4, dequantize_nf4_reference
from tuneline.models.experts.stacks import expert_modules, projections
from tuneline.models.nf4_layout import BLOCKSIZE

IMPLEMENTATION = "tuneline_nf4"
"""Name of the forward method in transformers' registry."""


def dequantized_expert(stack: ExpertStack, number: int) -> torch.Tensor:
    """Return the weight of one expert, [outputs, inputs], which may be a transposed view."""
    # A CPU has no kernels, except in tests, where Triton's interpreter is slow.
    dequantize = dequantize_nf4 if stack.packed.is_cuda else dequantize_nf4_reference
    weight = dequantize(
        NF4Weight(
            packed=stack.packed[number],
            absmax=stack.absmax[number],
            code=stack.code,
            shape=stack.stored_shape,
            dtype=stack.dtype,
            nested_absmax=None if stack.nested_absmax is None else stack.nested_absmax[number],
            nested_code=stack.nested_code,
            offset=None if stack.offset is None else stack.offset[number],
        )
    )
    return weight.T if stack.transposed else weight


def nf4_experts_forward(
    self: Any,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """Return the weighted sum of each token's experts, [T, hidden].

    Args:
        self: The module of experts.
        hidden_states: Inputs, [T, hidden].
        top_k_index: Experts of each token, [T, k].
        top_k_weights: Weights of these experts, [T, k].
    """
    if not getattr(self, "nf4_stacks", None):
        result: torch.Tensor = grouped_mm_experts_forward(
            self, hidden_states, top_k_index, top_k_weights
        )
        return result
    device = hidden_states.device.type
    dtype = hidden_states.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    x_TH = hidden_states.to(dtype)
    up, down = (expert_stack(self, name, dtype) for name in projections(self))
    updates = [self.nf4_lora.get(name) for name in projections(self)]
    activation = kernel_activation(self) if self.nf4_kernels else None
    if activation is not None:
        y_TH = experts_mlp(
            *(x_TH, top_k_index, top_k_weights, up, down),
            activation=activation,
            lora=ExpertLora(*updates),
        )
        return y_TH.to(hidden_states.dtype)
    num_tokens, top_k = top_k_index.shape
    expert_S, order_S = top_k_index.flatten().sort(stable=True)
    counts = torch.bincount(expert_S, minlength=self.num_experts)[: self.num_experts].tolist()
    h_S = _projected(x_TH[order_S // top_k], up, updates[0], expert_S, counts)
    h_S = self._apply_gate(h_S) if self.has_gate else self.act_fn(h_S)
    y_S = _projected(h_S.to(dtype), down, updates[1], expert_S, counts)
    if getattr(self, "has_post_expert_norm", False):
        y_S = self.post_expert_norm(y_S)
    y_S = y_S * top_k_weights.flatten()[order_S, None]
    back_S = torch.empty_like(order_S)
    back_S[order_S] = torch.arange(len(order_S), device=order_S.device)
    return y_S[back_S].view(num_tokens, top_k, -1).sum(dim=1).to(hidden_states.dtype)


def use_kernels(model: torch.nn.Module) -> None:
    """Make the experts in NF4 of a model run in the kernels, where these know the activation."""
    for module in expert_modules(model).values():
        module.nf4_kernels = True


def kernel_activation(module: Any) -> ExpertActivation | None:
    """Return the activation of a module as the kernels know it; None if they do not.

    Sizes that the kernels cannot read, which no published model has, count as unknown.
    """
    for stack in module.nf4_stacks.values():
        if stack.rows * stack.columns % BLOCKSIZE or stack.columns % 8:
            return None
    if not module.has_gate or getattr(module, "has_post_expert_norm", False):
        return None
    if type(module).__name__ == "GptOssExperts":
        return ExpertActivation("clamped_swiglu", alpha=module.alpha, limit=module.limit)
    if type(module)._apply_gate is not _default_apply_gate:
        return None
    if isinstance(module.act_fn, (torch.nn.SiLU, SiLUActivation)):
        return ExpertActivation("silu")
    return ExpertActivation("gelu_tanh") if isinstance(module.act_fn, GELUTanh) else None


def _projected(
    x_S: torch.Tensor,
    stack: ExpertStack,
    update: LoraPair | None,
    expert_S: torch.Tensor,
    counts: list[int],
) -> torch.Tensor:
    a = b = None
    if update is not None:
        a, b = update.a.to(x_S.dtype), update.b.to(x_S.dtype)
    scale = 0.0 if update is None else update.scaling
    # Any: torch does not annotate it.
    function: Any = _ExpertLinear
    y_S: torch.Tensor = function.apply(x_S, a, b, stack, counts, scale)
    # A router may send a token to no expert, by an index beyond the last one.
    last = stack.num_experts - 1
    return y_S if stack.bias is None else y_S + stack.bias.to(x_S.dtype)[expert_S.clamp(max=last)]


class _ExpertLinear(torch.autograd.Function):
    """y = x W_e^T + s (x A_e^T) B_e^T for rows that are sorted by expert."""

    @staticmethod
    def forward(
        ctx: Any,
        x_S: torch.Tensor,
        a_Eri: torch.Tensor | None,
        b_Eor: torch.Tensor | None,
        stack: ExpertStack,
        counts: list[int],
        scale: float,
    ) -> torch.Tensor:
        y_S = x_S.new_zeros(len(x_S), stack.num_out)
        for e, rows in _hit(counts):
            y = torch.mm(x_S[rows], dequantized_expert(stack, e).T, out=y_S[rows])
            if a_Eri is not None and b_Eor is not None:
                y.addmm_(x_S[rows] @ a_Eri[e].T, b_Eor[e].T, alpha=scale)
        ctx.save_for_backward(x_S, a_Eri, b_Eor)
        ctx.stack, ctx.counts, ctx.scale = stack, counts, scale
        return y_S

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        x_S, a_Eri, b_Eor = ctx.saved_tensors
        dy_S = grads[0].to(x_S.dtype)
        dx_S = torch.zeros_like(x_S) if ctx.needs_input_grad[0] else None
        da_Eri = None if a_Eri is None else torch.zeros_like(a_Eri)
        db_Eor = None if b_Eor is None else torch.zeros_like(b_Eor)
        for e, rows in _hit(ctx.counts):
            x, dy = x_S[rows], dy_S[rows]
            if dx_S is not None:
                torch.mm(dy, dequantized_expert(ctx.stack, e), out=dx_S[rows])
            if da_Eri is None or db_Eor is None:
                continue
            du = ctx.scale * (dy @ b_Eor[e])
            da_Eri[e] = du.T @ x
            db_Eor[e] = ctx.scale * (dy.T @ (x @ a_Eri[e].T))
            if dx_S is not None:
                dx_S[rows].addmm_(du, a_Eri[e])
        return dx_S, da_Eri, db_Eor, None, None, None


def _hit(counts: list[int]) -> list[tuple[int, slice]]:
    """Return the experts that have rows, and their rows."""
    hit, start = [], 0
    for number, count in enumerate(counts):
        if count:
            hit.append((number, slice(start, start + count)))
        start += count
    return hit


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, nf4_experts_forward)
