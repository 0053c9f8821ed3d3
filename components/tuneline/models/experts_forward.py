"""The forward pass of experts in NF4, for all families that transformers has.

transformers' modules of experts look up their forward method in a public registry. The method below
computes what transformers' `grouped_mm` computes, from the same router, biases and activation of
the module, but dequantises one expert at a time, and adds the expert's own low-rank update:

    y = x W_e^T + s (x A_e^T) B_e^T        for each token x that the router sends to expert e

The backward pass dequantises again: nothing of the size of a stack is kept in 16 bits.

Shapes: T tokens, k experts per token, S = T k rows sorted by expert, E experts, r the rank.
"""

import dataclasses
from typing import Any

import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

from tuneline.kernels.ops.nf4 import NF4Weight, dequantize_nf4
from tuneline.models.experts import Stack, projections

IMPLEMENTATION = "tuneline_nf4"
"""Name of the forward method in transformers' registry."""


@dataclasses.dataclass(frozen=True)
class LowRank:
    """A low-rank update per expert: s B_e A_e."""

    a_Eri: torch.Tensor
    """A of all experts, [E, r, inputs]."""
    b_Eor: torch.Tensor
    """B of all experts, [E, outputs, r]."""
    scale: float


@dataclasses.dataclass(frozen=True)
class PackedStack:
    """A stack of experts in NF4, sharing the memory of a module's tensors."""

    stack: Stack
    packed: torch.Tensor
    absmax: torch.Tensor
    nested_absmax: torch.Tensor
    offset: torch.Tensor
    code: torch.Tensor
    nested_code: torch.Tensor

    @classmethod
    def of(cls, module: Any, projection: str) -> "PackedStack":
        """Return the stack of a module that `ExpertsQuantizer` has loaded."""

        def floats(what: str) -> torch.Tensor:
            bits: torch.Tensor = getattr(module, f"{projection}_{what}")
            return bits.view(torch.float32)

        return cls(
            stack=module.nf4_stacks[projection],
            packed=getattr(module, projection).data,
            absmax=getattr(module, f"{projection}_absmax"),
            nested_absmax=floats("nested_absmax"),
            offset=floats("offset"),
            code=floats("code"),
            nested_code=floats("nested_code"),
        )

    def expert(self, number: int, dtype: torch.dtype) -> torch.Tensor:
        """Return the weight of one expert, [outputs, inputs], which may be a transposed view."""
        weight = dequantize_nf4(
            NF4Weight(
                packed=self.packed[number],
                absmax=self.absmax[number],
                code=self.code,
                shape=(self.stack.rows, self.stack.columns),
                dtype=dtype,
                nested_absmax=self.nested_absmax[number],
                nested_code=self.nested_code,
                offset=self.offset[number],
            )
        )
        return weight.T if self.stack.is_transposed else weight


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
    num_tokens, top_k = top_k_index.shape
    expert_S, order_S = top_k_index.flatten().sort(stable=True)
    counts = torch.bincount(expert_S, minlength=self.num_experts)[: self.num_experts].tolist()
    up, down = projections(self)
    x_S = hidden_states.to(dtype)[order_S // top_k]
    h_S = _projected(self, up, x_S, expert_S, counts)
    h_S = self._apply_gate(h_S) if self.has_gate else self.act_fn(h_S)
    y_S = _projected(self, down, h_S.to(dtype), expert_S, counts)
    if self.has_post_expert_norm:
        y_S = self.post_expert_norm(y_S)
    y_S = y_S * top_k_weights.flatten()[order_S, None]
    back_S = torch.empty_like(order_S)
    back_S[order_S] = torch.arange(len(order_S), device=order_S.device)
    return y_S[back_S].view(num_tokens, top_k, -1).sum(dim=1).to(hidden_states.dtype)


def _projected(
    module: Any,
    projection: str,
    x_S: torch.Tensor,
    expert_S: torch.Tensor,
    counts: list[int],
) -> torch.Tensor:
    update: LowRank | None = module.nf4_lora.get(projection)
    a = b = None
    if update is not None:
        a, b = update.a_Eri.to(x_S.dtype), update.b_Eor.to(x_S.dtype)
    scale = 0.0 if update is None else update.scale
    y_S: torch.Tensor = _ExpertLinear.apply(
        x_S, a, b, PackedStack.of(module, projection), counts, scale
    )
    if module.has_bias:
        y_S = y_S + getattr(module, f"{projection}_bias")[expert_S].to(x_S.dtype)
    return y_S


class _ExpertLinear(torch.autograd.Function):
    """y = x W_e^T + s (x A_e^T) B_e^T for rows that are sorted by expert."""

    @staticmethod
    def forward(
        ctx: Any,
        x_S: torch.Tensor,
        a_Eri: torch.Tensor | None,
        b_Eor: torch.Tensor | None,
        weights: PackedStack,
        counts: list[int],
        scale: float,
    ) -> torch.Tensor:
        y_S = x_S.new_zeros(len(x_S), weights.stack.out_features)
        for e, rows in _hit(counts):
            y = torch.mm(x_S[rows], weights.expert(e, x_S.dtype).T, out=y_S[rows])
            if a_Eri is not None and b_Eor is not None:
                y.addmm_(x_S[rows] @ a_Eri[e].T, b_Eor[e].T, alpha=scale)
        ctx.save_for_backward(x_S, a_Eri, b_Eor)
        ctx.weights, ctx.counts, ctx.scale = weights, counts, scale
        return y_S

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        x_S, a_Eri, b_Eor = ctx.saved_tensors
        dy_S = grads[0]
        dx_S = torch.zeros_like(x_S) if ctx.needs_input_grad[0] else None
        da_Eri = None if a_Eri is None else torch.zeros_like(a_Eri)
        db_Eor = None if b_Eor is None else torch.zeros_like(b_Eor)
        for e, rows in _hit(ctx.counts):
            x, dy = x_S[rows], dy_S[rows].to(x_S.dtype)
            if dx_S is not None:
                torch.mm(dy, ctx.weights.expert(e, x.dtype), out=dx_S[rows])
            if a_Eri is None:
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
