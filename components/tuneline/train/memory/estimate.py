"""How much memory a run will take, from the shape of the base model and the recipe alone.

    weights      the base model: 4-bit linear layers with their scales, the rest in the compute type
    adapter      trained weights and gradients in fp32, and the optimizer state
    graphs       if CUDA graphs replay the layers: a second copy of the gradients, and input and
                 output of the stack of layers, with their gradients
    activations  tensors that layers store for the backward pass: all that it reads or, if these are
                 recomputed, only the inputs of layers. Fused layers store inputs, and as many other
                 tensors as fit into the memory that is free
    working set  what the backward pass of one layer takes in addition: recomputed activations, a
                 dequantised weight, gradients
    head         what the loss holds at once: logits, and tensors of their size or of hidden states.
                 If the head's weight is in host memory, its copy is added: to the above or, because
                 the last layers run while it arrives, to what their forward holds, if that is more

The numbers of stored tensors are those of transformers' Llama family: a RMSNorm stores its input in
fp32 and its output; attention stores q, k, v and its output; the MLP stores four tensors of its
width.
tests/train/memory/test_estimate.py compares the estimate with peaks measured on an H200.

A layer of routed experts stores, per choice of an expert, its outputs of gate and up, and without
fused kernels also the other tensors of the width of an expert or of the model. Its working set has
the dequantised experts: all of a layer if kernels run, else one.

The attention of gpt-oss computes the scores of all pairs of tokens as one matrix per head. A layer
stores one of these matrices per head, and its backward pass holds three more.

This module is importable without torch, because `tuneline plan` uses it on a laptop.
"""

from dataclasses import dataclass, replace
from typing import Literal

from tuneline.artifacts import PREFERENCE_METHODS, Method
from tuneline.kernels.limits import (
    KEPT_MLP_CHUNK_TOKENS,
    MIN_ADAPTER_COLUMNS,
    MLP_CHUNK_TOKENS,
    STASH_MIN_TOKENS,
    arena_bytes,
    is_replayed,
)
from tuneline.models.nf4_layout import BLOCKSIZE
from tuneline.train.config import TrainConfig

GIB = 2**30

_NF4_BYTES = 0.5 + 1 / BLOCKSIZE + 4 / (BLOCKSIZE * 256)
# Four bits, one byte of scale per block, and one fp32 number per 256 of those scales.
ZERO_OPTIMIZER = "adamw_torch"
"""Optimizer of a run that shards its optimizer state: PyTorch's AdamW. DeepSpeed's own optimizers
are compiled on first use, but the step's images have no compiler."""

_STATE_BYTES = {"8bit": 2.0, "adamw": 8.0, "adafactor": 0.1, "sgd": 4.0, "lion": 4.0}
# Bytes per trained parameter, by a part of the optimizer's name; AdamW stores two fp32 moments.
_HEAD_TILE = 4096 * 16384
# Logits that TRL's loss holds at once on a GPU.

EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
TOP_K = ("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts")
"""Names in configs of the number of experts, and of the number that computes each token."""
WHOLE_SCORES = ("gpt_oss",)
"""Model types whose attention in transformers holds a whole matrix of scores per head."""

SCALED_EMBEDDINGS = ("gemma2", "gemma3", "gemma3_text")
"""Model types with fused layers whose input embedding scales its rows, and so is not a plain
nn.Embedding. Kernels leave such an embedding on the device, with a head tied to it."""

_EXPERT_ARENA = 2 * GIB
# Most bytes that the kernels take for the dequantised experts of a layer.

Loss = Literal["whole", "tiled"]


@dataclass(frozen=True)
class Experts:
    """Sizes of the layers with routed experts."""

    num_layers: int
    """Layers that have experts; the others are dense."""
    num_experts: int
    top_k: int
    """Experts that compute each token."""
    width: int
    """Width of an expert's MLP."""
    shared: int = 0
    """Width of the MLP that computes every token beside the experts; 0 if there is none."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a model that decide its memory."""

    num_layers: int
    hidden: int
    query: int
    """Width of all query heads together."""
    key_value: int
    """Width of all key heads together, which is also that of the value heads."""
    mlp: int
    vocab: int
    num_quantized: int
    """Parameters of the linear layers and the experts that 4-bit loading quantises."""
    num_other: int
    """Parameters of all other modules."""
    num_adapter: int
    """Trained parameters."""
    num_tables: int = 0
    """Parameters of the input embedding and of the head, as far as kernels can keep them in host
    memory: a tied table counts once, a trained one does not count."""
    num_copied: int = 0
    """Parameters of the head among `num_tables`, which are copied to the device for the loss."""
    fused_qkv: int = 0
    """Output width of the linear layer that computes q, k and v at once; 0 if there is none. Its
    output is stored in addition to q, k and v."""
    experts: Experts | None = None
    """Sizes of the layers with routed experts; None if the model has none."""
    is_fused: bool = True
    """Whether the family has fused layers. If not, kernels only run for experts and loss."""
    score_heads: int = 0
    """Query heads per layer whose attention holds a whole matrix of scores; 0 if it works in
    tiles."""


@dataclass(frozen=True)
class Settings:
    """Settings of a run that decide its memory."""

    rows: int
    """Examples per micro-batch."""
    length: int
    """Tokens of the longest example, or of a pack."""
    recompute: bool
    """Whether activations are recomputed in the backward pass."""
    quantized: bool
    """Whether the base model is held in 4 bits."""
    itemsize: int
    """Bytes of the compute type."""
    optim: str
    method: Method = "sft"
    loss: Loss = "tiled"
    """How the loss holds logits: all at once (whole) or only a part at a time (tiled)."""
    fused: bool = False
    """Whether fused kernels run."""
    fp8: bool = False
    """Whether fused kernels compute linears in fp8."""
    kept_bytes: int = 0
    """Bytes in which fused kernels may keep activations and dequantised weights, so that these need
    not be recomputed."""
    num_ranks: int = 1
    """Ranks over which ZeRO-2 divides gradients and optimizer state."""
    tables_on_host: bool = False
    """Whether the input embedding and the head are in host memory, as far as they can be."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes at the peak of a training step."""

    weights: int
    adapter: int
    activations: int
    working_set: int
    head: int
    tables: int = 0
    """Bytes of tables in host memory. They are on the device until the whole model is loaded."""
    graphs: int = 0

    @property
    def total(self) -> int:
        """The peak. It has only the larger of working set and head, which never coincide."""
        step = self.adapter + self.graphs + self.activations + max(self.working_set, self.head)
        return self.weights + max(step, self.tables)

    def __str__(self) -> str:
        """Return the total and its parts in GiB, for a log."""
        parts = ("weights", "adapter", "graphs", "activations", "working_set", "head")
        named = ", ".join(f"{p.replace('_', ' ')} {getattr(self, p) / GIB:.2f}" for p in parts)
        return f"{self.total / GIB:.2f} GiB ({named})"


def shards_optimizer(config: TrainConfig, num_gpus: int) -> bool:
    """Return whether a run on this many GPUs shards its optimizer state with ZeRO-2."""
    if num_gpus < 2 or "adamw" not in config.optim or config.sharding == "ddp":
        return False
    is_large = bool(config.lora.modules_to_save) or config.offload_optimizer
    return is_large or config.sharding == "zero2"


def movable_table_bytes(shape: Shape, settings: Settings) -> int:
    """Return the bytes of the tables that a rank can keep in host memory; 0 if there are none.

    ZeRO-2 keeps them on the device: DeepSpeed sends all parameters from rank 0 to the other ranks,
    which only works for those on devices.
    """
    if not (settings.fused and shape.is_fused) or settings.num_ranks > 1:
        return 0
    return shape.num_tables * settings.itemsize


def estimate_memory(shape: Shape, settings: Settings) -> MemoryEstimate:
    """Return an estimate of the peak memory of a training step on one device."""
    itemsize = settings.itemsize
    # A preference is two sequences: the prompt with each of its answers.
    tokens = settings.rows * settings.length * (2 if settings.method == "dpo" else 1)
    frozen = _NF4_BYTES if settings.quantized else itemsize
    weights = shape.num_quantized * frozen + shape.num_other * itemsize
    adapter = shape.num_adapter * (
        4 + (4 + _state_bytes(settings.optim, shape.num_adapter)) / settings.num_ranks
    )
    tables = movable_table_bytes(shape, settings) if settings.tables_on_host else 0
    graphs = 0
    if shape.experts is not None:
        activations, working_set = _expert_bytes(shape, shape.experts, settings, tokens)
    elif settings.fused and shape.is_fused:
        activations, working_set = _fused_bytes(shape, tokens, itemsize, settings.kept_bytes > 0)
        kept = _kept(shape, shape, settings, tokens)
        activations += kept.activations
        weights += kept.weights
        if not tables and _replays(shape, settings, tokens, kept.num_layers):
            graphs = 4 * shape.num_adapter + 4 * tokens * shape.hidden * itemsize
    else:
        layer = tokens * _layer_bytes_per_token(shape, itemsize)
        working_set = itemsize * (shape.hidden + tokens) * shape.mlp
        if settings.recompute:
            activations = tokens * shape.hidden * itemsize * shape.num_layers
            working_set += layer
        else:
            activations = layer * shape.num_layers
    if settings.loss == "whole":
        # Logits in fp32, their log-softmax and its gradient.
        head = 12 * tokens * shape.vocab
    else:
        head = tokens * shape.hidden * (4 + itemsize) + _HEAD_TILE * itemsize
    if tables:
        weights -= tables
        # While the head arrives, the last layers run; while the policy's copy waits for its
        # backward pass, all layers of the reference.
        chunk = MLP_CHUNK_TOKENS // (1 if settings.method in PREFERENCE_METHODS else 2)
        forward = working_set
        if shape.experts is None:
            forward = _forward_bytes(shape, tokens, itemsize, min(tokens, chunk))
        head = shape.num_copied * itemsize + max(head, forward)
    parts = weights, adapter, activations, working_set, head, tables, graphs
    return MemoryEstimate(*map(int, parts))


def _layer_bytes_per_token(shape: Shape, itemsize: int) -> int:
    norms = 2 * (4 + itemsize) * shape.hidden
    widths = 2 * (shape.query + shape.key_value + 2 * shape.mlp) + shape.fused_qkv
    return norms + itemsize * widths


def _expert_bytes(
    shape: Shape, experts: Experts, settings: Settings, tokens: int
) -> tuple[int, int]:
    """Return the bytes of activations and of working set of a model with routed experts."""
    itemsize, chosen = settings.itemsize, tokens * experts.top_k
    hidden, width = shape.hidden, experts.width
    weight = itemsize * 2 * width * hidden
    if settings.fused:
        # Gate and up, the gradient of h, and the rows of x or of its gradient.
        working_set = min(_EXPERT_ARENA, experts.num_experts * weight)
        working_set += itemsize * (chosen * (3 * width + hidden) + 8 * tokens * hidden)
        kept = 2 * width
    else:
        working_set = weight + itemsize * chosen * (hidden + 2 * width)
        kept = 2 * hidden + 4 * width
    if settings.fused and shape.is_fused:
        activations = _num_inputs(shape, tokens) * tokens * hidden * itemsize
        as_dense = replace(shape, mlp=experts.top_k * width)
        attention_only = replace(shape, mlp=0)
        in_room = _kept(as_dense, attention_only, settings, tokens)
        if in_room.num_layers == shape.num_layers:
            # Gate and up are those that the layer has kept.
            working_set -= itemsize * chosen * 2 * width
        return activations + in_room.activations + in_room.weights, working_set
    attention = tokens * _layer_bytes_per_token(replace(shape, mlp=0), itemsize)
    scores = itemsize * shape.score_heads * tokens * settings.length
    attention += scores
    working_set = max(working_set, 3 * scores)
    layer = attention + itemsize * (chosen * kept + 4 * tokens * experts.shared)
    if settings.recompute:
        return tokens * hidden * itemsize * shape.num_layers, working_set + layer
    dense = attention + itemsize * 4 * tokens * shape.mlp
    num_dense = shape.num_layers - experts.num_layers
    return layer * experts.num_layers + dense * num_dense, working_set


def _num_inputs(shape: Shape, tokens: int) -> int:
    """Return how many layers' inputs fused layers hold on the device.

    From STASH_MIN_TOKENS on, layer inputs are in host memory, except the few in transfer.
    """
    return 4 if tokens >= STASH_MIN_TOKENS else shape.num_layers


@dataclass(frozen=True)
class _Kept:
    """What fused layers keep in their room."""

    num_layers: int
    """Number of layers that keep their activations."""
    activations: int
    """Bytes of activations."""
    weights: int = 0
    """Bytes of dequantised weights."""


def _kept(shape: Shape, wide: Shape, settings: Settings, tokens: int) -> _Kept:
    """Return what fused layers keep, by the rules of `kernels.decoder.budget`.

    Args:
        shape: Sizes of the activations.
        wide: Sizes of the weights that can stay dequantised.
        settings: Settings of the run; `kept_bytes` is the room.
        tokens: Tokens per micro-batch.
    """
    itemsize, room = settings.itemsize, settings.kept_bytes
    widths = 2 * shape.query + 2 * shape.key_value + shape.hidden + 2 * shape.mlp
    layer = tokens * itemsize * widths
    num_layers = min(shape.num_layers, room // layer)
    activations = num_layers * layer
    if num_layers < shape.num_layers:
        return _Kept(num_layers, activations)
    normed = tokens * itemsize * 2 * (shape.hidden + MIN_ADAPTER_COLUMNS)
    num_normed = min(num_layers, (room - activations) // normed)
    activations += num_normed * normed
    if num_normed < num_layers or not settings.quantized:
        return _Kept(num_layers, activations)
    weights = _wide_bytes(wide, itemsize, room - activations, settings.fp8)
    return _Kept(num_layers, activations, weights)


def _replays(shape: Shape, settings: Settings, tokens: int, num_kept: int) -> bool:
    """Return whether CUDA graphs replay the fused layers, by the rules of `kernels.decisions`.

    Args:
        shape: Sizes of the model.
        settings: Settings of the run.
        tokens: Tokens per micro-batch.
        num_kept: Number of layers that keep their activations.
    """
    num_weights = shape.hidden * 2 * (shape.query + shape.key_value) + 3 * shape.mlp * shape.hidden
    keeps_all = num_kept == shape.num_layers
    parks = tokens >= STASH_MIN_TOKENS and not keeps_all
    return not parks and is_replayed(num_weights, tokens, fp8=settings.fp8 and keeps_all)


def _wide_bytes(shape: Shape, itemsize: int, room: int, fp8: bool) -> int:
    """Return the bytes of dequantised weights that fused layers keep in `room` bytes."""
    sizes = [
        (shape.query + 2 * shape.key_value, shape.hidden),
        (shape.hidden, shape.query),
        (2 * shape.mlp, shape.hidden),
        (shape.hidden, shape.mlp),
    ]
    layer = sum(arena_bytes(n, k, MIN_ADAPTER_COLUMNS, itemsize, fp8=fp8) for n, k in sizes)
    return min(shape.num_layers, room // layer) * layer


def _fused_bytes(shape: Shape, tokens: int, itemsize: int, kept: bool) -> tuple[int, int]:
    """Return the bytes of activations and of working set if fused layers keep only their inputs."""
    row = shape.hidden * itemsize
    num_inputs = _num_inputs(shape, tokens)
    chunk = min(tokens, KEPT_MLP_CHUNK_TOKENS if kept else MLP_CHUNK_TOKENS)
    arenas = 3 * shape.mlp * shape.hidden
    temporaries = chunk * (4 * shape.mlp + 2 * shape.mlp)
    return num_inputs * tokens * row, itemsize * (arenas + temporaries) + 8 * tokens * row


def _forward_bytes(shape: Shape, tokens: int, itemsize: int, chunk: int) -> int:
    """Return what the MLP of a fused layer holds at once in a forward over chunks of tokens.

    It holds dequantised weights; gate, up and their product; and four tensors of the size of the
    hidden states.

    Args:
        shape: Shape of the base model.
        tokens: Tokens per micro-batch.
        itemsize: Bytes of the compute type.
        chunk: Tokens per chunk: fewer while the head is copied.
    """
    return itemsize * (3 * shape.mlp * (shape.hidden + chunk) + 4 * tokens * shape.hidden)


def _state_bytes(optim: str, num_parameters: int) -> float:
    """Return the bytes of optimizer state per trained parameter."""
    return next((size for name, size in _STATE_BYTES.items() if name in optim), 8.0)
