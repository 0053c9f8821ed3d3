"""A transformers checkpoint's weight files: their names, and the headers that they begin with.

This module is importable without torch and safetensors.
"""

import json
import struct
from pathlib import Path
from typing import Any

SINGLE_FILE = "model.safetensors"
"""File with all weights of a checkpoint that is not split into shards."""
INDEX_FILE = "model.safetensors.index.json"
"""File of a split checkpoint that maps the name of each weight to the file that contains it."""
MAX_HEADER_BYTES = 100_000_000
"""Largest header of a safetensors file; that of the library that writes them."""


def read_header(file: Path) -> dict[str, Any]:
    """Return the header of a safetensors file: dtype, shape and offsets of each tensor.

    Raises:
        ValueError: the file was cut off, or is no safetensors file; the message says so.
    """
    with open(file, "rb") as stream:
        head = stream.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        size = file.stat().st_size
        try:
            fits = 0 < length <= min(size - 8, MAX_HEADER_BYTES)
            header = json.loads(stream.read(length)) if fits else None
        except (ValueError, RecursionError):
            header = None
    if not isinstance(header, dict):
        raise ValueError(f"{file.name} is not a safetensors file, or it was cut off")
    tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
    if not all(map(_is_tensor, tensors.values())):
        raise ValueError(f"the header of {file.name} does not describe tensors: download it again")
    end = max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
    if 8 + length + end > size:
        raise ValueError(
            f"{file.name} was cut off ({size} of {8 + length + end} bytes): download it again"
        )
    return tensors


def _is_tensor(entry: Any) -> bool:
    """Return whether an entry of a header has the offsets and the shape of a tensor."""
    if not isinstance(entry, dict):
        return False
    offsets, shape = entry.get("data_offsets"), entry.get("shape")
    if not isinstance(offsets, list) or not isinstance(shape, list) or len(offsets) != 2:
        return False
    return all(type(number) is int and number >= 0 for number in (*offsets, *shape))
