"""The context length that a model is proven at and served with, read from its config.json."""

import json
from pathlib import Path

from tuneline.models.multimodal import text_config

MAX_CONTEXT = 8192
"""Largest context length that a GGUF file is proven at, that Ollama's files name and that servers
are started with, because the whole context is reserved in memory. Users can set a larger one."""


def context_length(model_dir: Path) -> int:
    """Return the context length that the files for servers and the model card's commands get."""
    settings = text_config(json.loads((model_dir / "config.json").read_text(encoding="utf-8")))
    longest = settings.get("max_position_embeddings") or MAX_CONTEXT
    scaling = settings.get("rope_scaling") or settings.get("rope_parameters") or {}
    if scaling.get("rope_type", scaling.get("type")) in ("longrope", "su"):
        # Beyond this length llama.cpp computes all of a prompt with other rotary angles, and
        # transformers only a prompt that is as long.
        longest = (
            settings.get("original_max_position_embeddings")
            or scaling.get("original_max_position_embeddings")
            or longest
        )
    return int(min(longest, MAX_CONTEXT))
