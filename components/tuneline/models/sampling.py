"""How a published model samples unless its user says otherwise: generation_config.json.

transformers and vLLM read this file, and llama.cpp's converter copies its values into GGUF files.
"""

from typing import Any, Literal

from pydantic import Field

from tuneline.strict_model import StrictModel

Preset = Literal["greedy", "factual", "balanced", "creative"]


class Sampling(StrictModel):
    """Numbers for sampling, under the names of generation_config.json."""

    temperature: float = Field(default=1.0, gt=0, le=5)
    """Divisor of the logits. Lower values prefer likely tokens more."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Take a token of the likeliest ones that together have this probability."""
    top_k: int = Field(default=50, ge=1)
    """Take one of this many likeliest tokens; 1 is greedy."""
    repetition_penalty: float = Field(default=1.0, gt=0, le=5)
    """Divisor of the logits of tokens that the text already has; 1 is none."""


PRESETS: dict[str, Sampling] = {
    # The most likely token. A temperature of 0 would say so too, but transformers refuses it. With
    # do_sample false, vLLM and llama.cpp would sample at their own temperature.
    "greedy": Sampling(top_k=1),
    "factual": Sampling(temperature=0.1, top_p=0.9),
    "balanced": Sampling(temperature=0.5, top_p=0.9, repetition_penalty=1.1),
    "creative": Sampling(temperature=0.8, top_p=0.95, repetition_penalty=1.15),
}

_REPLACED = frozenset(
    """
    do_sample temperature top_p top_k min_p top_h typical_p epsilon_cutoff eta_cutoff
    repetition_penalty encoder_repetition_penalty no_repeat_ngram_size diversity_penalty
    length_penalty penalty_alpha num_beams num_beam_groups early_stopping guidance_scale
    """.split()
)
"""Settings of generation_config.json that decide which token is taken."""


def with_sampling(settings: dict[str, Any], sampling: Preset | Sampling) -> dict[str, Any]:
    """Return the content of a generation_config.json with another sampling."""
    numbers = PRESETS[sampling] if isinstance(sampling, str) else sampling
    kept = {name: value for name, value in settings.items() if name not in _REPLACED}
    return {**kept, "do_sample": True, **numbers.model_dump()}


def is_greedy(settings: dict[str, Any]) -> bool:
    """Return whether a generation_config.json asks for the most likely token."""
    return not settings.get("do_sample") or settings.get("top_k") == 1
