"""Read and write a sharded safetensors checkpoint one tensor at a time."""

import json
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from tuneline.errors import ModelError
from tuneline.models.weight_files import INDEX_FILE, SINGLE_FILE

# The supported dtypes, by the name that safetensors gives them.
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class Spec:
    """Dtype and shape of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Size of the tensor in a file."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class Checkpoint:
    """The weight files of a model directory.

    Attributes:
        specs: dtype and shape by tensor name, in the order of the files.
    """

    def __init__(self, model_dir: str | Path) -> None:
        """Read the headers of the weight files.

        Raises:
            ModelError: there is no safetensors file, a file that the index names is missing, or
                the dtype of a tensor is not supported.
        """
        self._directory = Path(model_dir)
        self._file_of: dict[str, str] = {}
        self.specs: dict[str, Spec] = {}
        for file in self._files():
            with safe_open(self._directory / file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118, it is not a mapping
                    header = tensors.get_slice(name)
                    dtype = _DTYPES.get(header.get_dtype())
                    if dtype is None:
                        raise ModelError(
                            f"{self._directory / file}: {name} has dtype {header.get_dtype()}: "
                            "use a base model in 16 or 32 bits"
                        )
                    self._file_of[name] = file
                    self.specs[name] = Spec(dtype, tuple(header.get_shape()))

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor."""
        with safe_open(self._directory / self._file_of[name], framework="pt") as tensors:
            tensor: torch.Tensor = tensors.get_tensor(name)
            return tensor

    def _files(self) -> list[str]:
        index = self._directory / INDEX_FILE
        if (self._directory / SINGLE_FILE).is_file():
            # As in transformers and fetch: an index next to this file is ignored as outdated.
            files = [SINGLE_FILE]
        elif index.is_file():
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files = sorted(set(weight_map.values()))
        else:
            files = sorted(path.name for path in self._directory.glob("*.safetensors"))
        missing = [file for file in files if not (self._directory / file).is_file()]
        if missing or not files:
            problem = (
                f"lacks {missing[0]}, which its index names" if missing else "has no safetensors"
            )
            raise ModelError(f"{self._directory} {problem}: fetch the model again")
        return files


def write_sharded(
    directory: Path,
    specs: dict[str, Spec],
    make: Callable[[str], torch.Tensor],
    *,
    max_shard_bytes: int,
) -> int:
    """Write tensors to safetensors files with only one tensor in memory at a time.

    The writer of the safetensors library needs all tensors of a file in memory at once. The file
    format allows writing tensor by tensor: a file consists of the length of its header, a JSON
    header with the offsets of each tensor, and the bytes of the tensors.

    Args:
        directory: directory to write model.safetensors to, or numbered shards and their index.
        specs: dtype and shape of each tensor, by name.
        make: returns the tensor with a given name.
        max_shard_bytes: largest size of a shard; a larger tensor gets a shard of its own.

    Returns:
        The number of files.
    """
    shards = list(_plan(specs, max_shard_bytes))
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file = SINGLE_FILE
        if len(shards) > 1:
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_file(directory / file, {name: specs[name] for name in names}, make)
        weight_map.update(dict.fromkeys(names, file))
    if len(shards) > 1:
        total = sum(spec.num_bytes for spec in specs.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return len(shards)


def _write_file(path: Path, specs: dict[str, Spec], make: Callable[[str], torch.Tensor]) -> None:
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
        file.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            tensor = make(name)
            assert (tensor.dtype, tuple(tensor.shape)) == (specs[name].dtype, specs[name].shape)
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            del tensor  # free its memory before the next tensor is made


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
