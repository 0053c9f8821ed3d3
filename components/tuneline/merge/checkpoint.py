"""Read and write a sharded safetensors checkpoint, one tensor at a time."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tuneline.errors import ModelError

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"


class Checkpoint:
    """The weight files of a model directory.

    Attributes:
        names: all tensor names, file by file.
    """

    def __init__(self, model_dir: str | Path) -> None:
        """Read the headers.

        Raises:
            ModelError: there is no safetensors file, or one that the index names is missing.
        """
        self._directory = Path(model_dir)
        self._file_of: dict[str, str] = {}
        for file in self._files():
            with safe_open(self._directory / file, framework="pt") as tensors:
                self._file_of.update(dict.fromkeys(tensors.keys(), file))
        self.names = list(self._file_of)

    def num_elements(self, name: str) -> int:
        """Return how many values a tensor has, without reading them."""
        with safe_open(self._directory / self._file_of[name], framework="pt") as tensors:
            return torch.Size(tensors.get_slice(name).get_shape()).numel()

    def is_floating(self, name: str) -> bool:
        """Tell whether a tensor holds floating-point numbers."""
        with safe_open(self._directory / self._file_of[name], framework="pt") as tensors:
            return str(tensors.get_slice(name).get_dtype()).startswith(("F", "BF"))

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor."""
        with safe_open(self._directory / self._file_of[name], framework="pt") as tensors:
            return tensors.get_tensor(name)

    def _files(self) -> list[str]:
        index = self._directory / INDEX_FILE
        if index.is_file():
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files = sorted(set(weight_map.values()))
        else:
            files = sorted(path.name for path in self._directory.glob("*.safetensors"))
        missing = [file for file in files if not (self._directory / file).is_file()]
        if missing or not files:
            what = f"lacks {missing[0]}, which its index names" if missing else "has no safetensors"
            raise ModelError(f"{self._directory} {what}: fetch the model again")
        return files


def write_sharded(
    directory: Path,
    sizes: dict[str, int],
    make: Callable[[str], torch.Tensor],
    *,
    max_shard_bytes: int,
) -> int:
    """Write tensors in the order of `sizes`, holding one shard in memory at a time.

    Args:
        directory: gets model.safetensors, or numbered shards and their index.
        sizes: tensor name -> bytes it will have.
        make: returns the tensor of a name.
        max_shard_bytes: a shard ends before it; a larger single tensor has its own.

    Returns:
        The number of files.
    """
    shards = list(_plan(sizes, max_shard_bytes))
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file = SINGLE_FILE
        if len(shards) > 1:
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: make(name).contiguous() for name in names}
        save_file(tensors, directory / file, metadata={"format": "pt"})
        del tensors
        weight_map.update(dict.fromkeys(names, file))
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return len(shards)


def _plan(sizes: dict[str, int], max_shard_bytes: int) -> Iterator[list[str]]:
    names: list[str] = []
    used = 0
    for name, size in sizes.items():
        if names and used + size > max_shard_bytes:
            yield names
            names, used = [], 0
        names.append(name)
        used += size
    if names:
        yield names
