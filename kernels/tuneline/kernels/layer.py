"""One decoder layer, forward and backward by hand, with a choice of what is kept in between.

    n1 = norm(x);  q, k, v = qkv(n1);  a = attention(rope(q), rope(k), v);  o = o_proj(a)
    x2 = x + o                          (Gemma: x + norm(o))
    n2 = norm(x2);  h = act(gate(n2)) * up(n2);  d = down(h)
    y  = x2 + d                         (Gemma: x2 + norm(d))

A *lean* layer keeps x and h A_down^T (1/64 of h), and Gemma's d. Its backward computes the layer
again up to gate and up, but neither down_proj (27 % of a Llama layer's multiplications) nor the
activation's forward, which the activation's backward yields on the way. With a host stash it
parks x there, and q, k, v and a beside it: their copies hide behind the forward too, and the
backward computes o_proj, gate and up alone. The last layer *holds* them where they are: its
backward begins before a copy could be back. A *kept* layer saves q, k, v, a, x2, gate and up, and
computes only norms again, or nothing at all where it keeps their outputs too. All run the same
kernels on the same numbers, so that the choice changes no bit of a gradient.

The MLP runs over chunks of tokens: its temporaries, three times 2 F wide, set a lean step's peak.

Shapes: B rows of L tokens, T = B L, C hidden size, F intermediate size; see lora.py for P.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tuneline.kernels.activation_lora import activation_lora_backward
from tuneline.kernels.attention import (
    AttentionConfig,
    AttentionPlan,
    attention_backward,
    attention_forward,
)
from tuneline.kernels.gated_activation import Kind, gated_activation_forward
from tuneline.kernels.lora import LoraGradients, LoraGroup, mm_wide
from tuneline.kernels.operands import (
    Fp8Operands,
    WideOperands,
    augmented_input,
    group_operands,
)
from tuneline.kernels.rms_norm import rms_norm_backward, rms_norm_forward
from tuneline.kernels.rope import rope_backward, rope_forward
from tuneline.kernels.stash import HostStash

MLP_CHUNK_TOKENS = 4096
"""A GEMM of this many rows still fills an H100; fewer rows would leave it waiting for the tail."""


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """Everything frozen and trained in one layer; norms by role, absent ones None."""

    qkv: LoraGroup
    o: LoraGroup
    gate_up: LoraGroup
    down: LoraGroup
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

    def groups(self) -> tuple[LoraGroup, LoraGroup, LoraGroup, LoraGroup]:
        """The four groups in the order of the layer's gradients."""
        return self.qkv, self.o, self.gate_up, self.down

    def norms(self) -> tuple[Tensor | None, ...]:
        """The weights of the norms, None where the family has none."""
        sandwich = self.after_attention_norm, self.after_mlp_norm
        return self.attention_norm, self.mlp_norm, self.q_norm, self.k_norm, *sandwich

    def parameters(self) -> list[Tensor]:
        """Every adapter tensor of the layer."""
        return [t for group in self.groups() for t in group.parameters()]


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
    parks: bool = False
    """Whether x, q, k, v and a wait in the stash."""
    holds: bool = False
    """Whether they wait on the device."""
    fetches: bool = False
    """Whether the layer before parks, and this one does not: its backward calls them back."""
    handover: Handover | None = None
    """One for all layers of a forward."""

    @property
    def saves_attention(self) -> bool:
        """Whether the backward finds q, k, v and a somewhere."""
        return self.keep or self.parks or self.holds


_Normed = tuple[Tensor, Tensor]
"""X' = [norm(x) | norm(x) A^T], and rstd."""


@dataclass(slots=True)
class _AttentionHalf:
    """Intermediates of x -> x2; q and k before rope only where a head norm needs them."""

    qkv_TN: Tensor
    q_BLHD: Tensor
    k_BLGD: Tensor
    attention_saved: tuple[Tensor, ...]
    o_input_TKP: Tensor
    x2_TC: Tensor
    o_TC: Tensor | None
    o_operands: WideOperands | Fp8Operands | None
    normed: _Normed | None


def fused_layer(
    x_BLC: Tensor, cos: Tensor, sin: Tensor, weights: LayerWeights, call: LayerCall
) -> Tensor:
    """Return y [B, L, C]; differentiable in x and the adapters."""
    return _LayerFunction.apply(x_BLC, cos, sin, weights, call, *weights.parameters())


class _LayerFunction(torch.autograd.Function):
    """See the module's docstring."""

    @staticmethod
    def forward(ctx: Any, x_BLC, cos, sin, weights, call, *parameters):  # noqa: D102
        y_BLC, saved = layer_forward(x_BLC, cos, sin, weights, call)
        saved = [x_BLC, *saved]
        ctx.weights, ctx.call, ctx.ticket, ctx.num_parked = weights, call, None, 0
        ctx.before = call.stash.last if call.fetches else None
        if call.parks:
            ctx.num_parked = 5 if weights.q_norm is not None else 3
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
) -> tuple[Tensor, list[Tensor | None]]:
    """Return y and what the backward wants beside x; records no gradient."""
    x_TC = x_BLC.reshape(-1, x_BLC.shape[-1])
    half = _attention_half(x_TC, x_BLC.shape, cos, sin, weights, call.plan)
    half.o_operands = None
    normed = half.normed if call.keep_normed else None
    half.normed = None
    saved: list[Tensor | None] = []
    if call.saves_attention:
        # What can be parked comes first. Without a head norm q and k are views of qkv.
        saved = [half.qkv_TN, half.o_input_TKP]
        saved += [] if weights.q_norm is None else [half.q_BLHD, half.k_BLGD]
    if call.keep:
        saved += [half.x2_TC, half.o_TC]
    attention_saved = half.attention_saved if call.saves_attention else ()
    x2_TC = half.x2_TC
    del half
    y_TC, gate_up_TF, down_input_TP, d_TC, mlp_normed = _mlp_forward(
        x2_TC, weights, call.keep, keep_normed=call.keep_normed
    )
    if normed is not None and mlp_normed is not None:
        saved += [*normed, *mlp_normed]
    saved += [down_input_TP, d_TC, gate_up_TF, *attention_saved]
    return y_TC.view(x_BLC.shape), saved


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
    """Return dx and the gradients of `weights.parameters()`; `saved` is x and the forward's.

    Nobody asks for the first layer's dx: then qkv's product with the frozen weights is saved.
    """
    # By position: None only where the layer has no such tensor.
    x_BLC, *saved = saved
    x_TC = x_BLC.reshape(-1, x_BLC.shape[-1])
    dy_TC = dy_BLC.reshape(x_TC.shape)
    if call.saves_attention:
        qkv_TN, o_input_TKP, *saved = saved
        q, k, _ = _split_heads(qkv_TN, x_BLC.shape, weights.attention)
        if weights.q_norm is not None:
            q, k, *saved = saved
    if call.keep:
        x2_TC, o_TC, *saved = saved
    normed: _Normed | None = None
    mlp_normed: _Normed | None = None
    if call.keep_normed:
        normed, mlp_normed, saved = tuple(saved[:2]), tuple(saved[2:4]), saved[4:]
    down_input_TP, d_TC, gate_up_TF, *attention_saved = saved
    if call.keep:
        half = _AttentionHalf(
            qkv_TN, q, k, tuple(attention_saved), o_input_TKP, x2_TC, o_TC, None, normed
        )
    elif call.saves_attention:
        o_operands = group_operands(weights.o, x_TC)
        half = _after_attention(
            x_TC, qkv_TN, q, k, tuple(attention_saved), o_input_TKP, o_operands, weights, None
        )
    else:
        half = _attention_half(x_TC, x_BLC.shape, cos, sin, weights, call.plan)
        half.normed = None
    handover = Handover() if call.handover is None else call.handover
    dy_TCP = handover.room_for(dy_TC, weights.down.num_columns)
    dx2_TCP, gate_up_grads, down_grads = _mlp_backward(
        dy_TC, dy_TCP, half.x2_TC, gate_up_TF, down_input_TP, d_TC, mlp_normed, weights
    )
    dx_TCP, qkv_grads, o_grads = _attention_half_backward(
        dx2_TCP, x_TC, half, cos, sin, weights, call.plan, need_dx=need_dx
    )
    grads = [g for part in (qkv_grads, o_grads, gate_up_grads, down_grads) for g in part]
    if dx_TCP is None:
        return None, grads
    handover.dx_TCP = dx_TCP
    return dx_TCP[:, : x_TC.shape[1]].unflatten(0, x_BLC.shape[:2]), grads


def _normed_input(
    x_TC: Tensor,
    norm: Tensor,
    weights: LayerWeights,
    group: LoraGroup,
    operands: WideOperands | Fp8Operands,
    x_TKP: Tensor | None = None,
) -> _Normed:
    """Write X' = [norm(x) | norm(x) A^T], and return it with rstd."""
    if x_TKP is None:
        x_TKP = augmented_input(x_TC.shape[0], group, x_TC)
    out = x_TKP[:, : group.num_in]
    _, _, rstd_T = rms_norm_forward(x_TC, norm, weights.eps, gemma=weights.gemma, out=out)
    operands.write_lora_columns(x_TKP)
    return x_TKP, rstd_T


def _split_heads(
    qkv_TN: Tensor, shape: torch.Size, config: AttentionConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """View [T, N] as q [B, L, H, D], k and v [B, L, G, D]."""
    heads_BLND = qkv_TN.view(shape[0], shape[1], -1, config.head_dim)
    return heads_BLND.split([config.num_heads, config.num_kv_heads, config.num_kv_heads], 2)


def _attention_half(
    x_TC: Tensor,
    shape: torch.Size,
    cos: Tensor,
    sin: Tensor,
    weights: LayerWeights,
    plan: AttentionPlan,
) -> _AttentionHalf:
    operands = group_operands(weights.qkv, x_TC)
    normed = _normed_input(x_TC, weights.attention_norm, weights, weights.qkv, operands)
    qkv_TN = operands.forward(normed[0])
    del operands
    q, k, v = _split_heads(qkv_TN, shape, weights.attention)
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
    group = weights.o
    o_input_TKP = augmented_input(x_TC.shape[0], group, x_TC)
    a_BLHD = _heads(o_input_TKP, group, q.shape)
    saved = attention_forward(q, k, v, plan, weights.attention, out=a_BLHD)
    o_operands = group_operands(group, x_TC)
    o_operands.write_lora_columns(o_input_TKP)
    return _after_attention(x_TC, qkv_TN, q, k, saved, o_input_TKP, o_operands, weights, normed)


def _heads(o_input_TKP: Tensor, group: LoraGroup, shape: torch.Size) -> Tensor:
    """View the attention's output [B, L, H, D] inside o_proj's input."""
    return o_input_TKP[:, : group.num_in].unflatten(0, shape[:2]).view(shape)


def _after_attention(
    x_TC: Tensor,
    qkv_TN: Tensor,
    q_BLHD: Tensor,
    k_BLGD: Tensor,
    saved: tuple[Tensor, ...],
    o_input_TKP: Tensor,
    o_operands: WideOperands | Fp8Operands,
    weights: LayerWeights,
    normed: _Normed | None,
) -> _AttentionHalf:
    if weights.after_attention_norm is None:
        x2_TC = o_operands.forward(o_input_TKP, residual_TN=x_TC)
        o_TC = None
    else:
        o_TC = o_operands.forward(o_input_TKP)
        x2_TC = _add_normed(x_TC, o_TC, weights.after_attention_norm, weights)
    return _AttentionHalf(
        qkv_TN, q_BLHD, k_BLGD, saved, o_input_TKP, x2_TC, o_TC, o_operands, normed
    )


def _attention_half_backward(
    dx2_TCP: Tensor,
    x_TC: Tensor,
    half: _AttentionHalf,
    cos: Tensor,
    sin: Tensor,
    weights: LayerWeights,
    plan: AttentionPlan,
    *,
    need_dx: bool,
) -> tuple[Tensor | None, list[Tensor], list[Tensor]]:
    """Return dx with down_proj's P columns beside it, still empty, and the adapters' gradients."""
    shape, config, group = half.q_BLHD.shape, weights.attention, weights.o
    dx2_TC = dx2_TCP[:, : group.num_out]
    do_TCP: Tensor | None = dx2_TCP
    do_TC = dx2_TC
    if weights.after_attention_norm is not None:
        assert half.o_TC is not None
        do_TCP = None
        do_TC = _normed_gradient(dx2_TC, half.o_TC, weights.after_attention_norm, weights)
    operands = group_operands(group, x_TC) if half.o_operands is None else half.o_operands
    half.o_operands = None
    da_TK, g_TP = operands.input_gradient(do_TC, do_TCP)
    del operands
    o_grads = LoraGradients(group)
    o_grads.add(
        do_TC, g_TP, half.o_input_TKP[:, : group.num_in], half.o_input_TKP[:, group.num_in :]
    )
    q_in, k_in, v = _split_heads(half.qkv_TN, shape, config)
    dqkv_TN = torch.empty_like(half.qkv_TN)
    dq_out, dk_out, dv_out = _split_heads(dqkv_TN, shape, config)
    dq, dk = attention_backward(
        da_TK.view(shape),
        half.q_BLHD,
        half.k_BLGD,
        v,
        _heads(half.o_input_TKP, group, shape),
        half.attention_saved,
        plan,
        config,
        out=(dq_out, dk_out, dv_out),
    )
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
    del dq, dk
    operands = group_operands(weights.qkv, x_TC)
    if half.normed is None:
        half.normed = _normed_input(x_TC, weights.attention_norm, weights, weights.qkv, operands)
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
    dx_TCP = x_TC.new_empty(x_TC.shape[0], num_in + weights.down.num_columns)
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


def _chunks(num_tokens: int) -> list[slice]:
    """Split the tokens evenly into the fewest chunks of at most MLP_CHUNK_TOKENS."""
    num_chunks = -(-num_tokens // MLP_CHUNK_TOKENS)
    size = -(-num_tokens // num_chunks)
    return [slice(start, min(start + size, num_tokens)) for start in range(0, num_tokens, size)]


def _mlp_forward(
    x2_TC: Tensor, weights: LayerWeights, keep: bool, *, keep_normed: bool
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None, _Normed | None]:
    """Return y, gate and up if kept, h A_down^T, down's output if a norm follows it, n2 if kept.

    x2 is overwritten by y unless it is kept or still needed whole.
    """
    num_tokens, gate_up, down = x2_TC.shape[0], weights.gate_up, weights.down
    sandwich = weights.after_mlp_norm is not None
    in_place = not keep and not sandwich
    y_TC = x2_TC if in_place else torch.empty_like(x2_TC)
    gate_up_TF = x2_TC.new_empty(num_tokens, gate_up.num_out) if keep else None
    down_input_TP = x2_TC.new_empty(num_tokens, down.num_columns)
    normed_TKP = augmented_input(num_tokens, gate_up, x2_TC) if keep_normed else None
    rstds = []
    gate_up_operands, down_operands = group_operands(gate_up, x2_TC), group_operands(down, x2_TC)
    for rows in _chunks(num_tokens):
        x_TKP = None if normed_TKP is None else normed_TKP[rows]
        x_TKP, rstd_n = _normed_input(
            x2_TC[rows], weights.mlp_norm, weights, gate_up, gate_up_operands, x_TKP
        )
        rstds.append(rstd_n)
        out = None if gate_up_TF is None else gate_up_TF[rows]
        gate_up_nF = gate_up_operands.forward(x_TKP, out=out)
        h_TKP = augmented_input(x_TKP.shape[0], down, x2_TC)
        gated_activation_forward(gate_up_nF, weights.activation, out=h_TKP[:, : down.num_in])
        del gate_up_nF, out
        down_operands.write_lora_columns(h_TKP)
        down_input_TP[rows] = h_TKP[:, down.num_in :]
        residual_nC = None if sandwich else x2_TC[rows]
        down_operands.forward(h_TKP, residual_TN=residual_nC, out=y_TC[rows])
    normed = None if normed_TKP is None else (normed_TKP, torch.cat(rstds))
    if weights.after_mlp_norm is None:
        return y_TC, gate_up_TF, down_input_TP, None, normed
    sum_TC = _add_normed(x2_TC, y_TC, weights.after_mlp_norm, weights)
    return sum_TC, gate_up_TF, down_input_TP, y_TC, normed


def _mlp_backward(
    dy_TC: Tensor,
    dy_TCP: Tensor | None,
    x2_TC: Tensor,
    gate_up_TF: Tensor | None,
    down_input_TP: Tensor,
    d_TC: Tensor | None,
    normed: _Normed | None,
    weights: LayerWeights,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Return dx2 with o_proj's P columns beside it, still empty, and the adapters' gradients."""
    gate_up, down = weights.gate_up, weights.down
    num_tokens, num_hidden = x2_TC.shape
    dd_TC = dy_TC
    if weights.after_mlp_norm is not None:
        assert d_TC is not None
        dd_TC, dy_TCP = _normed_gradient(dy_TC, d_TC, weights.after_mlp_norm, weights), None
    gate_up_operands, down_operands = group_operands(gate_up, x2_TC), group_operands(down, x2_TC)
    gate_up_grads, down_grads = LoraGradients(gate_up), LoraGradients(down)
    dx2_TCP = x2_TC.new_empty(num_tokens, num_hidden + weights.o.num_columns)
    for rows in _chunks(num_tokens):
        x2_nC, dd_nC = x2_TC[rows], dd_TC[rows]
        x_TKP, rstd_n = (
            _normed_input(x2_nC, weights.mlp_norm, weights, gate_up, gate_up_operands)
            if normed is None
            else (normed[0][rows], normed[1][rows])
        )
        kept = gate_up_TF is not None
        gate_up_nF = gate_up_operands.forward(x_TKP) if gate_up_TF is None else gate_up_TF[rows]
        room_nCP = None if dy_TCP is None else dy_TCP[rows]
        dh_nF, g_TP = down_operands.input_gradient(dd_nC, room_nCP)
        num_in = gate_up.num_in
        # One pass over dh, gate and up gives their gradients and two of the adapters'.
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
    return dx2_TCP, gate_up_grads.split(), down_grads.split()


def _add_normed(x_TC: Tensor, branch_TC: Tensor, norm: Tensor, weights: LayerWeights) -> Tensor:
    """Return x + norm(branch)."""
    normed, _, _ = rms_norm_forward(branch_TC, norm, weights.eps, gemma=weights.gemma)
    return normed.add_(x_TC)


def _normed_gradient(
    dy_TC: Tensor, branch_TC: Tensor, norm: Tensor, weights: LayerWeights
) -> Tensor:
    """Return the gradient of norm(branch) with respect to branch; rstd is computed again."""
    _, _, rstd_T = rms_norm_forward(branch_TC, norm, weights.eps, gemma=weights.gemma)
    return rms_norm_backward(dy_TC, branch_TC, norm, rstd_T, gemma=weights.gemma)[0]
