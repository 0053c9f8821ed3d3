"""Write a sharded safetensors checkpoint with only a part of one tensor in memory at a time."""

import hashlib
import json
import struct
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

from tuneline.models.checkpoint import DTYPES, Spec
from tuneline.models.weight_files import INDEX_FILE, SINGLE_FILE

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write_sharded(
    directory: Path,
    specs: dict[str, Spec],
    make: Callable[[str], Iterable[torch.Tensor]],
    *,
    max_shard_bytes: int,
) -> dict[str, str]:
    """Write tensors to safetensors files with only one part of a tensor in memory at a time.

    The writer of the safetensors library needs all tensors of a file in memory at once. The file
    format allows writing tensor by tensor: a file consists of the length of its header, a JSON
    header with the offsets of each tensor, and the bytes of the tensors.

    Args:
        directory: directory to write model.safetensors to, or numbered shards and their index.
        specs: dtype and shape of each tensor, by name.
        make: returns the tensor with a given name, as one or more parts along its first dimension.
        max_shard_bytes: largest size of a shard; a larger tensor gets a shard of its own.

    Returns:
        The SHA-256 of what was written, by the name of the file.
    """
    shards = list(_plan(specs, max_shard_bytes))
    weight_map: dict[str, str] = {}
    written: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = SINGLE_FILE
        if len(shards) > 1:
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        some = {name: specs[name] for name in names}
        written[file] = _write_file(directory / file, some, make)
        weight_map.update(dict.fromkeys(names, file))
    if len(shards) > 1:
        total = sum(spec.num_bytes for spec in specs.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return written


def _write_file(
    path: Path, specs: dict[str, Spec], make: Callable[[str], Iterable[torch.Tensor]]
) -> str:
    """Write a file and return the SHA-256 of its content."""
    # Wide dtypes first, so that every tensor starts at a multiple of its element size.
    names = sorted(specs, key=lambda name: -specs[name].dtype.itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        spec = specs[name]
        start, end = end, end + spec.num_bytes
        header[name] = {
            "dtype": _NAMES[spec.dtype],
            "shape": spec.shape,
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        head = struct.pack("<Q", len(text)) + text
        digest = hashlib.sha256(head)
        file.write(head)
        for name in names:
            num_written = 0
            for part in make(name):
                assert part.dtype == specs[name].dtype, name
                data = part.contiguous().reshape(-1).view(torch.uint8).numpy().data
                digest.update(data)
                num_written += file.write(data)
                del part, data  # free its memory before the next part is made
            assert num_written == specs[name].num_bytes, name
    return digest.hexdigest()


def _plan(specs: dict[str, Spec], max_shard_bytes: int) -> Iterator[list[str]]:
    """Yield the tensor names of each shard."""
    names: list[str] = []
    used = 0
    for name, spec in specs.items():
        if names and used + spec.num_bytes > max_shard_bytes:
            yield names
            names, used = [], 0
        names.append(name)
        used += spec.num_bytes
    if names:
        yield names
