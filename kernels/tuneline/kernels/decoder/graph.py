"""The stack of fused layers as two CUDA graphs, for micro-batches too small to hide the host.

A layer's forward and backward are some 120 launches. At 1024 tokens the card is done with them in
2 ms (H200), the host needs 9: replayed from a graph they cost nothing. A graph owns its inputs,
activations and gradients, so one replay's backward must run before the next replay's forward; a
forward that comes in between is told so by `is_free` and runs layer by layer.

Packed rows differ in their tokens and sequences. They are laid into a `Room` that is a little
larger: the tokens at its end are a sequence of their own, whose gradient is zero.

A replay yields all gradients at once, and they are still handed out layer by layer, from the last
one. DeepSpeed's ZeRO-2 lays gradients into its buckets in the order in which they come, and sums
the buckets over ranks; a rank with a graph may meet one whose rows have none yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
import triton
from torch import Tensor
from torch._utils import _unflatten_dense_tensors

from tuneline.kernels.decoder.budget import kept_bytes, normed_bytes
from tuneline.kernels.decoder.layer import LayerCall, layer_backward, layer_forward
from tuneline.kernels.decoder.layer_weights import LayerWeights
from tuneline.kernels.ops.attention import AttentionPlan

GRAPH_MAX_TOKENS = 2048
"""Of a layer as large as Llama-3.1-8B's, and more of a smaller one: see `equal_tokens`.

A graph holds its activations for good: 3 GB at 1024 tokens of a Llama-3.1-8B that keeps all."""

GRAPH_MAX_TOKENS_FP8 = 8192
"""With fp8 products the card is done sooner: at 8192 tokens the host is 28 of 368 ms behind."""

MEMORY_SHARE = 0.5
"""Of the card, for the activations of all graphs together; shapes come first served."""

_LAYER_WEIGHTS = 218_103_808
"""Of Llama-3.1-8B."""

Layers = Sequence[tuple[LayerWeights, LayerCall]]


def equal_tokens(weights: LayerWeights, num_tokens: int) -> float:
    """Return how many tokens of a Llama-3.1-8B take a layer of it as long as these take this one.

    The host needs the same time for any layer: a 1B model's card is done with 4096 tokens in what
    an 8B one's needs for 1000.
    """
    num_weights = sum(group.num_out * group.num_in for group in weights.groups())
    return num_tokens * num_weights / _LAYER_WEIGHTS


def held_bytes(layers: Layers, num_tokens: int, itemsize: int) -> int:
    """Bytes that a graph holds between its replays: what the layers keep."""
    num_bytes = 0
    for weights, call in layers:
        num_bytes += num_tokens * weights.qkv.num_in * itemsize
        num_bytes += call.keep * kept_bytes(weights, num_tokens, itemsize)
        num_bytes += call.keep_normed * normed_bytes(weights, num_tokens, itemsize)
    return num_bytes


@dataclass(frozen=True)
class Room:
    """What packed rows are rounded up to, so that a few graphs serve them all."""

    num_tokens: int
    num_sequences: int
    longest: int

    @classmethod
    def of(cls, plan: AttentionPlan, num_tokens: int) -> Room | None:
        """Return the room for a packed row; None for dense ones, whose graph has their shape."""
        if plan.sequence_lengths is None:
            return None
        rounded = -(-num_tokens // 128) * 128
        # The tokens at the end are one more sequence.
        sequences = triton.next_power_of_2(len(plan.sequence_lengths) + 1)
        return cls(rounded, sequences, triton.next_power_of_2(max(128, *plan.sequence_lengths)))

    def plan(self, device: torch.device) -> AttentionPlan:
        """Make the plan that a graph has baked in; its bounds are filled in before each replay."""
        bounds = torch.zeros(self.num_sequences + 1, dtype=torch.int32, device=device)
        return AttentionPlan((self.longest,) * self.num_sequences, bounds)


class _Replay:
    """One forward's claim on the graph's memory; given up by its backward or its death."""

    def __init__(self, stack: GraphedStack) -> None:
        stack.generation += 1
        stack.num_claims += 1
        self.stack, self.generation, self.claimed = stack, stack.generation, True
        self._grads: list[list[Tensor]] = []

    def backward(self, dy_BLC: Tensor) -> Tensor:
        """Return dx of the stack, and have the layers' gradients ready."""
        if self.generation != self.stack.generation:
            raise RuntimeError(
                "the activations of this forward were overwritten by a later one: run backward "
                "before the next forward, or patch(model, budget='lean') with more tokens"
            )
        dx_BLC, self._grads = self.stack.replay_backward(dy_BLC)
        self.release()
        return dx_BLC

    def take_gradients(self) -> list[Tensor]:
        """Return those of the last layer that has not got its own."""
        return self._grads.pop()

    def release(self) -> None:
        if self.claimed:
            self.claimed = False
            self.stack.num_claims -= 1

    def __del__(self) -> None:
        self.release()


class GraphedStack:
    """Forward and backward of all layers for one shape and one set of tensors."""

    @torch.no_grad()
    def __init__(self, layers: Layers, x_BLC: Tensor, cos: Tensor, sin: Tensor) -> None:
        """Capture both graphs; every kernel must have run once before (compilation)."""
        self.generation = self.num_claims = 0
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
        with torch.cuda.graph(self._forward):
            for weights, call in layers:
                y, parkable, rest = layer_forward(x, cos, sin, weights, call)
                steps.append(([x, *parkable, *rest], weights, call))
                x = y
        self._y_BLC = x
        with torch.cuda.graph(self._backward, pool=self._forward.pool()):
            dy = self._dy_BLC
            grads: list[Tensor] = []
            for saved, weights, call in reversed(steps):
                dx, layer_grads = layer_backward(dy, saved, cos, sin, weights, call)
                grads[:0] = layer_grads
                assert dx is not None
                dy = dx
            self._dx_BLC = dy
            # One tensor, so that a replay hands out its gradients with one copy.
            self._flat_grads = torch.cat([grad.reshape(-1) for grad in grads])

    @property
    def is_free(self) -> bool:
        """Whether no forward still waits for its backward."""
        return self.num_claims == 0

    def __call__(self, x_BLC: Tensor, cos: Tensor, sin: Tensor, plan: AttentionPlan) -> Tensor:
        """Run the stack; differentiable in x and the adapters."""
        replay, last = _Replay(self), len(self._parameters) - 1
        h_BLC = x_BLC
        for index, parameters in enumerate(self._parameters):
            inputs = (plan, cos, sin) if index == 0 else None
            h_BLC = _LayerOfStack.apply(h_BLC, inputs, replay, index == last, *parameters)
        return h_BLC

    def replay_forward(self, plan: AttentionPlan, *inputs: Tensor) -> Tensor:
        """Copy the inputs in, replay, copy the output out."""
        self._fill(plan, *inputs)
        self._forward.replay()
        return self._y_BLC[:, : inputs[0].shape[1]].clone()

    def replay_backward(self, dy_BLC: Tensor) -> tuple[Tensor, list[list[Tensor]]]:
        """Return dx and the gradients of each layer's parameters, in memory of their own."""
        _lay(dy_BLC, self._dy_BLC)
        self._backward.replay()
        every = [t for parameters in self._parameters for t in parameters]
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
            # The end of the room's own tokens, then sequences without any.
            self._bounds[num_bounds:].fill_(self._inputs[0].shape[1])


class _LayerOfStack(torch.autograd.Function):
    """A layer's place in autograd's graph, with the edges that `fused_layer` would have there.

    The first one's forward is that of the stack, and the last one's backward; what the others hand
    on unread is y, and on the way back dx.
    """

    @staticmethod
    def forward(ctx: Any, h_BLC, inputs, replay, is_last, *parameters):  # noqa: D102
        ctx.replay, ctx.is_last = replay, is_last
        # Saved only for the check that no adapter is changed before the backward.
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
    """Copy [B, L, ...] to the front of [B, at least L, ...], zeros behind."""
    length = tensor.shape[1]
    static[:, :length].copy_(tensor)
    if length < static.shape[1]:
        static[:, length:].zero_()


class GraphCache:
    """The graphs of a model by shape; a shape gets one when it comes for the second time."""

    def __init__(self) -> None:
        """Start empty."""
        self._graphs: dict[tuple[Any, ...], GraphedStack | None] = {}
        self._held_bytes: dict[tuple[Any, ...], int] = {}

    def find(self, layers: Layers, x_BLC: Tensor, cos: Tensor, sin: Tensor) -> GraphedStack | None:
        """Return a free graph for this call, or None: then run layer by layer."""
        key = _key(layers, x_BLC, cos)
        if key not in self._graphs:
            # The eager run that follows compiles every kernel.
            self._graphs[key] = None
            return None
        stack = self._graphs[key]
        if stack is None:
            stale = [k for k in self._graphs if k[0] == key[0] and k != key]
            for old in stale:
                del self._graphs[old]
                self._held_bytes.pop(old, None)
            held = held_bytes(layers, key[0][0][0] * key[0][0][1], x_BLC.element_size())
            total = torch.cuda.mem_get_info(x_BLC.device)[1]
            if held + sum(self._held_bytes.values()) > MEMORY_SHARE * total:
                return None
            stack = self._graphs[key] = GraphedStack(layers, x_BLC, cos, sin)
            self._held_bytes[key] = held
        return stack if stack.is_free else None


def _key(layers: Layers, x_BLC: Tensor, cos: Tensor) -> tuple[Any, ...]:
    """Name everything that a captured kernel has baked in: shapes first, then addresses."""
    room = Room.of(layers[0][1].plan, x_BLC.shape[1])
    length = x_BLC.shape[1] if room is None else room.num_tokens
    shape = ((x_BLC.shape[0], length), x_BLC.shape[2], x_BLC.dtype, cos.shape[::2], room)
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
    return (shape, tuple(baked))
