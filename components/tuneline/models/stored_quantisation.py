"""Base models whose files hold weights that are quantised already.

Weights that bitsandbytes has quantised to 4 bits are trained on as they are. fetch converts other
formats to bfloat16, so that no other step meets them.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

if TYPE_CHECKING:
    import torch

Type4bit = Literal["nf4", "fp4"]
"""Number formats of bitsandbytes with 4 bits."""

# The second one is the name that older versions of compressed-tensors wrote.
_SETTINGS = ("quantization_config", "compression_config")


def quantization_in(settings: dict[str, Any]) -> dict[str, Any] | None:
    """Return what the content of a config.json says about quantised weights; None: nothing."""
    for part in (settings, settings.get("text_config")):
        if isinstance(part, dict):
            for name in _SETTINGS:
                found = part.get(name)
                if isinstance(found, dict) and found:
                    return found
    return None


def without_quantization(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the content of a config.json without what it says about quantised weights."""
    kept = {name: value for name, value in settings.items() if name not in _SETTINGS}
    if isinstance(kept.get("text_config"), dict):
        kept["text_config"] = without_quantization(kept["text_config"])
    return kept


def in_dtype(settings: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Return the content of a config.json for weights in a dtype, of which none is quantised."""
    # transformers 4 knows only `torch_dtype`, so a config.json that has this key keeps it.
    name = "torch_dtype" if "torch_dtype" in settings else "dtype"
    return without_quantization({**settings, name: dtype})


def type_of(quantization: dict[str, Any]) -> Type4bit | None:
    """Return the number format of bitsandbytes' 4-bit weights; None: another quantisation."""
    is_4bit = quantization.get("load_in_4bit", quantization.get("_load_in_4bit"))
    if quantization.get("quant_method", "bitsandbytes") != "bitsandbytes" or not is_4bit:
        return None
    # The default of transformers' BitsAndBytesConfig.
    kind = quantization.get("bnb_4bit_quant_type", "fp4")
    return cast(Type4bit, kind) if kind in ("nf4", "fp4") else None


def stored_type(model_dir: str | Path) -> Type4bit | None:
    """Return the number format of a model directory's 4-bit weights; None: it has none."""
    file = Path(model_dir, "config.json")
    if not file.is_file():
        return None
    quantization = quantization_in(json.loads(file.read_text(encoding="utf-8")))
    return type_of(quantization) if quantization else None


def use_dtype(model: Any, dtype: "torch.dtype") -> None:
    """Make a model that was loaded from 4-bit files compute in a dtype, as it was asked to.

    transformers keeps the dtypes of the files: those of norms and embeddings, the one that 4-bit
    weights are dequantised to, and the one that 4-bit layers compute in.
    """
    from bitsandbytes.nn.modules import Linear4bit, Params4bit

    keeps = getattr(model, "_keep_in_fp32_modules", None) or ()
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            layer: Any = module
            layer.compute_dtype = dtype
            layer.compute_type_is_set = True
            layer.weight.quant_state.dtype = dtype
        if any(part in keeps for part in name.split(".")):
            continue
        for parameter in module.parameters(recurse=False):
            if not isinstance(parameter, Params4bit) and parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
