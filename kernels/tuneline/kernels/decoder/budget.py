"""How many layers keep what: memory for time, by one number.

    kept          q, k, v, a, x2, gate, up     0.77 GB a Llama-3.1-8B layer of 8192 tokens, 4.4 ms
    kept, normed  n1 and n2 as well            0.14 GB more, 0.17 ms                   (one H100)

Once all layers are kept, what is left goes to their norms' outputs. A layer that does not keep
parks in the host's memory what can be copied there while the next layer computes, see `parked`.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Literal

import torch

from tuneline.kernels.decoder.attention_half import Saved
from tuneline.kernels.decoder.layer_weights import LayerWeights
from tuneline.kernels.limits import HEAD_ROOM, KEPT_MLP_CHUNK_TOKENS
from tuneline.kernels.ops.attention import AttentionPlan

Budget = Literal["auto", "lean"] | float
"""`auto`: what is free now, less head-room; `lean`: nothing; or GiB for kept activations."""

HOST_BYTES_PER_FLOP = 8.5e-5
"""Bytes that reach the host behind one operation of a layer's forward: 54 GB/s beside 640 TFLOP/s,
the norms and the dequantisation counted in (one H100)."""

_FP8_SPEED = 1.5
"""Of a layer's forward."""

_ATTENTION_COST = 1.75
"""Of an operation of the attention, beside one of a GEMM."""

_GIB = 2**30


@dataclass(frozen=True)
class Kept:
    """The last layers that keep, and the last of those that keep their norms' outputs too."""

    num_layers: int = 0
    num_normed: int = 0


def check_budget(budget: Budget) -> Budget:
    """Return the budget.

    Raises:
        ValueError: It is neither a known word nor a number of GiB from 0 on.
    """
    known = budget in ("auto", "lean") if isinstance(budget, str) else budget >= 0
    if not known:
        raise ValueError(f"budget={budget!r}: give 'auto', 'lean' or a number of GiB from 0 on")
    return budget


def kept_bytes(weights: LayerWeights, num_tokens: int, itemsize: int) -> int:
    """Bytes that one kept layer holds beyond a lean one."""
    width = weights.qkv.num_out + weights.o.num_in + weights.o.num_columns
    width += weights.qkv.num_in + weights.gate_up.num_out
    log_sum_exp = 4 * weights.attention.num_heads
    return num_tokens * (width * itemsize + log_sum_exp)


def normed_bytes(weights: LayerWeights, num_tokens: int, itemsize: int) -> int:
    """Bytes that the outputs of one layer's two norms take, the adapters' columns beside them."""
    groups = weights.qkv, weights.gate_up
    return num_tokens * sum(itemsize * (g.num_in + g.num_columns) + 4 for g in groups)


def workspace_bytes(weights: LayerWeights, num_tokens: int, itemsize: int) -> int:
    """Bytes of the temporaries at the peak of a layer's backward."""
    chunk = min(num_tokens, KEPT_MLP_CHUNK_TOKENS)
    gate_up, down = weights.gate_up, weights.down
    arenas = gate_up.num_out * gate_up.num_in + down.num_out * down.num_in
    # gate and up twice (kept layers cannot overwrite them), dh, h; and eight tensors as x.
    temporaries = chunk * (2 * gate_up.num_out + 2 * down.num_in)
    return itemsize * (arenas + temporaries + 8 * num_tokens * gate_up.num_in)


def parked(weights: LayerWeights, plan: AttentionPlan, row_length: int, itemsize: int) -> Saved:
    """Choose what a lean layer parks beside x: what saves the backward most operations.

    No more than hides behind a layer's forward: a copy that the next layer waits for costs more
    than the products that it saves. Each of these saves 2 C operations for every number copied,
    the attention's output the attention's besides.
    """
    hidden, config = weights.qkv.num_in, weights.attention
    lengths = plan.sequence_lengths or (row_length,)
    context = sum(n * (n + 1) for n in lengths) / (2 * sum(lengths))
    attention = _ATTENTION_COST * 4 * context * config.num_heads * config.head_dim
    forward = attention + 2 * sum(group.num_out * group.num_in for group in weights.groups())
    if any(group.largest is not None for group in weights.groups()):
        forward /= _FP8_SPEED
    # Gemma parks d too.
    always = hidden * (1 if weights.after_mlp_norm is None else 2)
    room = HOST_BYTES_PER_FLOP * forward - itemsize * always
    widths = weights.qkv.num_out, weights.o.num_in + weights.o.num_columns, weights.o.num_out
    gains = 2 * hidden * weights.qkv.num_out, attention, 2 * weights.o.num_in * weights.o.num_out

    def total(choice: tuple[bool, ...], amounts: tuple[float, ...]) -> float:
        return sum(amount for chosen, amount in zip(choice, amounts, strict=True) if chosen)

    choices = product((False, True), repeat=3)
    fitting = [c for c in choices if itemsize * total(c, widths) <= room or not any(c)]
    return Saved(*max(fitting, key=lambda choice: total(choice, gains)))


def share_out(
    budget: Budget,
    layers: list[LayerWeights],
    *,
    num_tokens: int,
    itemsize: int,
    device: torch.device,
) -> Kept:
    """Return what the layers keep for this forward."""
    if budget == "lean" or not layers:
        return Kept()
    if budget != "auto":
        num_bytes = budget * _GIB
    elif device.type != "cuda":
        return Kept(len(layers), len(layers))
    else:
        free, total = torch.cuda.mem_get_info(device)
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        workspace = max(workspace_bytes(weights, num_tokens, itemsize) for weights in layers)
        num_bytes = free - workspace - HEAD_ROOM * total
    per_layer = max(kept_bytes(weights, num_tokens, itemsize) for weights in layers)
    num_layers = max(0, min(len(layers), int(num_bytes / per_layer)))
    if num_layers < len(layers):
        return Kept(num_layers)
    per_layer_normed = max(normed_bytes(weights, num_tokens, itemsize) for weights in layers)
    rest = num_bytes - num_layers * per_layer
    return Kept(num_layers, min(len(layers), int(rest / per_layer_normed)))
