"""The parts of the decoder layer of each model family: the table that `patch` reads.

A family is one entry of `FAMILIES`; no other module of the package names a family or reads
`config.model_type`. The activation and the biases of the linears are not in the table; they are
read from the model. transformers is not imported: a layer is recognised by the module and name of
its class. Nor is torch: `tuneline plan` reads the table without it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import nn

    from tuneline.kernels.ops.gated_activation import Kind

ACTIVATIONS: dict[str, Kind] = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
"""The activations that `gated_activation` computes, keyed by their names in transformers."""


@dataclass(frozen=True, slots=True)
class FamilySpec:
    """The parts of one family's decoder layer, by attribute name."""

    name: str
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    """Linears of `self_attn` whose concatenated outputs are q, k and v."""
    gate_up: tuple[str, ...] = ("gate_proj", "up_proj")
    """Linears of `mlp` whose concatenated outputs are gate and up."""
    gemma_norm: bool = False
    """Whether norms multiply by 1 + weight and round once, as in Gemma; see ops/rms_norm.py."""
    sandwich: bool = False
    """Whether a norm follows o_proj, and another one down_proj; a layer then has four norms."""
    head_norms: bool = False
    """Whether each head of q and k has a norm (`q_norm`, `k_norm`) before the rotation."""
    window: Literal["config", "layer"] | None = None
    """Which attribute is the width of the sliding window: `config.sliding_window` ("config") or the
    `self_attn.sliding_window` of each layer ("layer"). If that attribute is None, the layer has
    full attention. If this field is None, the family has no window."""
    softcap: bool = False
    """Whether attention caps its scores at `self_attn.attn_logit_softcapping`. Gemma-3 has that
    attribute, but does not pass it to its attention function."""
    rope_flag: str | None = None
    """The attribute of `self_attn` that says whether q and k are rotated; None if they always
    are."""
    residual_multiplier: bool = False
    """Whether both halves add `residual_multiplier` times their output to the residual stream."""
    scaled_positions: bool = False
    """Whether q is scaled from position `original_max_position_embeddings` on, as in Llama 4; the
    stock layers compute longer sequences."""
    router: str | None = None
    """The module of `mlp` that chooses among `mlp.experts`, in layers that have experts; it returns
    logits, weights and indices. If this field is None, every layer of the family is dense."""
    num_ropes: int = 1
    """Number of different rope tables that the decoder passes to its layers. A CUDA graph
    (decoder/graph.py) supports only one."""


FAMILIES = {
    # Yi and SmolLM2 are Llamas too.
    "llama.modeling_llama.LlamaDecoderLayer": FamilySpec("llama"),
    "mistral.modeling_mistral.MistralDecoderLayer": FamilySpec("mistral", window="config"),
    # Qwen2.5 is a Qwen2; q, k and v have a bias.
    "qwen2.modeling_qwen2.Qwen2DecoderLayer": FamilySpec("qwen2", window="layer"),
    "qwen3.modeling_qwen3.Qwen3DecoderLayer": FamilySpec("qwen3", head_norms=True, window="layer"),
    # Every fourth layer has no rotation.
    "smollm3.modeling_smollm3.SmolLM3DecoderLayer": FamilySpec(
        "smollm3", window="layer", rope_flag="use_rope"
    ),
    "granite.modeling_granite.GraniteDecoderLayer": FamilySpec("granite", residual_multiplier=True),
    "ministral3.modeling_ministral3.Ministral3DecoderLayer": FamilySpec(
        "ministral3", window="config", scaled_positions=True
    ),
    # A mixture of experts; some layers may be dense.
    "qwen3_moe.modeling_qwen3_moe.Qwen3MoeDecoderLayer": FamilySpec(
        "qwen3_moe", head_norms=True, window="layer", router="gate"
    ),
    "mixtral.modeling_mixtral.MixtralDecoderLayer": FamilySpec(
        "mixtral", window="config", router="gate"
    ),
    # Phi-3.5 is a Phi-3.
    "phi3.modeling_phi3.Phi3DecoderLayer": FamilySpec(
        "phi3", qkv=("qkv_proj",), gate_up=("gate_up_proj",), window="config"
    ),
    # Every second layer has a window.
    "gemma2.modeling_gemma2.Gemma2DecoderLayer": FamilySpec(
        "gemma2", gemma_norm=True, sandwich=True, window="layer", softcap=True
    ),
    # Five of six layers have a window; they rotate with another base than the sixth layer.
    "gemma3.modeling_gemma3.Gemma3DecoderLayer": FamilySpec(
        "gemma3", gemma_norm=True, sandwich=True, head_norms=True, window="layer", num_ropes=2
    ),
}
"""The families by the path of their decoder layer's class, without `transformers.models.`."""


def family_spec(layer: nn.Module) -> FamilySpec | None:
    """Return the spec of a stock decoder layer, or None if its class is not in the table."""
    cls = type(layer)
    prefix = "transformers.models."
    if not cls.__module__.startswith(prefix):
        return None
    return FAMILIES.get(f"{cls.__module__.removeprefix(prefix)}.{cls.__qualname__}")


def is_fused_family(model_type: str) -> bool:
    """Return whether the decoder layers of a text model's `config.model_type` are in the table."""
    return model_type.removesuffix("_text") in {path.partition(".")[0] for path in FAMILIES}
