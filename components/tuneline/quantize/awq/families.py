"""Model families of which gptqmodel makes no AWQ checkpoint.

This module is importable without torch.
"""

from typing import Any

_NO_NORMS = "does not know the norms whose outputs AWQ scales"
_NO_ROTARY = "cannot compute the rotary embeddings of one layer"
_NO_SCALE = "cannot scale the outputs of the norms"

REFUSED = {
    "phi3": _NO_NORMS,  # KeyError: 'q_zeros'
    "gemma3": _NO_ROTARY,  # Gemma3RotaryEmbedding.forward() missing ... 'layer_type'
    "gemma3_text": _NO_ROTARY,
    "glm4": "splits gate_up_proj into layers that transformers does not read back",
    "cohere2": _NO_SCALE,  # prev_op Cohere2LayerNorm not supported yet
}
"""Values of `model_type` with which gptqmodel 7.6.0 fails -> what it lacks, as the rest of a
sentence."""


def awq_problem(config: dict[str, Any]) -> str | None:
    """Return why no AWQ checkpoint can be made of a model; None: no reason is known.

    Args:
        config: content of the model's config.json.
    """
    text = config.get("text_config")
    names = (config.get("model_type"), text.get("model_type") if isinstance(text, dict) else None)
    for name in names:
        if name in REFUSED:
            return f"gptqmodel {REFUSED[name]} in the family {name}"
    return None
