"""Load the tokenizer of a fetched model."""

import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer

from tuneline.artifacts import ModelOrigin
from tuneline.errors import ModelError
from tuneline.models.tokenizer.special_tokens import add_missing_tokens
from tuneline.runtime.torch_free import show_torch

# If a model has no limit, transformers sets model_max_length to a number above this one.
_NO_LIMIT = 10**9


def load_tokenizer(base_model_dir: str) -> tuple[Any, int]:
    """Return the model's tokenizer and the largest number of tokens in the model's context.

    Raises:
        ModelError: there is no tokenizer, or it cannot map its tokens to positions in the text.
    """
    path = Path(base_model_dir)
    if not (path / "config.json").is_file():
        raise ModelError(f"{path} has no config.json: give the directory that the fetch step made")
    names = {"tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt"}
    if not any((path / name).is_file() for name in names):
        raise ModelError(
            f"{path} has no tokenizer (no tokenizer.json or tokenizer.model): copy the tokenizer "
            "files of the original model into this directory"
        )
    trusted = _runs_own_code(path)
    if trusted:
        show_torch()
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trusted)
        model_config = AutoConfig.from_pretrained(path, trust_remote_code=trusted)
    except (ValueError, OSError, KeyError) as error:
        raise ModelError(
            f"the tokenizer in {path} cannot be loaded ({' '.join(str(error).split())[:200]}): "
            "fetch the model again"
        ) from error
    if not tokenizer.is_fast:
        raise ModelError(
            f"the tokenizer in {path} is not a fast tokenizer (tokenizer.json), but the loss mask "
            "needs the character offsets that only fast tokenizers report: convert it first"
        )
    if tokenizer.chat_template is None:
        tokenizer.chat_template = _processor_template(path)
    add_missing_tokens(tokenizer, path)
    # Examples are truncated later (truncation.py), where the lost tokens are counted.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    limits = [tokenizer.model_max_length]
    limits.append(getattr(model_config, "max_position_embeddings", None) or _NO_LIMIT)
    return tokenizer, int(min(*limits, _NO_LIMIT))


def _processor_template(path: Path) -> str | None:
    """Return the chat template in chat_template.json, where older models that see images have it.

    transformers reads that file for a processor and not for a tokenizer.
    """
    file = path / "chat_template.json"
    if not file.is_file():
        return None
    template = json.loads(file.read_text(encoding="utf-8")).get("chat_template")
    return template if isinstance(template, str) else None


def _runs_own_code(path: Path) -> bool:
    return (path / ModelOrigin.filename).is_file() and ModelOrigin.read(path).runs_own_code
