"""How much memory a run will take, from the base model's config and the recipe alone.

    weights      the base: 4-bit linear layers with their scales, the rest in the compute type
    adapter      trained weights and gradients in fp32, the optimizer's state
    activations  what the backward pass needs of each token: of every layer, or only the inputs of
                 layers where activations are computed again; our kernels fill what is free
    working set  of one layer's backward: what is computed again, a dequantised weight, gradients
    head         logits and their gradient, where the loss holds them whole

The counts per token are those of transformers' Llama family: RMSNorm keeps its input in fp32 and
its output, attention q, k, v and its output, the MLP four tensors of its width. Against
peaks measured on an H200: tests/train/memory/test_estimate.py.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tuneline.artifacts import Method
from tuneline.kernels.limits import (
    KEPT_MLP_CHUNK_TOKENS,
    MIN_ADAPTER_COLUMNS,
    MLP_CHUNK_TOKENS,
    STASH_MIN_TOKENS,
)
from tuneline.models.nf4 import BLOCKSIZE, empty_model, quantized_modules
from tuneline.train.config import LoraConfig
from tuneline.train.model.adapter import is_called

GIB = 2**30

_NF4_BYTES = 0.5 + 1 / BLOCKSIZE + 4 / (BLOCKSIZE * 256)
# Four bits, a byte of scale a block, and fp32 for 256 of those scales.
_STATE_BYTES = {"8bit": 2.0, "adamw": 8.0, "adafactor": 0.1, "sgd": 4.0, "lion": 4.0}
# A parameter, by what is in the optimizer's name; AdamW keeps two fp32 moments.
_HEAD_TILE = 4096 * 16384
# Logits that TRL's loss holds at a time on a GPU.

Loss = Literal["whole", "tiled"]


@dataclass(frozen=True)
class Shape:
    """What of a model decides its memory."""

    num_layers: int
    hidden: int
    query: int
    """Width of all query heads together."""
    key_value: int
    """Width of the keys; that of the values is the same."""
    mlp: int
    vocab: int
    num_quantized: int
    """Parameters of the linear layers that 4-bit loading packs."""
    num_other: int
    num_adapter: int
    fused_qkv: int = 0
    """Width of q, k and v where one linear layer makes them: its output is kept beside its parts,
    which attention wants apart."""


@dataclass(frozen=True)
class Settings:
    """What of a recipe decides a run's memory."""

    rows: int
    """Rows, or packs, a forward."""
    length: int
    """Tokens of the longest row, or of a pack."""
    recompute: bool
    quantized: bool
    itemsize: int
    """Bytes of the compute type."""
    optim: str
    method: Method = "sft"
    loss: Loss = "tiled"
    """Whether the loss holds all logits at once."""
    fused: bool = False
    """Whether our kernels run."""
    kept_bytes: int = 0
    """What they may take to keep activations, a whole layer's or none of it."""
    num_ranks: int = 1
    """Ranks that share gradients and optimizer state."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes at the peak of a training step."""

    weights: int
    adapter: int
    activations: int
    working_set: int
    head: int

    @property
    def total(self) -> int:
        """The peak: a layer's backward and the head's are never at the same time."""
        return self.weights + self.adapter + self.activations + max(self.working_set, self.head)

    def __str__(self) -> str:
        """Name the parts in GiB."""
        parts = ("weights", "adapter", "activations", "working_set", "head")
        named = ", ".join(f"{p.replace('_', ' ')} {getattr(self, p) / GIB:.2f}" for p in parts)
        return f"{self.total / GIB:.2f} GiB ({named})"


def model_shape(base_model_dir: str | Path, lora: LoraConfig) -> Shape | None:
    """Read the shape off a model's config, without its weights.

    Returns:
        None for a model whose config does not say it in the usual words, or that routes tokens
        to experts: no estimate is better than a wrong one.
    """
    import torch

    model = empty_model(base_model_dir)
    config: Any = model.config.get_text_config()
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    if any(not isinstance(getattr(config, name, None), int) for name in names):
        return None
    if any(getattr(config, name, None) for name in ("num_experts", "num_local_experts")):
        return None
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    num_kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head = model.get_output_embeddings()
    num_adapter = 0
    for name, module in model.named_modules():
        is_target = lora.target_modules == "all-linear" or any(
            is_called(name, target) for target in lora.target_modules
        )
        if any(is_called(name, saved) for saved in lora.modules_to_save):
            num_adapter += sum(parameter.numel() for parameter in module.parameters())
        elif is_target and type(module) is torch.nn.Linear and module is not head:
            num_adapter += lora.r * (module.in_features + module.out_features)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    linear = {name: module for name, module in model.named_modules() if hasattr(module, "weight")}
    sizes = {name: module.weight.numel() for name, module in linear.items()}
    num_quantized = sum(sizes[name] for name in quantized_modules(model))
    return Shape(
        num_layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        query=config.num_attention_heads * head_dim,
        key_value=num_kv_heads * head_dim,
        mlp=config.intermediate_size,
        vocab=config.vocab_size,
        num_quantized=num_quantized,
        num_other=num_parameters - num_quantized,
        num_adapter=num_adapter,
        fused_qkv=_fused_qkv(model),
    )


def _fused_qkv(model: Any) -> int:
    fused = (m for name, m in model.named_modules() if name.endswith("qkv_proj"))
    return getattr(next(fused, None), "out_features", 0)


def estimate_memory(shape: Shape, settings: Settings) -> MemoryEstimate:
    """Estimate the peak of a training step on one device."""
    itemsize = settings.itemsize
    # A preference is two rows: the prompt with each of its answers.
    tokens = settings.rows * settings.length * (2 if settings.method == "dpo" else 1)
    frozen = _NF4_BYTES if settings.quantized else itemsize
    weights = shape.num_quantized * frozen + shape.num_other * itemsize
    adapter = shape.num_adapter * (
        4 + (4 + _state_bytes(settings.optim, shape.num_adapter)) / settings.num_ranks
    )
    if settings.fused:
        activations, working_set = _fused_bytes(shape, tokens, itemsize, settings.kept_bytes > 0)
        activations += _kept_bytes(shape, tokens, itemsize, settings.kept_bytes)
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
    return MemoryEstimate(*map(int, (weights, adapter, activations, working_set, head)))


def _layer_bytes_per_token(shape: Shape, itemsize: int) -> int:
    norms = 2 * (4 + itemsize) * shape.hidden
    widths = 2 * (shape.query + shape.key_value + 2 * shape.mlp) + shape.fused_qkv
    return norms + itemsize * widths


def _kept_bytes(shape: Shape, tokens: int, itemsize: int, room: int) -> int:
    """Return what our layers keep of so much room, as `kernels.budget` shares it out."""
    attention = 2 * shape.query + 2 * shape.key_value
    layer = tokens * itemsize * (attention + shape.hidden + 2 * shape.mlp)
    normed = tokens * itemsize * 2 * (shape.hidden + MIN_ADAPTER_COLUMNS)
    num_layers = min(shape.num_layers, room // layer)
    if num_layers < shape.num_layers:
        return num_layers * layer
    return num_layers * layer + min(num_layers, (room - num_layers * layer) // normed) * normed


def _fused_bytes(shape: Shape, tokens: int, itemsize: int, kept: bool) -> tuple[int, int]:
    """Return activations and working set of our layers where they keep the least."""
    row = shape.hidden * itemsize
    # Above this, inputs wait in host memory but for the few on their way.
    num_inputs = 4 if tokens >= STASH_MIN_TOKENS else shape.num_layers
    chunk = min(tokens, KEPT_MLP_CHUNK_TOKENS if kept else MLP_CHUNK_TOKENS)
    arenas = 3 * shape.mlp * shape.hidden
    temporaries = chunk * (4 * shape.mlp + 2 * shape.mlp)
    return num_inputs * tokens * row, itemsize * (arenas + temporaries) + 8 * tokens * row


def _state_bytes(optim: str, num_parameters: int) -> float:
    """Return the optimizer's bytes a trained parameter."""
    return next((size for name, size in _STATE_BYTES.items() if name in optim), 8.0)
