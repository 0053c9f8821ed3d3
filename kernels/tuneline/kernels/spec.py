"""What each family's decoder layer is made of: the table that `patch` reads.

| family | projections | norms | activation | attention |
|---|---|---|---|---|
| Llama, Mistral, Yi, SmolLM2 | q, k, v; gate, up | 2 | silu | Mistral: window |
| Qwen2, Qwen2.5 | q, k, v with bias | 2 | silu | |
| Qwen3 | q, k, v | 2, and on each head of q, k | silu | |
| Phi-3, Phi-3.5 | qkv_proj; gate_up_proj | 2 | silu | window |
| Gemma-2 | q, k, v; gate, up | 4 (sandwich), 1 + w | gelu_tanh | softcap, window 1 of 2 |
| Gemma-3 (text) | q, k, v; gate, up | 4, 1 + w, on each head of q, k | gelu_tanh | window 5 of 6 |

Nothing of transformers is imported: a layer is known by its class's module and name.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from tuneline.kernels.ops.gated_activation import Kind

ACTIVATIONS: dict[str, Kind] = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
"""The activations that `gated_activation` knows, by transformers' names."""


@dataclass(frozen=True, slots=True)
class FamilySpec:
    """The parts of one family's decoder layer, by attribute name."""

    name: str
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    gate_up: tuple[str, ...] = ("gate_proj", "up_proj")
    gemma_norm: bool = False
    sandwich: bool = False
    head_norms: bool = False


_FAMILIES = {
    "llama.modeling_llama.LlamaDecoderLayer": FamilySpec("llama"),
    "mistral.modeling_mistral.MistralDecoderLayer": FamilySpec("mistral"),
    "qwen2.modeling_qwen2.Qwen2DecoderLayer": FamilySpec("qwen2"),
    "qwen3.modeling_qwen3.Qwen3DecoderLayer": FamilySpec("qwen3", head_norms=True),
    "phi3.modeling_phi3.Phi3DecoderLayer": FamilySpec(
        "phi3", qkv=("qkv_proj",), gate_up=("gate_up_proj",)
    ),
    "gemma2.modeling_gemma2.Gemma2DecoderLayer": FamilySpec(
        "gemma2", gemma_norm=True, sandwich=True
    ),
    "gemma3.modeling_gemma3.Gemma3DecoderLayer": FamilySpec(
        "gemma3", gemma_norm=True, sandwich=True, head_norms=True
    ),
}


def family_spec(layer: nn.Module) -> FamilySpec | None:
    """Return the spec of a stock decoder layer, or None if its class is not in the table."""
    cls = type(layer)
    prefix = "transformers.models."
    if not cls.__module__.startswith(prefix):
        return None
    return _FAMILIES.get(f"{cls.__module__.removeprefix(prefix)}.{cls.__qualname__}")
