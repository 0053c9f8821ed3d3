"""Read what the headers of weight files state, before a library trusts them."""

import json
import math
import re
import struct
from pathlib import Path
from typing import Any

from tuneline.errors import ModelError
from tuneline.models.weight_files import INDEX_FILE

_MAX_HEADER_BYTES = 100_000_000
"""Largest header of a safetensors file; that of the library that writes them."""
# Names of what bitsandbytes stores beside a weight in 4 bits.
_IN_4BIT = re.compile(r"\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.\w+)$")


def files_in_index(weight_map: object, source: str) -> list[str]:
    """Return the files that an index names.

    Raises:
        ModelError: it does not name files of the model's directory.
    """
    names: set[str] = set()
    for name in weight_map.values() if isinstance(weight_map, dict) else [weight_map]:
        if not isinstance(name, str) or Path(name).name != name or not name.isprintable():
            raise ModelError(
                f"{source}: {INDEX_FILE} must name a file of the model's directory for each "
                f"weight, but names {name!r:.100}"
            )
        names.add(name)
    return sorted(names)


def read_header(file: Path, source: str) -> dict[str, Any]:
    """Return the header of a safetensors file: dtype, shape and offsets of each tensor.

    Raises:
        ModelError: the file was cut off, or is no safetensors file.
    """
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
    if not all(map(_is_tensor, tensors.values())):
        raise ModelError(
            f"{source}: the header of {file.name} does not describe tensors: download it again"
        )
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


def longest_side(tensors: dict[str, Any]) -> int:
    """Return the longest side of a tensor, by the headers of the weight files."""
    return max((side for entry in tensors.values() for side in entry["shape"]), default=0)


def _is_tensor(entry: Any) -> bool:
    """Return whether an entry of a header has the offsets and the shape of a tensor."""
    if not isinstance(entry, dict):
        return False
    offsets, shape = entry.get("data_offsets"), entry.get("shape")
    if not isinstance(offsets, list) or not isinstance(shape, list) or len(offsets) != 2:
        return False
    return all(type(number) is int and number >= 0 for number in (*offsets, *shape))
