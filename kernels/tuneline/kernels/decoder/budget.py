"""How many layers store their activations for the backward: one budget trades memory for time.

A *kept* layer stores its activations; a *lean* layer recomputes them. Per layer (Llama-3.1-8B, 8192
tokens, one H100; the tensors are named in layer.py):

    kept          q, k, v, a, x2, gate, up       0.77 GB         avoids 4.4 ms of recomputation
    kept, normed  the same, and n1 and n2        0.14 GB more    avoids 0.17 ms more
    kept, wide    the same, and weights in bf16  0.44 GB more    avoids 0.39 ms of dequantisation
                  or twice in fp8                0.44 GB more    avoids 0.45 ms

The budget is used for n1 and n2 only if it suffices to keep all layers, and for dequantised weights
(operands.py) only if it suffices for all n1 and n2. Small batches gain the most from the weights,
whose dequantisation takes the same time for any number of tokens. A lean layer offloads some
tensors to host memory: those that can be copied while the next layer computes, see `parked`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from typing import Literal

import torch

from tuneline.kernels.decoder.attention_half import Saved
from tuneline.kernels.decoder.layer_weights import LayerWeights
from tuneline.kernels.decoder.stash import pinned_size
from tuneline.kernels.experts.arena import ARENA_BYTES, padded_rank
from tuneline.kernels.limits import (
    HEAD_ROOM,
    KEPT_MLP_CHUNK_TOKENS,
    MLP_CHUNK_TOKENS,
    STASH_MIN_TOKENS,
)
from tuneline.kernels.ops.attention import AttentionPlan

Budget = Literal["auto", "lean"] | float
"""Memory for stored activations and dequantised weights: `auto`, `lean` (none), or a number of GiB.
`auto` is the memory that is free now, minus the inputs of layers that are not offloaded, minus the
temporaries of a layer's backward (or of its forward, with a head that arrives meanwhile) and minus
HEAD_ROOM; without a GPU, it is the memory of all activations."""

HOST_BYTES_PER_FLOP = 8.5e-5
"""Bytes that can be copied to the host in the time of one floating-point operation of a layer's
forward: 54 GB/s divided by 640 TFLOP/s, whose time includes the norms and the dequantisation (one
H100)."""

_FP8_SPEED = 1.5
"""Speed of a layer's forward with fp8 GEMMs, relative to bf16 GEMMs."""

_ATTENTION_COST = 1.75
"""Time of a floating-point operation of the attention, relative to that of a GEMM."""

_GIB = 2**30


@dataclass(frozen=True)
class Kept:
    """How many of the last layers are kept, store n1 and n2 too, and keep dequantised weights."""

    num_layers: int = 0
    num_normed: int = 0
    num_wide: int = 0


def check_budget(budget: Budget) -> Budget:
    """Return the budget if it is valid.

    Raises:
        ValueError: The budget is neither `auto`, `lean` nor a number of GiB that is at least 0.
    """
    is_valid = budget in ("auto", "lean") if isinstance(budget, str) else budget >= 0
    if not is_valid:
        raise ValueError(f"budget={budget!r}: give 'auto', 'lean' or a number of GiB, at least 0")
    return budget


def kept_bytes(weights: LayerWeights, num_tokens: int, itemsize: int) -> int:
    """Return the bytes that a layer stores if it is kept, beyond what it stores if it is lean."""
    width = weights.qkv.num_out + weights.o.num_in + weights.o.num_columns
    width += weights.qkv.num_in
    if weights.routed is None:
        width += weights.dense_mlp()[0].num_out
    else:
        experts = weights.routed.experts
        ranks = sum(padded_rank(pair) for pair in (experts.lora.gate_up, experts.lora.down))
        width += weights.routed.top_k * (experts.gate_up.num_out + ranks)
    log_sum_exp = 4 * weights.attention.num_heads
    return num_tokens * (width * itemsize + log_sum_exp)


def normed_bytes(weights: LayerWeights, num_tokens: int, itemsize: int) -> int:
    """Return the bytes of a layer's n1 and n2, with their adapter columns and rstd."""
    columns = weights.qkv.num_columns + (weights.gate_up.num_columns if weights.gate_up else 0)
    return num_tokens * (itemsize * (2 * weights.qkv.num_in + columns) + 8)


def wide_bytes(weights: LayerWeights, itemsize: int) -> int:
    """Return the bytes of a layer's dequantised weights and of the adapters beside them."""
    return sum(group.arena_bytes(itemsize) for group in weights.groups() if group.can_keep_arena)


def workspace_bytes(weights: LayerWeights, num_tokens: int, itemsize: int) -> int:
    """Return the bytes of the temporaries at the peak of a layer's backward."""
    hidden = 8 * num_tokens * weights.qkv.num_in
    if weights.routed is not None:
        first, second = weights.routed.experts.gate_up, weights.routed.experts.down
        arena = min(first.num_experts * first.num_out * first.num_in, ARENA_BYTES // itemsize)
        # Gate and up, the gradient of h, and the sorted rows of x or of its gradient.
        row = first.num_out + second.num_in + first.num_in
        return itemsize * (arena + num_tokens * weights.routed.top_k * row + hidden)
    chunk = min(num_tokens, KEPT_MLP_CHUNK_TOKENS)
    gate_up, down = weights.dense_mlp()
    arenas = gate_up.num_out * gate_up.num_in + down.num_out * down.num_in
    # gate and up, their gradients (a kept layer does not overwrite gate and up), dh and h. The 8
    # below counts tensors of the size of x.
    temporaries = chunk * (2 * gate_up.num_out + 2 * down.num_in)
    return itemsize * (arenas + temporaries + hidden)


def forward_bytes(weights: LayerWeights, num_tokens: int, itemsize: int) -> int:
    """Return the bytes of the temporaries at the peak of a layer's forward, which is in its MLP."""
    if weights.routed is not None:
        return workspace_bytes(weights, num_tokens, itemsize)
    gate_up, down = weights.dense_mlp()
    arenas = gate_up.num_out * gate_up.num_in + down.num_out * down.num_in
    temporaries = min(num_tokens, MLP_CHUNK_TOKENS) * (gate_up.num_out + down.num_in)
    return itemsize * (arenas + temporaries + 4 * num_tokens * weights.qkv.num_in)


def usable_memory(device: torch.device) -> tuple[int, int]:
    """Return the bytes of a GPU that are free or that torch holds without using them, and all."""
    free, total = torch.cuda.mem_get_info(device)
    idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free + idle, total


@dataclass(frozen=True)
class HostRoom:
    """Host memory, and the layers and tokens that share it in one forward."""

    num_bytes: int
    num_layers: int
    num_tokens: int

    def holds(self, widths: Iterable[int], itemsize: int) -> bool:
        """Return whether every layer can offload tensors of these widths (columns per token)."""
        sizes = (pinned_size(self.num_tokens * width * itemsize) for width in widths)
        return self.num_layers * sum(sizes) <= self.num_bytes


def copied_bytes(weights: LayerWeights, plan: AttentionPlan, row_length: int) -> float:
    """Return the bytes per token that can be copied over PCIe during a layer's forward.

    Args:
        weights: A layer of the model.
        plan: The sequences of this forward.
        row_length: Tokens per row.
    """
    forward = _attention_flops(weights, plan, row_length) + 2 * weights.multiplied_weights
    if any(group.largest is not None for group in weights.groups()):
        forward /= _FP8_SPEED
    return HOST_BYTES_PER_FLOP * forward


def _attention_flops(weights: LayerWeights, plan: AttentionPlan, row_length: int) -> float:
    """Return the attention's operations per token, as GEMM operations that take the same time."""
    config = weights.attention
    lengths = plan.sequence_lengths or (row_length,)
    context = sum(n * (n + 1) for n in lengths) / (2 * sum(lengths))
    return _ATTENTION_COST * 4 * context * config.num_heads * config.head_dim


def parked(
    weights: LayerWeights,
    plan: AttentionPlan,
    row_length: int,
    itemsize: int,
    host: HostRoom | None = None,
) -> Saved | None:
    """Return which intermediates a lean layer offloads to host memory in addition to x.

    These are the intermediates that spare the backward the most recomputation, among those whose
    copies finish within one layer's forward. If the next layer had to wait for a copy, the wait
    would take longer than the recomputation that the copy avoids. A stored q, k and v, or x2,
    avoids the GEMM that computes it; a stored output of the attention avoids the attention.

    Args:
        weights: A layer of the model.
        plan: The sequences of this forward.
        row_length: Tokens per row.
        itemsize: Bytes per element of an activation.
        host: Host memory that is there; None: enough.

    Returns:
        The intermediates, or None if the host has no room for x alone.
    """
    hidden = weights.qkv.num_in
    attention = _attention_flops(weights, plan, row_length)
    # A layer with a norm after down_proj always offloads d too.
    always = [hidden] * (1 if weights.after_mlp_norm is None else 2)
    if host is not None and not host.holds(always, itemsize):
        return None
    room = copied_bytes(weights, plan, row_length) - itemsize * sum(always)
    widths = weights.qkv.num_out, weights.o.num_in + weights.o.num_columns, weights.o.num_out
    gains = 2 * hidden * weights.qkv.num_out, attention, 2 * weights.o.num_in * weights.o.num_out

    def total(choice: tuple[bool, ...], amounts: tuple[float, ...]) -> float:
        return sum(amount for chosen, amount in zip(choice, amounts, strict=True) if chosen)

    def fits(choice: tuple[bool, ...]) -> bool:
        chosen = [width for width, is_chosen in zip(widths, choice, strict=True) if is_chosen]
        in_time = itemsize * sum(chosen) <= room
        return in_time and (host is None or host.holds([*always, *chosen], itemsize))

    choices = product((False, True), repeat=3)
    fitting = [choice for choice in choices if not any(choice) or fits(choice)]
    return Saved(*max(fitting, key=lambda choice: total(choice, gains)))


def share_out(
    budget: Budget,
    layers: list[LayerWeights],
    *,
    num_tokens: int,
    itemsize: int,
    device: torch.device,
    head_bytes: int = 0,
) -> Kept:
    """Return how many layers store their activations in this forward, and their weights after it.

    Args:
        budget: Memory for stored activations.
        layers: The fused layers.
        num_tokens: Tokens of the micro-batch.
        itemsize: Bytes per element of an activation.
        device: Device of the layers. If it is not a GPU, `auto` stores all activations.
        head_bytes: Size of a head that is on the GPU only between the layers' forward and backward.
    """
    if budget == "lean" or not layers:
        return Kept()
    if budget != "auto":
        num_bytes = budget * _GIB
    elif device.type != "cuda":
        return Kept(len(layers), len(layers))
    else:
        free, total = usable_memory(device)
        workspace = max(workspace_bytes(weights, num_tokens, itemsize) for weights in layers)
        if head_bytes:
            # The head arrives while the last layers run; and the reference of a preference runs all
            # its layers while the policy's head waits for the backward.
            beside = max(forward_bytes(weights, num_tokens, itemsize) for weights in layers)
            workspace = max(workspace, head_bytes + beside)
        inputs = 0
        if num_tokens < STASH_MIN_TOKENS:
            inputs = sum(num_tokens * weights.qkv.num_in * itemsize for weights in layers)
        arenas = [g.place.arena for weights in layers for g in weights.groups()]
        held = sum(arena.nbytes for arena in arenas if arena is not None)
        num_bytes = free + held - inputs - workspace - HEAD_ROOM * total
    per_layer = max(kept_bytes(weights, num_tokens, itemsize) for weights in layers)
    num_layers = max(0, min(len(layers), int(num_bytes / per_layer)))
    if num_layers < len(layers):
        return Kept(num_layers)
    per_layer_normed = max(normed_bytes(weights, num_tokens, itemsize) for weights in layers)
    num_bytes -= num_layers * per_layer
    num_normed = min(num_layers, int(num_bytes / per_layer_normed))
    per_layer_wide = max(wide_bytes(weights, itemsize) for weights in layers)
    if num_normed < num_layers or per_layer_wide == 0:
        return Kept(num_layers, num_normed)
    num_bytes -= num_normed * per_layer_normed
    return Kept(num_layers, num_normed, min(num_layers, int(num_bytes / per_layer_wide)))
