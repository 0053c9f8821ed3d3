"""The weights of a decoder layer, and the norms at the start or end of its two halves.

Shapes: T tokens, C hidden size, K inputs of a group, P its padded columns (see lora.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tuneline.kernels.decoder.operands import Operands, augmented_input
from tuneline.kernels.experts.mlp import Experts
from tuneline.kernels.ops.attention import AttentionConfig
from tuneline.kernels.ops.gated_activation import Kind
from tuneline.kernels.ops.lora import LoraGroup
from tuneline.kernels.ops.rms_norm import rms_norm_backward, rms_norm_forward

Normed = tuple[Tensor, Tensor]
"""X' = [norm(x) | norm(x) A^T], and the rstd of x."""


@dataclass(frozen=True, slots=True)
class RoutedMlp:
    """The MLPs of a mixture of experts, and the stock forward of the router.

    The router returns its logits [T, E], the weights [T, k] and the indices [T, k] of the experts
    of each token; it is frozen.
    """

    experts: Experts
    module: Any
    top_k: int

    def router(self, n2_TC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Run the stock router without its hooks."""
        logits_TE, weights_Tk, index_Tk = self.module.forward(n2_TC)
        return logits_TE, weights_Tk, index_Tk


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """All frozen weights and adapters of a layer; a norm that its family does not have is None."""

    qkv: LoraGroup
    o: LoraGroup
    gate_up: LoraGroup | None
    """The first group of a dense MLP; None if the MLP is routed."""
    down: LoraGroup | None
    """The second group of a dense MLP; None if the MLP is routed."""
    attention: AttentionConfig
    activation: Kind
    eps: float
    gemma: bool
    attention_norm: Tensor
    mlp_norm: Tensor
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    after_attention_norm: Tensor | None = None
    after_mlp_norm: Tensor | None = None
    rotates: bool = True
    """Whether q and k are rotated; some layers of SmolLM3 have no positions."""
    branch_scale: float = 1.0
    """Multiplies what each half adds to the residual stream (Granite)."""
    max_positions: int | None = None
    """Longest sequence that the fused layer computes; a longer one needs the stock layer."""
    routed: RoutedMlp | None = None
    """The experts, or None if the MLP is dense."""

    def groups(self) -> tuple[LoraGroup, ...]:
        """Return the groups of dense linears in the order of the layer's gradients."""
        groups = self.qkv, self.o, self.gate_up, self.down
        return tuple(group for group in groups if group is not None)

    def dense_mlp(self) -> tuple[LoraGroup, LoraGroup]:
        """Return the two groups of a dense MLP."""
        assert self.gate_up is not None and self.down is not None
        return self.gate_up, self.down

    @property
    def mlp_columns(self) -> int:
        """Columns that the MLP's backward wants beside dy, for G of down_proj."""
        return 0 if self.down is None else self.down.num_columns

    @property
    def multiplied_weights(self) -> int:
        """Number of weights that a token is multiplied by, the head's and the router's aside."""
        dense = sum(group.num_out * group.num_in for group in self.groups())
        if self.routed is None:
            return dense
        stacks = self.routed.experts.gate_up, self.routed.experts.down
        return dense + self.routed.top_k * sum(s.num_out * s.num_in for s in stacks)

    def norms(self) -> tuple[Tensor | None, ...]:
        """Return the weights of the norms; None for each norm that the family does not have."""
        sandwich = self.after_attention_norm, self.after_mlp_norm
        return self.attention_norm, self.mlp_norm, self.q_norm, self.k_norm, *sandwich

    def parameters(self) -> list[Tensor]:
        """Return every adapter tensor of the layer."""
        dense = [t for group in self.groups() for t in group.parameters()]
        return dense if self.routed is None else [*dense, *self.routed.experts.parameters()]


def normed_input(
    x_TC: Tensor,
    norm: Tensor,
    weights: LayerWeights,
    group: LoraGroup,
    operands: Operands,
    x_TKP: Tensor | None = None,
    *,
    copy_TC: Tensor | None = None,
) -> Normed:
    """Return X' = [norm(x) | norm(x) A^T] and the rstd of x.

    Args:
        x_TC: Input of the norm.
        norm: Scale of the norm [C].
        weights: The layer's weights.
        group: The group that reads X'.
        operands: The group's operands, which compute norm(x) A^T.
        x_TKP: Where X' is written; allocated if None.
        copy_TC: Where a copy of x is written; see `residual_copy`.
    """
    if x_TKP is None:
        x_TKP = augmented_input(x_TC.shape[0], group, x_TC)
    out = x_TKP[:, : group.num_in]
    _, _, rstd_T = rms_norm_forward(
        x_TC, norm, weights.eps, gemma=weights.gemma, out=out, sum_out=copy_TC
    )
    operands.write_lora_columns(x_TKP)
    return x_TKP, rstd_T


def residual_copy(x_TC: Tensor, group: LoraGroup, out: Tensor | None = None) -> Tensor | None:
    """Return where to copy x, to which the group's GEMM then adds its product; or None.

    If GEMM and sum are to end in another tensor than x, cuBLAS wants x there beforehand. The norm,
    which reads x anyway, writes that copy at half the price of torch's. fp8 GEMMs need none.

    Args:
        x_TC: Residual stream.
        group: o_proj or down_proj.
        out: Where the sum goes, if it is given.
    """
    if group.largest is not None:
        return None
    return torch.empty_like(x_TC) if out is None else out


def add_normed(x_TC: Tensor, branch_TC: Tensor, norm: Tensor, weights: LayerWeights) -> Tensor:
    """Return x + norm(branch).

    Args:
        x_TC: Residual stream.
        branch_TC: Output of o_proj or down_proj.
        norm: Scale of the norm [C].
        weights: The layer's weights.
    """
    normed, _, _ = rms_norm_forward(branch_TC, norm, weights.eps, gemma=weights.gemma)
    return normed.add_(x_TC)


def normed_gradient(
    dy_TC: Tensor, branch_TC: Tensor, norm: Tensor, weights: LayerWeights
) -> Tensor:
    """Return the gradient of norm(branch) with respect to branch; rstd is recomputed.

    Args:
        dy_TC: Gradient of norm(branch).
        branch_TC: Output of o_proj or down_proj.
        norm: Scale of the norm [C].
        weights: The layer's weights.
    """
    _, _, rstd_T = rms_norm_forward(branch_TC, norm, weights.eps, gemma=weights.gemma)
    return rms_norm_backward(dy_TC, branch_TC, norm, rstd_T, gemma=weights.gemma)[0]
