"""Load the tokenizer of a fetched model."""

from pathlib import Path
from typing import Any

from tuneline.artifacts import ModelOrigin
from tuneline.errors import ModelError

# What transformers gives a tokenizer whose model has no limit is larger than this.
_NO_LIMIT = 10**9


def load_tokenizer(base_model_dir: str) -> tuple[Any, int]:
    """Return the model's tokenizer and the longest row that the model can hold.

    Raises:
        ModelError: there is none, or it cannot tell where its tokens stand in the text.
    """
    from transformers import AutoConfig, AutoTokenizer

    path = Path(base_model_dir)
    if not (path / "config.json").is_file():
        raise ModelError(f"{path} has no config.json: name the directory that fetch made")
    names = {"tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt"}
    if not any((path / name).is_file() for name in names):
        raise ModelError(
            f"{path} has no tokenizer (no tokenizer.json or tokenizer.model): copy the tokenizer "
            "files of the model it was made from beside its weights"
        )
    trusted = _runs_own_code(path)
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
            f"the tokenizer in {path} has no fast form (tokenizer.json), and the loss mask needs "
            "the places of tokens in the text that only the fast ones know: convert it first"
        )
    # Rows are cut later, where it is counted.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    limits = [tokenizer.model_max_length]
    limits.append(getattr(model_config, "max_position_embeddings", None) or _NO_LIMIT)
    return tokenizer, int(min(*limits, _NO_LIMIT))


def _runs_own_code(path: Path) -> bool:
    return (path / ModelOrigin.filename).is_file() and ModelOrigin.read(path).runs_own_code
