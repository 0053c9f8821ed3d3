"""What a model's files say about its use, read without torch: sampling and context length.

The sampling is in generation_config.json, and a GGUF file repeats it in its metadata.
"""

import logging
from typing import Any

from tuneline.fetch.gguf.header import check_header
from tuneline.models.context import MAX_CONTEXT, context_length
from tuneline.models.sampling import Sampling, published_sampling, read_settings
from tuneline.pipelines.chat.subject import ModelFiles

logger = logging.getLogger(__name__)

_GGUF_SAMPLING = {
    "general.sampling.temp": "temperature",
    "general.sampling.top_p": "top_p",
    "general.sampling.top_k": "top_k",
    "general.sampling.min_p": "min_p",
    "general.sampling.penalty_repeat": "repetition_penalty",
}
"""Key of a GGUF file -> name in generation_config.json."""


def read_published(files: ModelFiles) -> Sampling:
    """Return how a model samples unless its user says otherwise, without loading its weights."""
    if files.kind == "gguf":
        settings = _gguf_settings(check_header(files.path))
    else:
        settings = read_settings(files.path)
    found, left = published_sampling(settings)
    if left:
        logger.warning("%s asks for %s, which is not used", files.path.name, ", ".join(left))
    return found


def read_context(files: ModelFiles) -> int:
    """Return the largest number of tokens of a conversation, without loading the weights."""
    if files.kind == "checkpoint":
        return context_length(files.path)
    metadata = check_header(files.path)
    prefix = metadata.get("general.architecture", "")
    longest = int(metadata.get(f"{prefix}.context_length", MAX_CONTEXT))
    if metadata.get(f"{prefix}.rope.scaling.type") == "longrope":
        # llama.cpp computes with other rotary angles beyond this length, as context_length says.
        longest = int(metadata.get(f"{prefix}.rope.scaling.original_context_length", longest))
    return min(longest, MAX_CONTEXT)


def _gguf_settings(metadata: dict[str, Any]) -> dict[str, Any]:
    """Return the sampling of a GGUF file, under the names of generation_config.json."""
    given = {
        # The file has float32; generation_config.json has the shortest number that rounds to it.
        name: float(f"{metadata[key]:.6g}") if isinstance(metadata[key], float) else metadata[key]
        for key, name in _GGUF_SAMPLING.items()
        if key in metadata
    }
    return {**given, "do_sample": bool(given)}
