"""Read what the headers of weight files state, before a library trusts them."""

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path

from tuneline.errors import ModelError
from tuneline.models.weight_files import INDEX_FILE

_MAX_HEADER_BYTES = 100_000_000
"""Largest header of a safetensors file; that of the library that writes them."""


@dataclass(frozen=True)
class Header:
    """Contents of a safetensors file."""

    num_parameters: int
    num_tensors: int
    largest: int
    """Longest side of a tensor."""


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


def read_header(file: Path, source: str) -> Header:
    """Return what the header of a safetensors file states, without reading weights.

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
    tensors = [entry for name, entry in header.items() if name != "__metadata__"]
    try:
        end = max((int(entry["data_offsets"][1]) for entry in tensors), default=0)
        shapes = [[int(dimension) for dimension in entry["shape"]] for entry in tensors]
    except (TypeError, KeyError, IndexError, ValueError, OverflowError):
        raise ModelError(
            f"{source}: the header of {file.name} does not describe tensors: download it again"
        ) from None
    if 8 + length + end > size:
        raise ModelError(
            f"{source}: {file.name} was cut off ({size} of {8 + length + end} bytes): "
            "download it again"
        )
    return Header(
        num_parameters=sum(map(math.prod, shapes)),
        num_tensors=len(tensors),
        largest=max((dimension for shape in shapes for dimension in shape), default=0),
    )
