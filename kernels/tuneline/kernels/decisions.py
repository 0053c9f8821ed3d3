"""How the layers of a patched model run in a forward, and what is remembered for the next forward.

`decide` returns which layers are fused, what each stores, whether a CUDA graph replays them, and at
which layer the copy of a head in host memory begins.
"""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from tuneline.kernels.binding import bind_layer, fingerprint
from tuneline.kernels.binding_adapter import Unfusable
from tuneline.kernels.decoder.attention_half import Saved
from tuneline.kernels.decoder.budget import (
    Budget,
    HostRoom,
    Kept,
    copied_bytes,
    parked,
    share_out,
)
from tuneline.kernels.decoder.graph import (
    GraphCache,
    GraphedStack,
    Room,
    graph_addresses,
)
from tuneline.kernels.decoder.layer import Handover, LayerCall
from tuneline.kernels.decoder.layer_weights import LayerWeights
from tuneline.kernels.decoder.stash import HostStash, half_of_free_memory
from tuneline.kernels.limits import STASH_MIN_TOKENS, is_replayed
from tuneline.kernels.ops.attention import AttentionPlan
from tuneline.kernels.ops.host_tables import HostHead
from tuneline.kernels.spec import FamilySpec

logger = logging.getLogger(__name__)

_MAX_STATES = 2
"""Number of states of a layer whose weights are remembered: with and without its adapters."""


@dataclass(slots=True)
class Engine:
    """State of a patched decoder between forwards; a copy of the model gets a new state."""

    budget: Budget
    specs: dict[int, FamilySpec]
    fp8: bool = False
    inference: bool = False
    """Whether layers run fused in eval mode without gradients, and not in training mode."""
    host_bytes: int | None = None
    """Host memory for the tensors of the stash; set when the stash is created."""
    stash: HostStash | None = None
    head: HostHead | None = None
    """The head, if it is in host memory."""
    graphs: GraphCache = field(default_factory=GraphCache)
    bound: dict[int, dict[tuple[Any, ...], LayerWeights | None]] = field(default_factory=dict)
    """State of a layer -> its weights, for the last states of each layer."""
    current: dict[int, LayerWeights | None] = field(default_factory=dict)
    """Weights of each layer in the last forward with gradients."""
    checks_always: bool = True
    is_checked: bool = False
    last_kept: Kept | None = None
    """The choice of the last forward with gradients. The next one keeps dequantised weights in no
    more layers, so that batches of different sizes do not free and dequantise them in turn."""
    kept_in_graphs: dict[int, Kept] = field(default_factory=dict)
    repeated: dict[tuple[Any, ...], _Repeated] = field(default_factory=dict)
    """Decisions of forwards that replay graphs, by shape, since the layers were last checked."""

    @property
    def trusts_last_check(self) -> bool:
        """Whether this forward takes the layers to be those of the last forward with gradients."""
        return torch.is_grad_enabled() and self.is_checked and not self.checks_always

    def __deepcopy__(self, memo: dict[int, Any]) -> Engine:
        head = copy.deepcopy(self.head, memo)
        return Engine(self.budget, self.specs, self.fp8, self.inference, self.host_bytes, head=head)


@dataclass(frozen=True, slots=True)
class ModelCall:
    """The decisions of one forward.

    A layer whose index is not in `layers` runs its stock forward.
    """

    layers: dict[int, tuple[LayerWeights, LayerCall]]
    graphs: GraphCache | None = None
    """Set if all layers may run as a CUDA graph, which is replayed at the first layer."""
    done: list[bool] = field(default_factory=list)
    head: HostHead | None = None
    head_at: int = 0
    """Index of the layer at which the copy of the head to the GPU begins."""
    addresses: tuple[Any, ...] = ()
    """What a graph of these layers depends on; see `graph_addresses`."""

    @property
    def selects(self) -> bool:
        """Whether the last layer returns the hidden states of the selected tokens only."""
        return any(call.selected_S is not None for _, call in self.layers.values())

    def again(self, plan: AttentionPlan) -> ModelCall:
        """Return the same decisions for the sequences of another forward."""
        handover = Handover()
        layers = {
            index: (weights, replace(call, plan=plan, handover=handover))
            for index, (weights, call) in self.layers.items()
        }
        return replace(self, layers=layers, done=[])

    def graphed_stack(self, x_BLC: Tensor, cos: Tensor, sin: Tensor) -> GraphedStack | None:
        """Return a graph of all layers, or None; see `GraphCache.find`."""
        if self.graphs is None:
            return None
        return self.graphs.find(list(self.layers.values()), self.addresses, x_BLC, cos, sin)


@dataclass(frozen=True, slots=True)
class _Repeated:
    """The decision of a forward that replays a graph, and what else it holds for."""

    call: ModelCall
    kept: Kept
    longest: int
    """Tokens of the longest sequence."""


def decide(
    decoder: Any, plan: AttentionPlan, tokens: Tensor, selected_S: Tensor | None = None
) -> ModelCall | None:
    """Bind the layers and decide how each runs.

    The last layers store their activations, because their backward runs first.

    Args:
        decoder: The patched stack of layers.
        plan: The sequences of this forward.
        tokens: Token IDs [B, L] or embeddings [B, L, H].
        selected_S: Indices of the tokens of one row whose hidden states are wanted; None: all. No
            family reads the others after the last layer's attention.
    """
    engine: Engine = decoder._tuneline_engine
    device, num_tokens = tokens.device, tokens.shape[0] * tokens.shape[1]
    longest = max(plan.sequence_lengths or (tokens.shape[1],))
    mixed = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type)
    room = Room.of(plan, num_tokens)
    form = (tokens.shape if room is None else room, mixed)
    if engine.trusts_last_check:
        last = engine.repeated.get(form)
        if last is not None and last.kept == engine.last_kept and longest <= last.longest:
            return last.call.again(plan)
    bound: dict[int, LayerWeights] = {}
    for index, current in _bound_layers(decoder, engine).items():
        if current is not None and longest <= (current.max_positions or longest):
            bound[index] = current
    if not bound:
        return None
    dtype = next(iter(bound.values())).attention_norm.dtype
    embedding = decoder.get_input_embeddings().weight.dtype
    if embedding != dtype or mixed not in (False, dtype):
        # The hidden states have another dtype than the layers. Only the stock forward casts them.
        return None
    head_at = _head_at(engine.head, bound, plan, tokens)
    if not torch.is_grad_enabled():
        layers, end = {}, len(decoder.layers) - 1
        for index, weights in bound.items():
            of_layer = LayerCall(
                plan,
                inference=engine.inference,
                overwrites=engine.inference and _is_only_reader(decoder, index),
                selected_S=selected_S if index == end else None,
            )
            layers[index] = weights, of_layer
        return ModelCall(layers, head=engine.head, head_at=head_at)
    # After its capture, a graph occupies memory that is then not free. So the choice that was made
    # before the capture is used again.
    graph_tokens = num_tokens if room is None else room.num_tokens
    kept = engine.kept_in_graphs.get(graph_tokens)
    if kept is None:
        kept = share_out(
            engine.budget,
            list(bound.values()),
            num_tokens=num_tokens,
            itemsize=dtype.itemsize,
            device=device,
            head_bytes=0 if engine.head is None else engine.head.weight.nbytes,
        )
    if engine.last_kept is not None:
        kept = replace(kept, num_wide=min(kept.num_wide, engine.last_kept.num_wide))
    engine.last_kept = kept
    if engine.stash is None and device.type == "cuda":
        engine.stash = HostStash()
        if engine.host_bytes is None:
            # Read once: what the stash holds is no longer free.
            engine.host_bytes = half_of_free_memory()
    # If all layers are kept, they leave the stash alone. It may hold a copy of an earlier forward,
    # and a layer that waits for the copy cannot be captured in a graph.
    is_parking = num_tokens >= STASH_MIN_TOKENS and kept.num_layers < len(bound)
    stash = engine.stash if is_parking else None
    host = None
    if stash is not None and engine.host_bytes is not None:
        host = HostRoom(engine.host_bytes, len(bound) - kept.num_layers, num_tokens)
    # One choice for all layers, because the layers of a model have similar sizes.
    waits = parked(next(iter(bound.values())), plan, tokens.shape[1], dtype.itemsize, host)
    if waits is None:
        stash, waits = None, Saved()
    layers, handover = {}, Handover()
    for place, (index, weights) in enumerate(bound.items()):
        from_last = len(bound) - 1 - place
        keep = from_last < kept.num_layers
        for group in weights.groups():
            group.place.keep(from_last < kept.num_wide and group.can_keep_arena)
        layers[index] = (
            weights,
            LayerCall(
                plan,
                keep,
                keep_normed=from_last < kept.num_normed,
                stash=stash,
                waits=waits,
                holds=stash is not None and from_last == 0 and not keep,
                # True for the first layer that does not park; a preceding layer, if any, parks.
                fetches=stash is not None and from_last == max(kept.num_layers, 1) - 1,
                narrow=engine.head is not None and index >= head_at,
                handover=handover,
            ),
        )
    dtypes = {p.dtype for weights in bound.values() for p in weights.parameters()}
    fp8 = engine.fp8 and kept.num_layers == len(bound)
    graphed = (
        device.type == "cuda"
        # A graph takes the memory that tables on the host are there to save.
        and engine.head is None
        and is_replayed(next(iter(bound.values())).multiplied_weights, num_tokens, fp8=fp8)
        # The tensors of a graph cannot be offloaded to host memory.
        and stash is None
        and len(bound) == len(decoder.layers)
        and all(spec.num_ropes == 1 for spec in engine.specs.values())
        and all(weights.routed is None for weights in bound.values())
        and len(dtypes) == 1
    )
    if not graphed:
        return ModelCall(layers, head=engine.head, head_at=head_at)
    engine.kept_in_graphs[graph_tokens] = kept
    addresses = graph_addresses(list(layers.values()))
    call = ModelCall(layers, engine.graphs, addresses=addresses)
    engine.repeated[form] = _Repeated(call, kept, longest)
    return call


def _is_only_reader(decoder: Any, index: int) -> bool:
    """Return whether nothing but a layer reads its input.

    The caller may hold the input of the first layer, and a hook that of any layer.
    """
    layer, before = decoder.layers[index], decoder.layers[index - 1]
    return index > 0 and not (
        layer._forward_pre_hooks or layer._forward_hooks or before._forward_hooks
    )


def _head_at(
    head: HostHead | None, bound: dict[int, LayerWeights], plan: AttentionPlan, tokens: Tensor
) -> int:
    """Return the layer at which the copy of the head begins, to arrive as the last layer ends.

    The number of layers that run beside the copy is rounded down, because they have less memory.
    """
    if head is None:
        return 0
    layer = copied_bytes(next(iter(bound.values())), plan, tokens.shape[1])
    num_layers = int(head.weight.nbytes / (layer * tokens.shape[0] * tokens.shape[1]))
    return list(bound)[-min(max(num_layers, 1), len(bound))]


def _bound_layers(decoder: Any, engine: Engine) -> dict[int, LayerWeights | None]:
    """Return the weights of each layer, bound again where the layer has changed.

    A forward without gradients, which may run without the adapters, is always checked.
    """
    if engine.trusts_last_check:
        return engine.current
    trains = torch.is_grad_enabled()
    found: dict[int, LayerWeights | None] = {}
    for index, spec in engine.specs.items():
        layer = decoder.layers[index]
        state = fingerprint(layer, spec)
        states = engine.bound.setdefault(index, {})
        if state not in states:
            if len(states) == _MAX_STATES:
                del states[next(iter(states))]
            states[state] = None
            try:
                states[state] = bind_layer(
                    layer, spec, decoder.config, fp8=engine.fp8, inference=engine.inference
                )
            except Unfusable as reason:
                logger.info("layer %d runs stock: %s", index, reason)
        found[index] = states[state]
    if trains:
        for index, before in engine.current.items():
            if before is not None and before is not found[index]:
                for group in before.groups():
                    group.place.keep(False)
        engine.current, engine.is_checked = found, True
        engine.repeated.clear()
    return found
