"""Which quantised base models are taken, and what is done with their weights.

    4 bits of bitsandbytes, NF4 or FP4   kept: they are what training works on anyway
    the same, in a mixture of experts    converted: transformers stacks experts when it loads them
    8 bits of bitsandbytes, FP8, MXFP4   converted to bfloat16
    all others (GPTQ, AWQ, ...)          refused

Only config.json is needed to tell, so the question can be asked before a model is downloaded.
"""

from dataclasses import dataclass
from typing import Any

from tuneline.errors import ModelError
from tuneline.models.stored_quantisation import quantization_in, type_of

SETTINGS_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
"""Files beside config.json that describe quantised weights."""

_FP8 = ("fp8", "fbgemm_fp8")


@dataclass(frozen=True)
class Quantisation:
    """How the weights of a source are quantised."""

    name: str
    """The format, for messages and records, e.g. "bitsandbytes nf4"."""
    is_kept: bool
    """Whether the weights stay as they are. Otherwise fetch converts them to bfloat16."""
    block: tuple[int, int] | None = None
    """Rows and columns of a weight that share a scale, if config.json says."""


def quantisation_of(
    settings: dict[str, Any], *, source: str, original: str | None = None
) -> Quantisation | None:
    """Return how a model's weights are quantised, by its config.json; None: they are not.

    Args:
        settings: the content of config.json.
        source: the model's name, for messages.
        original: the model that it was made from, if its card names it.

    Raises:
        ModelError: the weights are quantised in a format that is neither trained nor converted.
    """
    found = quantization_in(settings)
    if found is None:
        return None
    method = str(found.get("quant_method") or ("bitsandbytes" if type_of(found) else "unknown"))
    name, taken, is_kept = method, False, False
    if method == "bitsandbytes":
        kind = type_of(found)
        name = f"bitsandbytes {kind or 'int8'}"
        is_kept = kind is not None
        taken = is_kept or bool(found.get("load_in_8bit", found.get("_load_in_8bit")))
    elif method in (*_FP8, "mxfp4"):
        taken = True
    elif method == "compressed-tensors":
        weights = _compressed_weights(found)
        name = f"{method} {weights or found.get('format')}"
        taken = weights is not None
    elif method == "modelopt":
        name = f"{method} {found.get('quant_algo')}"
        taken = found.get("quant_algo") == "FP8"
    if not taken:
        way_out = f"{original}, from which it was made" if original else "the model in 16 bits"
        raise ModelError(
            f"{source} is quantised in a format ({name}) that tuneline neither trains on nor "
            f"converts: name {way_out}, as base_model; tuneline quantises it for training. Weights "
            "in bitsandbytes' 4 or 8 bits, FP8 and MXFP4 are taken"
        )
    return Quantisation(name, is_kept, _block(found.get("weight_block_size")))


def _block(sizes: Any) -> tuple[int, int] | None:
    if not isinstance(sizes, list) or len(sizes) != 2:
        return None
    num_rows, num_columns = sizes
    if not isinstance(num_rows, int) or not isinstance(num_columns, int):
        return None
    return num_rows, num_columns


def _compressed_weights(quantization: dict[str, Any]) -> str | None:
    """Return the format of compressed-tensors' weights if each is one 8-bit value, else None."""
    groups = quantization.get("config_groups")
    kinds = set()
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        if isinstance(weights, dict):
            is_plain = weights.get("symmetric", True) or weights.get("type") == "float"
            kinds.add((weights.get("type"), weights.get("num_bits"), is_plain))
    sparsity = quantization.get("sparsity_config") or {}
    if sparsity.get("format", "dense") != "dense":
        return None
    return {(("float", 8, True),): "fp8", (("int", 8, True),): "int8"}.get(tuple(kinds))
