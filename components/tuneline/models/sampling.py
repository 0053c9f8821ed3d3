"""How a model samples and where it stops unless its user says otherwise: generation_config.json.

transformers and vLLM read this file, and llama.cpp's converter copies its values into GGUF files.
"""

import json
import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from tuneline.models.tokenizer.special_tokens import end_token
from tuneline.strict_model import StrictModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

FILE = "generation_config.json"

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

    @property
    def is_greedy(self) -> bool:
        """Return whether the most likely token is always taken."""
        return self.top_k == 1


@dataclass(frozen=True)
class Request:
    """What is asked of a model besides the prompt."""

    num_tokens: int
    """Largest number of tokens to generate."""
    sampling: Sampling
    """How to take a token."""
    seed: int | None = None
    """Seed of the draws; None: other draws each time."""
    ends: Collection[int] = ()
    """Tokens to stop at in addition to the model's own."""


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

UNLIMITED_TOP_K = 1 << 30
"""A top_k above the size of every vocabulary."""
_NEUTRAL = {"min_p": 0.0, "typical_p": 1.0, "num_beams": 1, "no_repeat_ngram_size": 0}
"""Values of settings with which they change nothing."""


def with_sampling(settings: dict[str, Any], sampling: Preset | Sampling) -> dict[str, Any]:
    """Return the content of a generation_config.json with another sampling."""
    numbers = PRESETS[sampling] if isinstance(sampling, str) else sampling
    kept = {name: value for name, value in settings.items() if name not in _REPLACED}
    return {**kept, "do_sample": True, **numbers.model_dump()}


def is_greedy(settings: dict[str, Any]) -> bool:
    """Return whether a generation_config.json asks for the most likely token."""
    return not settings.get("do_sample") or settings.get("top_k") == 1


def published_sampling(settings: Mapping[str, Any]) -> tuple[Sampling, list[str]]:
    """Return how a generation_config.json samples, and its settings that `Sampling` cannot express.

    Numbers that the file lacks are the defaults of transformers, which `Sampling` has too.
    """
    if not settings.get("do_sample"):
        settings = {"top_k": 1, "repetition_penalty": settings.get("repetition_penalty")}
    numbers: dict[str, Any] = {}
    left = []
    for name in sorted(_REPLACED & settings.keys() - {"do_sample"}):
        value = settings[name]
        if name == "top_k" and isinstance(value, int) and value <= 0:
            value = UNLIMITED_TOP_K  # vLLM and transformers write "no limit" so
        if value is None or _NEUTRAL.get(name) == value:
            continue
        try:
            Sampling(**{name: value})
            numbers[name] = value
        except ValueError:
            left.append(f"{name} {value}")
    return Sampling(**numbers), left


def read_settings(directory: Path) -> dict[str, Any]:
    """Return the generation_config.json of a model; empty if it has none."""
    path = directory / FILE
    settings: dict[str, Any] = {}
    if path.is_file():
        settings = json.loads(path.read_text(encoding="utf-8"))
    return settings


def set_sampling(directory: Path, sampling: Preset | Sampling) -> None:
    """Replace the base model's sampling, which was chosen for another model."""
    settings = _read(directory)
    _write(directory, with_sampling(settings, sampling))


def stop_at_end_of_turn(
    directory: Path, end_of_turn: str, tokenizer: "PreTrainedTokenizerBase"
) -> None:
    """Add the token that the chat template puts after an answer to generation_config.json.

    transformers and vLLM read the stop tokens from that file. A base model that was not trained for
    chats lists only the end-of-text token there, so both would keep generating after an answer.
    """
    token = end_token(tokenizer, end_of_turn)
    settings = _read(directory)
    stops = stop_tokens(directory) or [tokenizer.eos_token_id]
    if token is None or token in stops:
        return
    settings["eos_token_id"] = [*(stop for stop in stops if stop is not None), token]
    _write(directory, settings)
    logger.info(
        "generation also stops at %r, with which the chat template ends an answer",
        tokenizer.decode([token]),
    )


def stop_tokens(directory: Path) -> list[int]:
    """Return the tokens at which transformers stops generating with the model in `directory`."""
    eos = _read(directory).get("eos_token_id")
    return eos if isinstance(eos, list) else [] if eos is None else [eos]


def _read(directory: Path) -> dict[str, Any]:
    """Return the settings; what the file lacks is taken from config.json, as transformers does."""
    model = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    settings = read_settings(directory)
    has_file = (directory / FILE).is_file()
    names = ("eos_token_id",) if has_file else ("bos_token_id", "eos_token_id", "pad_token_id")
    for name in names:
        if settings.get(name) is None and model.get(name) is not None:
            settings[name] = model[name]
    return settings


def _write(directory: Path, settings: dict[str, Any]) -> None:
    text = json.dumps(settings, indent=2) + "\n"
    (directory / FILE).write_text(text, encoding="utf-8")
