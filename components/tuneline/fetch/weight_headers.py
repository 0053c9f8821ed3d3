"""Read the headers of safetensors files, and count a model's parameters by them."""

import json
import math
import re
import struct
from pathlib import Path
from typing import Any

from tuneline.errors import ModelError

_MAX_HEADER_BYTES = 100_000_000
"""Largest header of a safetensors file; that of the library that writes them."""
# Names of what bitsandbytes stores beside a weight in 4 bits.
_IN_4BIT = re.compile(r"\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.\w+)$")


def read_header(file: Path, source: str) -> dict[str, Any]:
    """Return the header of a safetensors file: dtype, shape and offsets of each tensor."""
    with open(file, "rb") as stream:
        head = stream.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        size = file.stat().st_size
        try:
            fits = 0 < length <= min(size - 8, _MAX_HEADER_BYTES)
            header = json.loads(stream.read(length)) if fits else None
        except (ValueError, RecursionError):
            header = None
    if not isinstance(header, dict):
        raise ModelError(f"{source}: {file.name} is not a safetensors file, or it was cut off")
    tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
    end = max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
    if 8 + length + end > size:
        raise ModelError(
            f"{source}: {file.name} was cut off ({size} of {8 + length + end} bytes): "
            "download it again"
        )
    return tensors


def count_parameters(tensors: dict[str, Any]) -> int:
    """Return the number of parameters, by the headers of the weight files."""
    count = 0
    for name, entry in tensors.items():
        if f"{name}.absmax" in tensors:
            start, end = entry["data_offsets"]
            count += 2 * (end - start)  # bitsandbytes stores two weights in a byte
        elif not _IN_4BIT.search(name):
            count += math.prod(entry["shape"])
    return count
