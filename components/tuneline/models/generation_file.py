"""Read and write generation_config.json: where a model stops, and how it samples."""

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuneline.models.sampling import Preset, Sampling, with_sampling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

FILE = "generation_config.json"


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
    end = end_of_turn.strip()
    ids = tokenizer(end, add_special_tokens=False)["input_ids"] if end else []
    if len(ids) != 1 or ids[0] not in tokenizer.added_tokens_decoder:
        return
    settings = _read(directory)
    stops = stop_tokens(directory) or [tokenizer.eos_token_id]
    if ids[0] in stops:
        return
    settings["eos_token_id"] = [*(stop for stop in stops if stop is not None), ids[0]]
    _write(directory, settings)
    logger.info("generation also stops at %r, with which the chat template ends an answer", end)


def stop_tokens(directory: Path) -> list[int]:
    """Return the tokens at which transformers stops generating with the model in `directory`."""
    eos = _read(directory).get("eos_token_id")
    return eos if isinstance(eos, list) else [] if eos is None else [eos]


def _read(directory: Path) -> dict[str, Any]:
    """Return the settings; what the file lacks is taken from config.json, as transformers does."""
    model = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    path = directory / FILE
    settings: dict[str, Any] = {}
    if path.is_file():
        settings = json.loads(path.read_text(encoding="utf-8"))
        names: tuple[str, ...] = ("eos_token_id",)
    else:
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
    for name in names:
        if settings.get(name) is None and model.get(name) is not None:
            settings[name] = model[name]
    return settings


def _write(directory: Path, settings: dict[str, Any]) -> None:
    text = json.dumps(settings, indent=2) + "\n"
    (directory / FILE).write_text(text, encoding="utf-8")
