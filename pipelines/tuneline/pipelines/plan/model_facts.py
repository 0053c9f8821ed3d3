"""What a model's config and the shapes of its tensors say about training it."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tuneline.pipelines.plan.model_files import ModelFiles, Unknown, read_model
from tuneline.recipe import Recipe
from tuneline.train.config import LoraConfig
from tuneline.train.memory.estimate import EXPERT_COUNTS, TOP_K, Experts, Shape

_LAYER = re.compile(r"(?:^|\.)(?:layers|blocks|h)\.(\d+)\.")
_EXPERT = re.compile(r"\.experts\.")
_OTHER = re.compile(r"(^|\.)(embed_tokens|lm_head|wte|word_embeddings|router|gate)\.")
"""Embeddings, the output layer and routers, which are not quantised."""
_NOT_TEXT = re.compile(r"(^|\.)(visual|vision\w*|audio\w*|multi_modal_projector)\.")
_EXTRA = re.compile(r"(^|\.)mtp\.")
_ROUTING = re.compile(r"\.(\w*expert_gate|indexer)\.")
_NOT_A_WEIGHT = re.compile(
    r"(inv_freq|_scales|scale_inv|[a-z]_scale|absmax|quant_map|SCB|weight_format)$|quant_state"
)
_PACKED = re.compile(r"_blocks$")


@dataclass(frozen=True)
class Linear:
    """A matrix that 4-bit loading quantises."""

    name: str
    """The layer's name, without `.weight`."""
    num_inputs: int
    num_outputs: int
    is_text: bool
    """Whether the layer is part of the decoder, and not of a router or an encoder of images."""


@dataclass(frozen=True)
class ModelFacts:
    """Sizes of a base model."""

    num_parameters: int
    num_active: int
    """Parameters that compute each token: all, or less if a router chooses experts."""
    num_other: int
    """Parameters that are not in linear layers or experts."""
    linears: tuple[Linear, ...]
    experts: Experts | None
    """Sizes of the layers with routed experts; None if the model has none."""
    sizes: dict[str, int]
    """Widths that `Shape` names, from config.json."""

    def shape(self, lora: LoraConfig) -> Shape:
        """Return the shape of the model with an adapter."""
        adapted = [layer for layer in self.linears if _is_adapted(layer, lora)]
        sides = sum(layer.num_inputs + layer.num_outputs for layer in adapted)
        if lora.experts and self.experts is not None:
            per_expert = 2 * self.sizes["hidden"] + 3 * self.experts.width
            sides += self.experts.num_layers * self.experts.num_experts * per_expert
        return Shape(
            **self.sizes,
            num_quantized=self.num_parameters - self.num_other,
            num_other=self.num_other,
            num_adapter=lora.r * sides,
            experts=self.experts,
        )


def facts_or_reason(recipe: Recipe) -> ModelFacts | str:
    """Return the sizes of the recipe's base model, or why they are not known."""
    try:
        return model_facts(read_model(recipe.base_model, revision=recipe.fetch.revision))
    except Unknown as reason:
        return str(reason)


def model_facts(files: ModelFiles) -> ModelFacts:
    """Return the sizes of a model.

    Raises:
        Unknown: config.json lacks the usual keys.
    """
    config = files.config
    text = config.get("text_config") or config
    sizes = _sizes(text)
    tensors = dict(_tensors(files, sizes["num_layers"]))
    linears, num_in_experts, num_quantized = [], 0, 0
    expert_layers = set()
    for name, (count, shape) in tensors.items():
        layer = _LAYER.search(name)
        if _EXPERT.search(name) and not name.endswith("bias"):
            num_in_experts += count
            num_quantized += count
            expert_layers.add(layer[1] if layer else "")
        elif len(shape) == 2 and name.endswith(".weight") and not _OTHER.search(name):
            num_quantized += count
            is_text = layer is not None and not _NOT_TEXT.search(name)
            is_text = is_text and not _ROUTING.search(name)
            linear = name.removesuffix(".weight")
            outputs = shape[0] if math.prod(shape) == count else _outputs(linear, count, sizes)
            linears.append(Linear(linear, count // outputs, outputs, is_text))
            if linear.endswith("qkv_proj"):
                sizes["fused_qkv"] = outputs
    num_parameters = sum(count for count, _ in tensors.values())
    experts = _experts(text, sizes["hidden"], len(expert_layers), num_in_experts)
    idle = 0.0
    if experts is not None:
        idle = num_in_experts * (1 - experts.top_k / experts.num_experts)
    return ModelFacts(
        num_parameters=num_parameters,
        num_active=num_parameters - int(idle),
        num_other=num_parameters - num_quantized,
        linears=tuple(linears),
        experts=experts,
        sizes=sizes,
    )


def _tensors(
    files: ModelFiles, num_layers: int
) -> Iterator[tuple[str, tuple[int, tuple[int, ...]]]]:
    """Yield name, number of parameters and shape of each weight that transformers loads."""
    for name, (dtype, shape) in files.tensors.items():
        layer = _LAYER.search(name)
        is_extra = layer is not None and int(layer[1]) >= num_layers
        if _NOT_A_WEIGHT.search(name) or _EXTRA.search(name):
            continue
        if is_extra and not _NOT_TEXT.search(name):
            continue
        count = math.prod(shape)
        if dtype == "U8":
            # Two 4-bit numbers in a byte.
            count *= 2
        yield _PACKED.sub("", name), (count, shape)


def _sizes(text: dict[str, Any]) -> dict[str, int]:
    """Return the widths that `Shape` names, from the config of the text model."""
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    missing = [name for name in names if not isinstance(text.get(name), int) or text[name] < 1]
    if missing:
        raise Unknown(f"its config.json has no {missing[0]}")
    hidden, num_heads = text["hidden_size"], text["num_attention_heads"]
    latent = text.get("qk_nope_head_dim")
    if latent:
        # Latent attention: every head has its own keys.
        head_dim, num_kv_heads = latent + (text.get("qk_rope_head_dim") or 0), num_heads
    else:
        head_dim = text.get("head_dim") or hidden // num_heads
        num_kv_heads = text.get("num_key_value_heads") or num_heads
    return {
        "num_layers": text["num_hidden_layers"],
        "hidden": hidden,
        "query": num_heads * head_dim,
        "key_value": num_kv_heads * head_dim,
        "mlp": text.get("intermediate_size") or 4 * hidden,
        "vocab": text["vocab_size"],
    }


def _outputs(linear: str, count: int, sizes: dict[str, int]) -> int:
    """Return the outputs of a layer whose weight is stored as a column of packed numbers."""
    query, key_value, mlp = sizes["query"], sizes["key_value"], sizes["mlp"]
    outputs = {
        **{"q_proj": query, "k_proj": key_value, "v_proj": key_value, "gate_proj": mlp},
        **{"up_proj": mlp, "gate_up_proj": 2 * mlp, "qkv_proj": query + 2 * key_value},
    }
    return min(count, outputs.get(linear.rpartition(".")[2], sizes["hidden"]))


def _experts(
    text: dict[str, Any], hidden: int, num_layers: int, num_weights: int
) -> Experts | None:
    count = next((text[name] for name in EXPERT_COUNTS if text.get(name)), None)
    top_k = next((text[name] for name in TOP_K if text.get(name)), None)
    if not num_layers or not isinstance(count, int) or not isinstance(top_k, int):
        return None
    # Three matrices per expert: gate, up and down.
    width = round(num_weights / (num_layers * count * 3 * hidden))
    shared = text.get("shared_expert_intermediate_size")
    return Experts(
        num_layers=num_layers,
        num_experts=count,
        top_k=min(top_k, count),
        width=width,
        shared=shared or width * (text.get("n_shared_experts") or 0),
    )


def _is_adapted(layer: Linear, lora: LoraConfig) -> bool:
    targets = lora.target_modules
    if targets == "all-linear":
        return True
    if targets == "auto":
        return layer.is_text
    return any(f".{layer.name}".endswith(f".{name}") for name in targets)
