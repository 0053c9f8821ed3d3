"""Convert a GGUF file to safetensors and a tokenizer."""

import logging
from pathlib import Path
from typing import Any

from tuneline.errors import ModelError
from tuneline.fetch.config_sizes import check_sizes
from tuneline.fetch.gguf.header import check_header
from tuneline.fetch.gguf.rope import read_scaling
from tuneline.fetch.gguf.tokenizer import complete, readable, save_tokenizer
from tuneline.models.whole import check_report

logger = logging.getLogger(__name__)

_SAMPLES = (
    "The quick brown fox jumps over 12 lazy dogs.\n\tprint(f'{x:.2f}')  # 2048",
    "\uc548\ub155\ud558\uc138\uc694, \uc138\uacc4! \u00e9\u00df\u4e2d\U0001f600",
    "<|im_start|>user\nHi<|im_end|>\n",
)
"""Texts with words, numbers, code, other scripts and special tokens."""


def convert(path: Path, target: Path) -> str | None:
    """Write the model in `path` to `target` in bfloat16; return the licence that the file states.

    Raises:
        ModelError: the file is broken or of an architecture that transformers does not know.
    """
    header = check_header(path)
    # Imported here because torch and transformers take seconds, and most models need neither.
    import torch
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    auto: Any = AutoModelForCausalLM  # Its annotation leaves out `output_loading_info`.
    with readable(path):
        reader = GGUFReader(path)
        sides = [int(side) for tensor in reader.tensors for side in tensor.shape]
        check_sizes(
            {key.partition(".")[2]: value for key, value in header.items()},
            num_tensors=len(reader.tensors),
            largest=max(sides, default=0),
            source=str(path),
            described_in="the header",
        )
        tokenizer: Any = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        complete(tokenizer, header)
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
    save_tokenizer(tokenizer, model.config.max_position_embeddings, target)
    check_reloaded(tokenizer, target, path)
    return header.get("general.license")


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
