"""Models that read images or sounds besides text, and which part of them is loaded.

Their config.json has the text model's settings under `text_config`. transformers has a class for
causal language models of only some of these families: for some, it has the whole model, whose
encoders stay frozen; for others, the text model alone. Only config.json is needed to tell.
"""

from typing import Any, Literal

from tuneline.errors import ModelError

Part = Literal["whole", "text"]

LOADED_PARTS: dict[str, Part] = {
    **dict.fromkeys(("gemma3", "gemma3n", "gemma4", "gemma4_unified"), "whole"),
    **dict.fromkeys(("llama4", "mllama", "qwen3_5", "qwen3_5_moe"), "text"),
}
"""The part that `AutoModelForCausalLM` loads, by `model_type`."""


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a config.json's content that describes the text model."""
    text = config.get("text_config")
    return text if isinstance(text, dict) else config


def loaded_part(config: dict[str, Any], *, source: str) -> Part | None:
    """Return which part of a multimodal model is loaded; None: the model reads text alone.

    Args:
        config: the content of config.json.
        source: the model's name, for messages.

    Raises:
        ModelError: transformers has no causal language model for the family.
    """
    if text_config(config) is config or config.get("auto_map"):
        return None
    kind = str(config.get("model_type"))
    if kind not in LOADED_PARTS:
        raise ModelError(
            f"{source} is a multimodal model of a family ({kind}) that transformers has no causal "
            "language model for: name a model that reads text alone as base_model, or one of the "
            f"families {', '.join(sorted(LOADED_PARTS))}"
        )
    return LOADED_PARTS[kind]
