"""Read what the headers of weight files state, before a library trusts them."""

import math
import re
from pathlib import Path
from typing import Any

from tuneline.errors import ModelError
from tuneline.models import weight_files

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
                f"{source}: {weight_files.INDEX_FILE} must name a file of the model's directory "
                f"for each weight, but names {name!r:.100}"
            )
        names.add(name)
    return sorted(names)


def read_header(file: Path, source: str) -> dict[str, Any]:
    """Return the header of a safetensors file: dtype, shape and offsets of each tensor.

    Raises:
        ModelError: the file was cut off, or is no safetensors file.
    """
    try:
        return weight_files.read_header(file)
    except ValueError as error:
        raise ModelError(f"{source}: {error}") from None


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
