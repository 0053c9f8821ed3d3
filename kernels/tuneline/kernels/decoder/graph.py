"""The stack of fused layers as two CUDA graphs, for micro-batches that are too small for the host.

A layer's forward and backward are about 120 launches. At 1024 tokens the GPU runs them in 2 ms
(H200), but the host needs 9 ms to launch them; replaying a graph removes that cost. A graph owns
its inputs, activations and gradients, so the backward of one replay must run before the forward of
the next replay. While a backward is outstanding, other forwards run layer by layer, without a
graph.

Packed rows differ in their numbers of tokens and sequences. A packed row is copied into tensors of
a slightly larger size, its `Room`. The unused tokens at the end of these tensors form an additional
sequence, whose gradient is zero. GSM8K's rows in packs of 2048 tokens need four rooms, so all
graphs of a model have one memory pool: the activations of one lie where those of another were, as
far as these were as large. A graph that is captured after a smaller one adds to the pool.

A replay computes all gradients at once, but autograd still receives them layer by layer, last layer
first. DeepSpeed's ZeRO-2 puts gradients into buckets in the order of their arrival and sums the
buckets over ranks, so the order must be the same on a rank that replays a graph and on a rank that
runs layer by layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any, cast

import torch
import triton
from torch import Tensor
from torch._utils import _unflatten_dense_tensors

from tuneline.kernels.decoder.budget import (
    kept_bytes,
    normed_bytes,
    usable_memory,
    workspace_bytes,
)
from tuneline.kernels.decoder.layer import LayerCall, layer_backward, layer_forward
from tuneline.kernels.decoder.layer_weights import LayerWeights
from tuneline.kernels.ops.attention import AttentionPlan
from tuneline.kernels.ops.flatten import Flattener

MEMORY_SHARE = 0.5
"""Fraction of the GPU's memory that the activations of a graph may take."""

MAX_GRAPHS = 16
"""Number of shapes that are captured, first come, first served: rows that are not packed have as
many shapes as lengths. Besides the memory that graphs share, each has its inputs and outputs."""

Layers = Sequence[tuple[LayerWeights, LayerCall]]


def held_bytes(layers: Layers, num_tokens: int, itemsize: int) -> int:
    """Return the bytes of the activations that a graph stores between its forward and backward."""
    num_bytes = 0
    for weights, call in layers:
        num_bytes += num_tokens * weights.qkv.num_in * itemsize
        num_bytes += call.keep * kept_bytes(weights, num_tokens, itemsize)
        num_bytes += call.keep_normed * normed_bytes(weights, num_tokens, itemsize)
    return num_bytes


@dataclass(frozen=True)
class Room:
    """The size to which a packed row is padded, so that a few graphs serve all packed rows."""

    num_tokens: int
    num_sequences: int
    longest: int

    @classmethod
    def of(cls, plan: AttentionPlan, num_tokens: int) -> Room | None:
        """Return the room of a packed row, or None for dense rows, which are not padded."""
        if plan.sequence_lengths is None:
            return None
        rounded = -(-num_tokens // 128) * 128
        # The additional sequence consists of the unused tokens at the end.
        sequences = cast(int, triton.next_power_of_2(len(plan.sequence_lengths) + 1))
        longest = cast(int, triton.next_power_of_2(max(128, *plan.sequence_lengths)))
        return cls(rounded, sequences, longest)

    def plan(self, device: torch.device) -> AttentionPlan:
        """Return the plan of the capture; each replay first fills in its sequences' bounds."""
        bounds = torch.zeros(self.num_sequences + 1, dtype=torch.int32, device=device)
        return AttentionPlan((self.longest,) * self.num_sequences, bounds)


@dataclass
class GraphMemory:
    """The memory in which all graphs of a model store their activations, one graph at a time."""

    pool: Any = None
    """Handle of the memory pool; None if no graph is in it."""
    flat_grads: Tensor | None = None
    """Gradients of all adapters, which a backward writes and its caller copies."""
    generation: int = 0
    """Number of forwards that have written activations."""
    num_claims: int = 0
    """Number of forwards that wait for their backward."""

    @property
    def is_free(self) -> bool:
        """Whether no forward is waiting for its backward."""
        return self.num_claims == 0


class _Replay:
    """A forward's reservation of the graphs' memory.

    It ends with the backward of that forward, or when this object is deleted.
    """

    def __init__(self, stack: GraphedStack) -> None:
        self.stack, self.memory, self.claimed = stack, stack.memory, True
        self.memory.generation += 1
        self.memory.num_claims += 1
        self.generation = self.memory.generation
        self._grads: list[list[Tensor]] = []

    def backward(self, dy_BLC: Tensor) -> Tensor:
        """Return dx of the stack; `take_gradients` then returns the adapters' gradients."""
        if self.generation != self.memory.generation:
            raise RuntimeError(
                "the activations of this forward were overwritten by a later one: run backward "
                "before the next forward, or patch(model, budget='lean') with more tokens"
            )
        dx_BLC, self._grads = self.stack.replay_backward(dy_BLC)
        self.release()
        return dx_BLC

    def take_gradients(self) -> list[Tensor]:
        """Return the gradients of one layer; repeated calls go from the last layer to the first."""
        return self._grads.pop()

    def release(self) -> None:
        if self.claimed:
            self.claimed = False
            self.memory.num_claims -= 1

    def __del__(self) -> None:
        self.release()


class GraphedStack:
    """The captured forward and backward of all layers for one shape and one set of tensors."""

    @torch.no_grad()
    def __init__(
        self, layers: Layers, x_BLC: Tensor, cos: Tensor, sin: Tensor, memory: GraphMemory
    ) -> None:
        """Capture both graphs; an earlier run of the layers must have compiled every kernel.

        Args:
            layers: Weights and call of each layer, in order.
            x_BLC: Input of the first layer.
            cos: Rope table [B or 1, L, R].
            sin: Rope table [B or 1, L, R].
            memory: Memory for the activations; no forward may wait for its backward in it.
        """
        self.memory = memory
        if memory.pool is None:
            memory.pool = torch.cuda.graph_pool_handle()
        # The graphs read these weights even if later forwards no longer keep them.
        self._arenas = [group.place.arena for weights, _ in layers for group in weights.groups()]
        self._parameters = [weights.parameters() for weights, _ in layers]
        plan = layers[0][1].plan
        room, self._bounds = Room.of(plan, x_BLC.shape[1]), None
        length = x_BLC.shape[1] if room is None else room.num_tokens
        self._inputs = [t.new_zeros(t.shape[0], length, t.shape[2]) for t in (x_BLC, cos, sin)]
        self._dy_BLC = torch.zeros_like(self._inputs[0])
        if room is not None:
            baked = room.plan(x_BLC.device)
            self._bounds = baked.cu_seqlens
            layers = [(weights, replace(call, plan=baked)) for weights, call in layers]
        self._fill(plan, x_BLC, cos, sin)
        x, cos, sin = self._inputs
        self._forward, self._backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        steps = []
        # Other threads may allocate during a capture: a data loader pins its batches in a thread.
        mode = "thread_local"
        with torch.cuda.graph(self._forward, pool=memory.pool, capture_error_mode=mode):
            for weights, call in layers:
                y, _, _, saved = layer_forward(x, cos, sin, weights, call)
                steps.append((saved, weights, call))
                x = y
        self._y_BLC = x
        # The graph reads their tables in each replay.
        self._flatteners = self._create_flatteners(x.device)
        with torch.cuda.graph(self._backward, pool=memory.pool, capture_error_mode=mode):
            dy = self._dy_BLC
            for (saved, weights, call), flattener in zip(
                reversed(steps), reversed(self._flatteners), strict=True
            ):
                dx, layer_grads = layer_backward(dy, saved, cos, sin, weights, call)
                flattener.launch(layer_grads)
                assert dx is not None
                dy = dx
            self._dx_BLC = dy
        for flattener in self._flatteners:
            flattener.fill()

    def _create_flatteners(self, device: torch.device) -> list[Flattener]:
        """Create the tensor of all gradients, and one flattener into it per layer."""
        shapes = [[(p.shape[0], p.shape[1]) for p in group] for group in self._parameters]
        sizes = [sum(rows * columns for rows, columns in layer) for layer in shapes]
        # One tensor, so that one copy takes all gradients out of the graph.
        # Some layers may have no adapter, the first among them.
        dtype, flat = next(p.dtype for p in chain(*self._parameters)), self.memory.flat_grads
        if flat is None or (flat.numel(), flat.dtype) != (sum(sizes), dtype):
            flat = torch.empty(sum(sizes), dtype=dtype, device=device)
        self._flat_grads = self.memory.flat_grads = flat
        slices = flat.split(sizes)
        return [Flattener(*of_layer) for of_layer in zip(shapes, slices, strict=True)]

    def __call__(self, x_BLC: Tensor, cos: Tensor, sin: Tensor, plan: AttentionPlan) -> Tensor:
        """Return the output of the stack [B, L, C], differentiable in x and the adapters.

        Args:
            x_BLC: Input of the first layer.
            cos: Rope table [B or 1, L, R].
            sin: Rope table [B or 1, L, R].
            plan: The sequences of this forward.
        """
        replay, last = _Replay(self), len(self._parameters) - 1
        h_BLC = x_BLC
        for index, parameters in enumerate(self._parameters):
            inputs = (plan, cos, sin) if index == 0 else None
            h_BLC = _LayerOfStack.apply(h_BLC, inputs, replay, index == last, *parameters)
        return h_BLC

    def replay_forward(self, plan: AttentionPlan, *inputs: Tensor) -> Tensor:
        """Replay the forward on a copy of the inputs, and return a copy of the output."""
        self._fill(plan, *inputs)
        self._forward.replay()
        return self._y_BLC[:, : inputs[0].shape[1]].clone()

    def replay_backward(self, dy_BLC: Tensor) -> tuple[Tensor, list[list[Tensor]]]:
        """Return dx and the gradients of each layer's parameters, copied out of the graph."""
        _lay(dy_BLC, self._dy_BLC)
        self._backward.replay()
        every = list(chain(*self._parameters))
        grads = iter(_unflatten_dense_tensors(self._flat_grads.clone(), every))
        by_layer = [list(islice(grads, len(parameters))) for parameters in self._parameters]
        return self._dx_BLC[:, : dy_BLC.shape[1]].clone(), by_layer

    def _fill(self, plan: AttentionPlan, *inputs: Tensor) -> None:
        for tensor, static in zip(inputs, self._inputs, strict=True):
            _lay(tensor, static)
        if self._bounds is not None:
            assert plan.cu_seqlens is not None
            num_bounds = plan.cu_seqlens.numel()
            self._bounds[:num_bounds].copy_(plan.cu_seqlens)
            # The unused tokens are one sequence; the remaining sequences are empty.
            self._bounds[num_bounds:].fill_(self._inputs[0].shape[1])


class _LayerOfStack(torch.autograd.Function):
    """A layer's node in autograd's graph, with the same edges as the node of `fused_layer`.

    The first layer's node runs the forward of the whole stack, the last layer's node the backward.
    In all other cases, a node passes on its input, or in the backward its gradient, unchanged.
    """

    @staticmethod
    def forward(ctx: Any, h_BLC, inputs, replay, is_last, *parameters):  # noqa: D102
        ctx.replay, ctx.is_last = replay, is_last
        # Only so that autograd raises if an adapter changes in place before the backward.
        ctx.save_for_backward(*parameters)
        if inputs is None:
            return h_BLC
        plan, cos, sin = inputs
        return replay.stack.replay_forward(plan, h_BLC, cos, sin)

    @staticmethod
    def backward(ctx: Any, d_BLC):  # noqa: D102
        _ = ctx.saved_tensors
        if ctx.is_last:
            d_BLC = ctx.replay.backward(d_BLC)
        grads = ctx.replay.take_gradients()
        return d_BLC if ctx.needs_input_grad[0] else None, None, None, None, *grads


def _lay(tensor: Tensor, static: Tensor) -> None:
    """Copy [B, L, ...] to the start of [B, at least L, ...], followed by zeros."""
    length = tensor.shape[1]
    static[:, :length].copy_(tensor)
    if length < static.shape[1]:
        static[:, length:].zero_()


class GraphCache:
    """The graphs of a model by shape; the second forward of a shape captures its graph."""

    def __init__(self) -> None:
        """Create an empty cache."""
        self._graphs: dict[tuple[Any, ...], GraphedStack | None] = {}
        self._memory = GraphMemory()

    def find(
        self,
        layers: Layers,
        addresses: tuple[Any, ...],
        x_BLC: Tensor,
        cos: Tensor,
        sin: Tensor,
    ) -> GraphedStack | None:
        """Return a graph for this call, or None if the stack has to run layer by layer.

        Args:
            layers: Weights and call of each layer, in order.
            addresses: The `graph_addresses` of the layers.
            x_BLC: Input of the first layer.
            cos: Rope table [B or 1, L, R].
            sin: Rope table [B or 1, L, R].
        """
        if not self._memory.is_free:
            return None
        key = (_shapes(layers, x_BLC, cos), addresses)
        if key not in self._graphs:
            # The first call runs layer by layer, which compiles every kernel.
            self._graphs[key] = None
            return None
        stack = self._graphs[key]
        if stack is None:
            stale = [k for k in self._graphs if k[0] == key[0] and k != key]
            for old in stale:
                del self._graphs[old]
            if not any(self._graphs.values()):
                # torch does not capture into a pool of which it has deleted every graph.
                self._memory.pool = None
            num_captured = sum(stack is not None for stack in self._graphs.values())
            if num_captured >= MAX_GRAPHS or not _has_room(layers, key[0], x_BLC):
                return None
            stack = self._graphs[key] = GraphedStack(layers, x_BLC, cos, sin, self._memory)
        return stack


def _has_room(layers: Layers, shapes: tuple[Any, ...], x_BLC: Tensor) -> bool:
    """Return whether the memory has room for a graph.

    A packed row of another room first runs without a graph, and such a forward cannot use the
    graphs' memory. So packed rows need their activations and temporaries twice.
    """
    (num_rows, length), *_, room = shapes
    num_tokens, itemsize = num_rows * length, x_BLC.element_size()
    held = held_bytes(layers, num_tokens, itemsize)
    free, total = usable_memory(x_BLC.device)
    if room is not None:
        workspace = max(workspace_bytes(weights, num_tokens, itemsize) for weights, _ in layers)
        if free < 2 * (held + workspace):
            return False
    return held <= MEMORY_SHARE * total


def _shapes(layers: Layers, x_BLC: Tensor, cos: Tensor) -> tuple[Any, ...]:
    """Return the shapes that a captured graph depends on."""
    room = Room.of(layers[0][1].plan, x_BLC.shape[1])
    length = x_BLC.shape[1] if room is None else room.num_tokens
    return ((x_BLC.shape[0], length), x_BLC.shape[2], x_BLC.dtype, cos.shape[::2], room)


def graph_addresses(layers: Layers) -> tuple[Any, ...]:
    """Return the options and addresses that a captured graph depends on."""
    baked: list[Any] = []
    for weights, call in layers:
        baked += [call.keep, call.keep_normed]
        baked += [norm.data_ptr() for norm in weights.norms() if norm is not None]
        for group in weights.groups():
            for linear in group.linears:
                frozen = linear.weight
                tensor = frozen if isinstance(frozen, Tensor) else frozen.packed
                baked.append(tensor.data_ptr())
                if linear.bias is not None:
                    baked.append(linear.bias.data_ptr())
                if linear.adapter is not None:
                    baked += [tensor.data_ptr() for tensor in linear.adapter]
                    baked += [linear.scaling, linear.rank]
    return tuple(baked)
