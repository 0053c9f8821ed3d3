"""Convert a GGUF file to safetensors and a tokenizer.

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
from tuneline.fetch.config_sizes import check_sizes
from tuneline.fetch.gguf_header import check_header
from tuneline.fetch.gguf_rope import read_scaling
from tuneline.models.whole import check_report

logger = logging.getLogger(__name__)

# Names, in GGUF, of the pre-tokenizers that transformers' GGUF reader reproduces correctly.
_READ_CORRECTLY = {"gpt-2", "default", "llama-bpe", "qwen2"}
_SAMPLES = (
    "The quick brown fox jumps over 12 lazy dogs.\n\tprint(f'{x:.2f}')  # 2048",
    "\uc548\ub155\ud558\uc138\uc694, \uc138\uacc4! \u00e9\u00df\u4e2d\U0001f600",
    "<|im_start|>user\nHi<|im_end|>\n",
)
"""Texts with words, numbers, code, other scripts and special tokens."""
# Keys of tokenizer_config.json that describe how the tokenizer was loaded, not the tokenizer.
_LOADING_DETAILS = ("is_local", "local_files_only", "name_or_path")


def convert(path: Path, target: Path) -> str | None:
    """Write the model in `path` to `target` in bfloat16; return the licence that the file states.

    Raises:
        ModelError: the file is broken or of an architecture that transformers does not know.
    """
    header = check_header(path)
    # Imported here because torch and transformers take seconds, and most models need neither.
    import torch
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM, GgufConfig

    auto: Any = AutoModelForCausalLM  # Its annotation leaves out `output_loading_info`.
    with _readable(path):
        reader = GGUFReader(path)
        sides = [int(side) for tensor in reader.tensors for side in tensor.shape]
        check_sizes(
            {key.partition(".")[2]: value for key, value in header.items()},
            num_tensors=len(reader.tensors),
            largest=max(sides, default=0),
            source=str(path),
            described_in="the header",
        )
        fields = reader.fields
        licence = fields.get("general.license")
        tokenizer = _read_tokenizer(path, reader)
        model, report = auto.from_pretrained(
            path.parent,
            gguf_file=path.name,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # `check_report` refuses them by name.
            # Without this, weights stay in GGUF's quantised blocks, which safetensors cannot store.
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
        )
    check_report(report, str(path))
    config = model.config.get_text_config()
    scaling = read_scaling(reader, path, config)
    if scaling:
        parameters = config.rope_parameters
        parameters.get("full_attention", parameters).update(scaling)
        logger.info("%s scales rotary embeddings: %s", path.name, scaling)
    model.save_pretrained(target)
    _save_tokenizer(tokenizer, model.config, target)
    check_reloaded(tokenizer, target, path)
    return licence.contents() if licence else None


def write_tokenizer(path: Path, target: Path) -> None:
    """Write the tokenizer and the config of the model in `path` to `target`, but no weights.

    Raises:
        ModelError: the file is broken or of an architecture that transformers does not know.
    """
    check_header(path)
    from gguf import GGUFReader
    from transformers import AutoConfig

    with _readable(path):
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
        tokenizer = _read_tokenizer(path, GGUFReader(path))
    config.save_pretrained(target)
    _save_tokenizer(tokenizer, config, target)


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
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


def _read_tokenizer(path: Path, reader: Any) -> Any:
    """Return the tokenizer in a GGUF file, which `reader` has open."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    pre_tokenizer = reader.fields.get("tokenizer.ggml.pre")
    _complete(tokenizer, pre_tokenizer.contents() if pre_tokenizer else "default")
    return tokenizer


def _complete(tokenizer: Any, pre_tokenizer: str) -> None:
    """Set the parts of the tokenizer that transformers' GGUF reader gets wrong or leaves out.

    Args:
        tokenizer: the tokenizer that transformers read from the file.
        pre_tokenizer: the pre-tokenizer that the file names. If it is not a known one, the
            tokenizer's own stays, and a warning says that it may split text differently.
    """
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

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


def check_reloaded(tokenizer: Any, target: Path, source: Path) -> None:
    """Check that the written tokenizer encodes and decodes as the one that was read.

    Raises:
        ModelError: a text has other tokens, or tokens stand for another text.
    """
    from transformers import AutoTokenizer

    written: Any = AutoTokenizer.from_pretrained(str(target))
    for text in _SAMPLES:
        ids, again = (one.encode(text, add_special_tokens=False) for one in (tokenizer, written))
        if ids != again or tokenizer.decode(ids) != written.decode(ids):
            raise ModelError(
                f"the tokenizer of {source} changes when it is written and read again (the text "
                f"{text!r} becomes {tokenizer.decode(ids)!r} before and {written.decode(again)!r} "
                "after): name the safetensors model that it was made from instead"
            )


def _save_tokenizer(tokenizer: Any, config: Any, target: Path) -> None:
    """Write the tokenizer of the model with this config, without how it was loaded."""
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(target)
    path = target / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    for key in _LOADING_DETAILS:
        settings.pop(key, None)
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
