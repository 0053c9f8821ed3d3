"""Give llama.cpp's converter the files of a model in the form that it reads.

Models that transformers 5 saved have tokenizer.json alone, and settings under transformers' names.
For some families the converter reads other files and names:

    tokenizer.model    the pieces of a sentencepiece vocabulary, from which tokenizer.json was made
    tokenizer_class    in tokenizer_config.json: GPT2Tokenizer tells Phi-4 from Phi-3
    config.json        settings that the original models have, see `_IN_CONFIG`
    generation_config.json   how to sample, see `_SAMPLING`

All follow from what is there. Texts and logits are compared after the conversion, as for any model.
"""

import contextlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tuneline.models.context import MAX_CONTEXT
from tuneline.models.sampling import FILE, is_greedy, read_settings
from tuneline.runtime.scratch import scratch_directory

PIECES_FILE = "tokenizer.model"

_IN_CONFIG: dict[str, dict[str, Any]] = {
    # Otherwise the converter takes the softmax of DeepSeek V2 for its routers.
    "deepseek_v3": {"scoring_func": "sigmoid"},
}
"""Settings that the converter needs by model type; transformers computes the same without them."""

_SAMPLING: dict[str, Any] = {
    "min_p": 0.0,
    "penalty_last_n": MAX_CONTEXT,
    "sequence": "penalties;temperature;top_k;top_p;min_p",
}
"""What transformers does when it samples, under the converter's names. Without these values,
llama.cpp drops tokens below 0.05 of the highest probability, penalises repetitions of the last 64
tokens only, and applies the temperature last. (-1 for the whole text, which older versions
understand, is refused by llama-server of 2026-10.)"""

# Types of a piece in sentencepiece's ModelProto.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6
_BPE = 2
"""trainer_spec.model_type of byte-pair encoding."""


@contextlib.contextmanager
def complete(model_dir: Path) -> Iterator[Path]:
    """Yield a directory for the converter: the model's own, or one of links with what is missing.

    Args:
        model_dir: the model directory.
    """
    missing = _missing_files(model_dir)
    if not missing:
        yield model_dir
        return
    with scratch_directory() as scratch:
        for path in model_dir.iterdir():
            if path.name not in missing:
                (scratch / path.name).symlink_to(path.resolve())
        for name, content in missing.items():
            (scratch / name).write_bytes(content)
        yield scratch


def _missing_files(model_dir: Path) -> dict[str, bytes]:
    config = _json(model_dir / "config.json")
    model_type = config.get("model_type")
    missing = {}
    settings = _IN_CONFIG.get(str(model_type), {})
    if not settings.items() <= config.items():
        missing["config.json"] = json.dumps({**config, **settings}).encode()
    sampling = read_settings(model_dir)
    if not is_greedy(sampling):
        missing[FILE] = json.dumps({**_SAMPLING, **sampling}).encode()
    tokenizer_file, tokenizer_settings = "tokenizer.json", "tokenizer_config.json"
    if not (model_dir / tokenizer_file).is_file() or (model_dir / PIECES_FILE).is_file():
        return missing
    tokenizer = _json(model_dir / tokenizer_file)
    if tokenizer["model"].get("type") != "BPE":
        return missing
    if tokenizer["model"].get("byte_fallback"):
        missing[PIECES_FILE] = _pieces(tokenizer)
    elif model_type == "phi3":
        values = {**_json(model_dir / tokenizer_settings), "tokenizer_class": "GPT2Tokenizer"}
        missing[tokenizer_settings] = json.dumps(values).encode()
    return missing


def _json(file: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return values


def _pieces(tokenizer: dict[str, Any]) -> bytes:
    """Return a ModelProto: the pieces in the order of their IDs, and what kind of model it is.

    A piece's score is the negative rank of the first merge that makes it: sentencepiece joins the
    pair whose piece has the highest score, tokenizers the pair of the first merge.
    """
    vocabulary = tokenizer["model"]
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(vocabulary["merges"]):
        pair = merge.split(" ", 1) if isinstance(merge, str) else merge
        ranks.setdefault("".join(pair), rank)
    added = {token["content"]: token for token in tokenizer.get("added_tokens") or []}
    texts = {index: text for text, index in vocabulary["vocab"].items()}
    texts |= {token["id"]: text for text, token in added.items()}
    unknown = vocabulary.get("unk_token") or "<unk>"
    if unknown not in texts.values():
        unknown = texts[0]  # sentencepiece requires one
    parts = []
    for index in range(max(texts) + 1):
        text = texts.get(index, f"<unused{index}>")
        kind = _NORMAL
        if text == unknown:
            kind = _UNKNOWN
        elif text in added:
            kind = _CONTROL if added[text]["special"] else _USER_DEFINED
        elif len(text) == len("<0x00>") and text.startswith("<0x") and text.endswith(">"):
            kind = _BYTE
        score = float(-ranks.get(text, 0))
        piece = _bytes(1, text.encode()) + _float(2, score) + _number(3, kind)
        parts.append(_bytes(1, piece))
    normalizer = json.dumps(tokenizer.get("normalizer") or {})
    splitter = json.dumps(tokenizer.get("pre_tokenizer") or {})
    puts_space = '"Prepend"' in normalizer or '"prepend_scheme": "first"' in splitter
    trainer = _number(3, _BPE) + _number(4, max(texts) + 1) + _number(35, 1)
    # identity; add_dummy_prefix, remove_extra_whitespaces, escape_whitespaces
    rules = _bytes(1, b"identity") + _number(3, int(puts_space)) + _number(4, 0) + _number(5, 1)
    return b"".join([*parts, _bytes(2, trainer), _bytes(3, rules)])


def _varint(value: int) -> bytes:
    parts = []
    while value > 127:
        parts.append(value & 127 | 128)
        value >>= 7
    return bytes([*parts, value])


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _float(field: int, value: float) -> bytes:
    return _varint(field << 3 | 5) + struct.pack("<f", value)


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value
