"""Read from a GGUF file how its model scales rotary embeddings; transformers' reader ignores this.

llama.cpp's converter writes linear and yarn scaling as metadata. It writes Llama 3's scaling as a
tensor with one divisor per frequency.
"""

import math
from pathlib import Path
from typing import Any

from tuneline.errors import ModelError

_DIVISORS = "rope_freqs.weight"
_LONG_AND_SHORT = "rope_factors_long.weight"
# The published Llama 3.1, 3.2 and 3.3 models have these bounds, and this original context length.
_LOW, _HIGH, _LLAMA3_LENGTH = 1.0, 4.0, 8192
# Metadata below rope.scaling. that this module understands.
_KNOWN = {
    *("type", "factor", "original_context_length", "finetuned", "attn_factor"),
    *("yarn_ext_factor", "yarn_attn_factor", "yarn_beta_fast", "yarn_beta_slow"),
}


def read_scaling(reader: Any, path: Path, config: Any) -> dict[str, Any]:
    """Return the scaling as a part of transformers' `rope_parameters`; {} if there is none.

    Args:
        reader: a `gguf.GGUFReader`.
        path: the file, for messages.
        config: the text model's config, as transformers read it from the file.

    Raises:
        ModelError: the file has a scaling that cannot be expressed.
    """
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    values = _metadata(reader)
    kind = values.get("type", "none")
    strange = sorted(values.keys() - _KNOWN)
    if _LONG_AND_SHORT in tensors or kind not in ("none", "linear", "yarn") or strange:
        what = "longrope" if _LONG_AND_SHORT in tensors else kind
        raise ModelError(
            f"{path} scales rotary embeddings with {what}"
            f"{f' ({strange[0]})' if strange else ''}, which cannot be read from a GGUF file "
            "without loss: name the safetensors model that it was made from instead"
        )
    if _DIVISORS in tensors:
        divisors = [float(value) for value in tensors[_DIVISORS]]
        if any(abs(value - 1) > 1e-6 for value in divisors):
            return _llama3(divisors, path, config)
    factor = float(values.get("factor", 0.0))
    if kind == "none" or factor in (0.0, 1.0):
        return {}
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    length = values.get("original_context_length", config.max_position_embeddings)
    scaling = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": int(length),
    }
    for name in ("beta_fast", "beta_slow"):
        if f"yarn_{name}" in values:
            scaling[name] = float(values[f"yarn_{name}"])
    share = float(values.get("attn_factor", 1)) * float(values.get("yarn_attn_factor", 1))
    if share != 1:
        # llama.cpp multiplies this into yarn's own factor.
        scaling["attention_factor"] = share * (0.1 * math.log(factor) + 1)
    return scaling


def _metadata(reader: Any) -> dict[str, Any]:
    """Return the metadata of the scaling, by the names below `rope.scaling.`."""
    values: dict[str, Any] = {}
    for key, field in reader.fields.items():
        _, mark, name = key.partition(".rope.scaling.")
        if mark:
            values[name] = field.contents()
        elif key.endswith(".rope.scale_linear"):  # in files of 2023
            values |= {"type": "linear", "factor": field.contents()}
    return values


def _llama3(divisors: list[float], path: Path, config: Any) -> dict[str, Any]:
    """Return the parameters of Llama 3's scaling that give exactly these divisors."""
    theta = config.rope_parameters["rope_theta"]
    factor = round(max(divisors), 4)
    lengths = (_LLAMA3_LENGTH, *(2**power for power in range(8, 21)))
    for length in lengths:
        expected = _divisors(len(divisors), theta, factor, length)
        if all(math.isclose(a, b, rel_tol=1e-4) for a, b in zip(divisors, expected, strict=True)):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": _LOW,
                "high_freq_factor": _HIGH,
                "original_max_position_embeddings": length,
            }
    raise ModelError(
        f"{path} divides its rotary frequencies by {divisors[0]:g} to {factor:g}, which is not "
        "Llama 3's scaling with its published bounds: name the safetensors model that the file was "
        "made from instead"
    )


def _divisors(count: int, theta: float, factor: float, length: int) -> list[float]:
    """Return Llama 3's divisor of each of `count` frequencies."""
    divisors = []
    for index in range(count):
        wavelength = 2 * math.pi * theta ** (index / count)
        smooth = (length / wavelength - _LOW) / (_HIGH - _LOW)
        smooth = min(max(smooth, 0.0), 1.0)
        divisors.append(1 / ((1 - smooth) / factor + smooth))
    return divisors
