"""The tokenizer in a GGUF file.

The tokenizer splits text as the model's original tokenizer does if the file's pre-tokenizer is in
`_READ_CORRECTLY` or is "smollm". For any other pre-tokenizer the text may be split differently, and
a warning is logged.
"""

import contextlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tuneline.errors import ModelError
from tuneline.fetch.gguf.header import check_header

logger = logging.getLogger(__name__)

# Names, in GGUF, of the pre-tokenizers that transformers' GGUF reader reproduces correctly.
_READ_CORRECTLY = {"gpt-2", "default", "llama-bpe", "qwen2"}
_KEY = "tokenizer.ggml."
_ARRAYS = frozenset(_KEY + name for name in ("tokens", "merges", "scores", "token_type"))
_TOKENS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
"""A special token's name in transformers -> its name in GGUF."""
# Keys of tokenizer_config.json that describe how the tokenizer was loaded, not the tokenizer.
_LOADING_DETAILS = ("is_local", "local_files_only", "name_or_path")


def read_tokenizer(path: Path) -> tuple[Any, int | None]:
    """Return the tokenizer in a GGUF file, and the number of tokens in the model's context.

    The context is None if the file does not state it. The header is read once, and torch is not
    imported. transformers' own reader, which `convert` uses because it also reads the weights,
    needs torch, and reads the whole header with gguf's reader each for the config and for the
    tokenizer: that takes more than ten seconds.

    Raises:
        ModelError: the file is broken, or holds a tokenizer that transformers does not know.
    """
    header = check_header(path, _ARRAYS)
    from transformers import PreTrainedTokenizerFast
    from transformers.integrations.gguf.gguf_tokenizer_mapping import (
        GGUF_TOKENIZER_MAPPING,
        convert_gguf_tokenizer,
    )

    new: Any = PreTrainedTokenizerFast  # transformers does not annotate it.
    with readable(path):
        architecture = header["general.architecture"]
        stored, settings = (
            {
                ours: header[f"tokenizer.{key}"]
                for key, ours in GGUF_TOKENIZER_MAPPING[part].items()
                if f"tokenizer.{key}" in header
            }
            for part in ("tokenizer", "tokenizer_config")
        )
        for ours, theirs in _TOKENS.items():
            token = header.get(f"{_KEY}{theirs}_token_id")
            settings[f"{ours}_token"] = None if token is None else stored["tokens"][token]
        if stored["tokenizer_type"] == "llama":
            # Files older than this key are of models that begin every text with this token.
            settings.setdefault("add_bos_token", True)
        elif stored["tokenizer_type"] == "gemma4":
            # The file says that a text begins with this token, but the template writes it.
            settings["add_bos_token"] = False
        backend, more = convert_gguf_tokenizer(architecture, stored)
        tokenizer = new(tokenizer_object=backend, **settings, **more)
    complete(tokenizer, header)
    return tokenizer, header.get(f"{architecture}.context_length")


def save_tokenizer(tokenizer: Any, context: int, target: Path) -> None:
    """Write a tokenizer of a model with this many tokens in its context, without how it was read.

    Args:
        tokenizer: the tokenizer.
        context: largest number of tokens in the model's context.
        target: directory to write the files to.
    """
    tokenizer.model_max_length = context
    tokenizer.save_pretrained(target)
    path = target / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    for key in _LOADING_DETAILS:
        settings.pop(key, None)
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Raise a ModelError for whatever the body raises because of the content of the file.

    The readers check few of the values in a file, so that the wrong ones end in any exception. The
    tokenizers library panics at some, which is no Exception.
    """
    try:
        yield
    except (ModelError, OSError):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__module__ != "pyo3_runtime":
            raise
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ModelError(
            f"{path} cannot be read as a causal language model ({reason[:300]}): name the "
            "safetensors model that it was made from instead"
        ) from error


def complete(tokenizer: Any, header: dict[str, Any]) -> None:
    """Set the parts of the tokenizer that transformers' GGUF reader gets wrong or leaves out.

    Args:
        tokenizer: the tokenizer that transformers read from the file.
        header: the numbers and texts in the file's header. If the pre-tokenizer that it names is
            not a known one, the tokenizer's own stays, and a warning says that it may split text
            differently.
    """
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    pre_tokenizer = header.get(f"{_KEY}pre", "default")
    if pre_tokenizer == "smollm":
        # transformers' reader uses a plain byte-level pre-tokenizer, which turns numbers into
        # tokens of several digits. SmolLM never saw such tokens: it was trained on single digits.
        tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
            [
                Digits(individual_digits=True),
                ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
    elif pre_tokenizer not in _READ_CORRECTLY:
        logger.warning(
            "the GGUF file names the pre-tokenizer '%s', but transformers may split text "
            "differently: compare a few tokenised lines, or name the safetensors model",
            pre_tokenizer,
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
