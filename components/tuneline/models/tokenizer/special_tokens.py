"""The end-of-sequence and padding tokens of a tokenizer whose files name none.

transformers, TRL and servers need both. The end of a sequence is the token that the model's configs
name by its ID. A padding token is never learnt and never attended to, so its only requirement is
that it is no end mark: software that takes padding for the end, or the reverse, would hide the end
mark from the loss.
"""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_PADDING = (
    *("<|finetune_right_pad_id|>", "<|fim_pad|>", "<|pad|>", "<pad>", "[PAD]", "<PAD>"),
    *("<|padding|>", "<|vision_pad|>", "<|endoftext|>", "<unk>", "<|unk|>", "[UNK]"),
)
# Texts of tokens that serve as padding, in order of preference.
_ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "</s>", "<|endoftext|>", "<eos>")
# Texts of tokens that end an answer or a document in a common template.


def add_missing_tokens(
    tokenizer: "PreTrainedTokenizerBase", model_dir: str | Path
) -> dict[str, str]:
    """Give a tokenizer an end-of-sequence and a padding token if it has none, and log them.

    Args:
        tokenizer: the tokenizer to complete.
        model_dir: the model, whose configs may name the end-of-sequence token.

    Returns:
        The names of the settings that files should have, such as pad_token, and their tokens.
    """
    added = {}
    if tokenizer.eos_token is None:
        eos = _end(tokenizer, Path(model_dir))
        if eos is not None:
            tokenizer.eos_token = added["eos_token"] = eos
    if tokenizer.pad_token is None:
        padding = _padding(tokenizer)
        tokenizer.pad_token = padding
        # Files do not name an end mark as padding: other software would hide it from the loss.
        if padding is not None and padding != tokenizer.eos_token:
            added["pad_token"] = padding
    if added:
        logger.warning(
            "the tokenizer in %s names no %s: using %s",
            model_dir,
            " and no ".join(added),
            ", ".join(f"{name} {token}" for name, token in added.items()),
        )
    return added


def end_token(tokenizer: "PreTrainedTokenizerBase", end_of_turn: str) -> int | None:
    """Return the token at which generation stops after an answer; None if there is no such token.

    Some templates end the answer first and then the turn, e.g. with the two tokens
    <|END_RESPONSE|><|END_OF_TURN_TOKEN|>. The model learns to write both, so the last one counts.

    Args:
        tokenizer: the tokenizer of the model.
        end_of_turn: text that the chat template puts after an answer.
    """
    end = end_of_turn.strip()
    ids: list[int] = tokenizer(end, add_special_tokens=False)["input_ids"] if end else []
    return ids[-1] if ids and ids[-1] in tokenizer.added_tokens_decoder else None


def _end(tokenizer: "PreTrainedTokenizerBase", model_dir: Path) -> str | None:
    """Return the token that the model's configs name, or a usual one that the tokenizer has."""
    for name in ("generation_config.json", "config.json"):
        if not (model_dir / name).is_file():
            continue
        ids = json.loads((model_dir / name).read_text(encoding="utf-8")).get("eos_token_id")
        for number in ids if isinstance(ids, list) else [ids]:
            token = tokenizer.convert_ids_to_tokens(number) if isinstance(number, int) else None
            if isinstance(token, str):
                return token
    return _first_of(tokenizer, _ENDS)


def _padding(tokenizer: "PreTrainedTokenizerBase") -> str | None:
    """Return a token for padding that is no end mark; the end-of-sequence token if all are."""
    template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else ""
    taken = {tokenizer.eos_token, tokenizer.bos_token}
    # A token that the chat template writes may end a turn.
    usual = [token for token in _PADDING if token not in taken and token not in template]
    return _first_of(tokenizer, usual) or tokenizer.unk_token or tokenizer.eos_token


def _first_of(tokenizer: "PreTrainedTokenizerBase", tokens: Sequence[str]) -> str | None:
    vocabulary = tokenizer.get_vocab()
    return next((token for token in tokens if token in vocabulary), None)
