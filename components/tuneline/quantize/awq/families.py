"""Model families of which gptqmodel makes no AWQ checkpoint.

This module is importable without torch.
"""

from typing import Any

UNSCALED = {"phi3"}
"""Values of `model_type` for which gptqmodel 7.6.0 does not know the norms before the layers, so it
finds nothing to scale and fails after the first layer (KeyError: 'q_zeros')."""


def awq_problem(config: dict[str, Any]) -> str | None:
    """Return why no AWQ checkpoint can be made of a model; None: no reason is known.

    Args:
        config: content of the model's config.json.
    """
    text = config.get("text_config")
    names = (config.get("model_type"), text.get("model_type") if isinstance(text, dict) else None)
    refused = [name for name in names if name in UNSCALED]
    if refused:
        return f"gptqmodel does not know which layers AWQ scales in the family {refused[0]}"
    return None
