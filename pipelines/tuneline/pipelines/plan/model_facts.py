"""What a model's config and the shapes of its tensors say about training it."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from tuneline.kernels.spec import is_fused_family
from tuneline.models.multimodal import LOADED_PARTS, text_config
from tuneline.pipelines.plan.model_files import ModelFiles, Unknown
from tuneline.train.config import LoraConfig
from tuneline.train.memory.estimate import (
    EXPERT_COUNTS,
    SCALED_EMBEDDINGS,
    TOP_K,
    WHOLE_SCORES,
    Experts,
    Shape,
)

_LAYER = re.compile(r"(?:^|\.)(?:layers|blocks|h)\.(\d+)\.")
_EXPERT = re.compile(r"\.experts\.")
_OTHER = re.compile(
    r"(^|\.)(embed_tokens|position_embedding|lm_head|wte|word_embeddings|router|gate)\."
)
"""Embeddings, the output layer and routers, which are not quantised."""
_NOT_TEXT = re.compile(
    r"(^|\.)(visual|vision\w*|audio\w*|embed_vision|embed_audio|multi_modal_projector)(\.|$)"
)
_EXTRA = re.compile(r"(^|\.)mtp\.")
_ROUTING = re.compile(r"\.(\w*expert_gate|indexer)\.")
_SHARED = re.compile(r"\.shared_experts?\.up_proj$")
_STATE = re.compile(r"\.(linear_attn|mamba|mixer)\.")
"""Layers that pass a state along the sequence."""
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
    modules: dict[str, int]
    """Number of parameters of each module that has any, by its name."""
    is_fused: bool
    """Whether the family has fused layers."""
    scales_embedding: bool = False
    """Whether the input embedding scales its rows, see `SCALED_EMBEDDINGS`."""
    has_linear_attention: bool = False
    """Whether some layers pass a state along the sequence instead of attending to it."""

    def shape(self, lora: LoraConfig) -> Shape:
        """Return the shape of the model with an adapter."""
        adapted = [layer for layer in self.linears if _is_adapted(layer, lora)]
        sides = sum(layer.num_inputs + layer.num_outputs for layer in adapted)
        if lora.experts and self.experts is not None:
            per_expert = 2 * self.sizes["hidden"] + 3 * self.experts.width
            sides += self.experts.num_layers * self.experts.num_experts * per_expert
        num_tables, num_copied = self._tables(lora)
        return Shape(
            **self.sizes,
            num_quantized=self.num_parameters - self.num_other,
            num_other=self.num_other,
            num_adapter=lora.r * sides
            + sum(
                count for name, count in self.modules.items() if _is_any(name, lora.modules_to_save)
            ),
            num_tables=num_tables,
            num_copied=num_copied,
            experts=self.experts,
            is_fused=self.is_fused,
        )

    def _tables(self, lora: LoraConfig) -> tuple[int, int]:
        """Return the parameters of `Shape.num_tables` and `Shape.num_copied`."""
        sizes = {"embed_tokens": 0, "lm_head": 0}
        for name, count in self.modules.items():
            end = name.rpartition(".")[2]
            if end in sizes and not _NOT_TEXT.search(name):
                sizes[end] = 0 if _is_any(name, lora.modules_to_save) else count
        embedding = 0 if self.scales_embedding else sizes["embed_tokens"]
        if not any(name.endswith("lm_head") for name in self.modules):
            # The head is tied to the embedding.
            return embedding, embedding
        return embedding + sizes["lm_head"], sizes["lm_head"]


def model_facts(files: ModelFiles) -> ModelFacts:
    """Return the sizes of a model.

    Raises:
        Unknown: config.json lacks the usual keys, or the tensors are not known.
    """
    if files.problem:
        raise Unknown(files.problem)
    text = text_config(files.config)
    num_layers = _number(text, "num_hidden_layers")
    tensors = dict(_tensors(files, num_layers))
    sizes = _sizes(text, num_layers, {name: shape for name, (_, shape) in tensors.items()})
    linears, num_in_experts, num_quantized = [], 0, 0
    modules: Counter[str] = Counter()
    expert_layers = set()
    for name, (count, shape) in tensors.items():
        layer = _LAYER.search(name)
        modules[name.rpartition(".")[0]] += count
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
    num_parameters = sum(modules.values())
    shared = max((count for name, count in modules.items() if _SHARED.search(name)), default=0)
    experts = _experts(text, sizes["hidden"], len(expert_layers), num_in_experts, shared)
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
        modules=dict(modules),
        is_fused=is_fused_family(str(text.get("model_type"))),
        scales_embedding=str(text.get("model_type")) in SCALED_EMBEDDINGS,
        has_linear_attention=any(_STATE.search(name) for name in modules),
    )


def _tensors(
    files: ModelFiles, num_layers: int
) -> Iterator[tuple[str, tuple[int, tuple[int, ...]]]]:
    """Yield name, number of parameters and shape of each weight that transformers loads."""
    ties = text_config(files.config).get("tie_word_embeddings", False)
    is_tied = files.config.get("tie_word_embeddings", ties)
    is_text_alone = LOADED_PARTS.get(str(files.config.get("model_type"))) == "text"
    for name, (dtype, shape) in files.tensors.items():
        layer = _LAYER.search(name)
        if is_text_alone and _NOT_TEXT.search(name):
            continue
        is_extra = layer is not None and int(layer[1]) >= num_layers
        if _NOT_A_WEIGHT.search(name) or _EXTRA.search(name):
            continue
        if is_extra and not _NOT_TEXT.search(name):
            continue
        if is_tied and name.endswith("lm_head.weight"):
            # Some files hold a tied matrix twice.
            continue
        count = math.prod(shape)
        if dtype == "U8":
            # Two 4-bit numbers in a byte.
            count *= 2
        yield _PACKED.sub("", name), (count, shape)


def _number(text: dict[str, Any], name: str) -> int:
    value = text.get(name)
    if not isinstance(value, int) or value < 1:
        raise Unknown(f"its config.json has no {name}")
    return value


def _sizes(
    text: dict[str, Any], num_layers: int, shapes: dict[str, tuple[int, ...]]
) -> dict[str, int]:
    """Return the widths that `Shape` names, from the config of the text model and its tensors.

    A published config.json may leave out what its class has as defaults. Shapes do not, unless
    weights are packed: then they have one column.
    """
    hidden = _number(text, "hidden_size")
    stored: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        module = name.removesuffix(".weight").rpartition(".")[2]
        is_text = not _NOT_TEXT.search(name) and not _EXPERT.search(name)
        if len(shape) == 2 and shape[1] > 1 and is_text:
            stored.setdefault(module, shape)
    latent = text.get("qk_nope_head_dim")
    if latent:
        # Latent attention: every head has its own keys.
        num_heads = _number(text, "num_attention_heads")
        query = key_value = num_heads * (latent + (text.get("qk_rope_head_dim") or 0))
    elif "o_proj" in stored and "k_proj" in stored:
        query, key_value = stored["o_proj"][1], stored["k_proj"][0]
    else:
        num_heads = _number(text, "num_attention_heads")
        head_dim = text.get("head_dim") or hidden // num_heads
        query = num_heads * head_dim
        key_value = (text.get("num_key_value_heads") or num_heads) * head_dim
    mlp = stored["up_proj"][0] if "up_proj" in stored else 4 * hidden
    vocab = stored["embed_tokens"][0] if "embed_tokens" in stored else None
    is_whole = text.get("model_type") in WHOLE_SCORES
    return {
        "num_layers": num_layers,
        "hidden": hidden,
        "query": query,
        "key_value": key_value,
        "mlp": text.get("intermediate_size") or mlp,
        "vocab": vocab or _number(text, "vocab_size"),
        "score_heads": _number(text, "num_attention_heads") if is_whole else 0,
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
    text: dict[str, Any], hidden: int, num_layers: int, num_weights: int, num_shared: int
) -> Experts | None:
    """Return the sizes of the layers with experts; None if there are none, or are not known.

    Args:
        text: config of the text model.
        hidden: width of the model.
        num_layers: layers with experts.
        num_weights: weights in all experts together.
        num_shared: weights in one matrix of the shared experts of a layer.
    """
    count = next((text[name] for name in EXPERT_COUNTS if text.get(name)), None)
    top_k = next((text[name] for name in TOP_K if text.get(name)), None)
    if not num_layers or not isinstance(count, int) or not isinstance(top_k, int):
        return None
    # Three matrices per expert: gate, up and down.
    width = round(num_weights / (num_layers * count * 3 * hidden))
    return Experts(
        num_layers=num_layers,
        num_experts=count,
        top_k=min(top_k, count),
        width=width,
        shared=num_shared // hidden,
    )


def _is_adapted(layer: Linear, lora: LoraConfig) -> bool:
    targets = lora.target_modules
    if _is_any(layer.name, lora.modules_to_save):
        return False
    if targets == "all-linear":
        return True
    if targets == "auto":
        return layer.is_text
    return _is_any(layer.name, targets)


def _is_any(module: str, names: Iterable[str]) -> bool:
    """Return whether a recipe means a module by one of the names."""
    return any(f".{module}".endswith(f".{name}") for name in names)
