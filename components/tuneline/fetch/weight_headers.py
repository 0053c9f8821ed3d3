"""Check a model's files before a library trusts them: that each has its content, and its header."""

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tuneline.errors import ModelError
from tuneline.models import weight_files

# Names of what bitsandbytes stores beside a weight in 4 bits.
_IN_4BIT = re.compile(r"\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.\w+)$")
_LFS_MARK = b"version https://git-lfs"
"""Beginning of the text that stands for a large file in a clone without Git LFS."""


def check_complete(files: Iterable[Path], source: str) -> None:
    """Check that files have their content.

    Args:
        files: files of a model, or the model's one file.
        source: the model's name, for messages.

    Raises:
        ModelError: one is a pointer of Git LFS, or a link to a file that does not exist.
    """
    for file in files:
        if file.is_symlink() and not file.exists():
            raise ModelError(
                f"{source}: {file.name} is a link to {file.readlink()}, which does not exist: the "
                "download did not end, or only the links were copied. Download the model again, "
                "or copy it with cp -L"
            )
        if not file.is_file():
            continue
        with open(file, "rb") as opened:
            if opened.read(len(_LFS_MARK)) == _LFS_MARK:
                raise ModelError(
                    f"{source}: {file.name} is a pointer of Git LFS, not the file itself: run git "
                    "lfs pull in the clone"
                )


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
        ModelError: the file was cut off, is no safetensors file, or its header does not fit it.
    """
    # Imported here because plan imports this module where the library is not installed.
    from safetensors import SafetensorError, safe_open

    try:
        tensors = weight_files.read_header(file)
        with safe_open(file, framework="np"):
            pass  # Opening checks that the tensors fill the file, each with the bytes of its shape.
    except ValueError as error:
        raise ModelError(f"{source}: {error}") from None
    except SafetensorError as error:
        raise ModelError(f"{source}: {file.name} is damaged ({error}): download it again") from None
    return tensors


def read_headers(files: list[Path], source: str) -> dict[str, Any]:
    """Return the headers of all weight files of a model as one.

    Raises:
        ModelError: a file was cut off or is no safetensors file, or two files have a weight of the
            same name.
    """
    tensors: dict[str, Any] = {}
    file_of: dict[str, str] = {}
    for file in files:
        for name, entry in read_header(file, source).items():
            if name in tensors:
                raise ModelError(
                    f"{source} has the weight {name} twice, in {file_of[name]} and in {file.name}, "
                    "and programs differ in which of the two they load: remove one of them, or "
                    "name another copy of the model"
                )
            tensors[name], file_of[name] = entry, file.name
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
