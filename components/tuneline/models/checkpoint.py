"""Read a sharded safetensors checkpoint one tensor at a time.

A weight that bitsandbytes has quantised to 4 bits is stored as packed values and up to five tensors
with its scales and codes. Here it appears as one tensor of its true shape, which is dequantised
when it is read.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from tuneline.errors import ModelError
from tuneline.models.weight_files import INDEX_FILE, SINGLE_FILE

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The supported dtypes, by the name that safetensors gives them."""

_STATE = ".quant_state.bitsandbytes__"
"""Part of the name of the tensor that holds the shape and the blocks of a 4-bit weight, as JSON."""
_STATS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
"""What the names of the other tensors of a 4-bit weight add to its own."""


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
        specs: dtype and shape by tensor name, in the order of the files. A 4-bit weight has the
            dtype that it is dequantised to, float32.
        packed: names of the 4-bit weights.
    """

    def __init__(self, model_dir: str | Path) -> None:
        """Read the headers of the weight files.

        Raises:
            ModelError: there is no safetensors file, a file that the index names is missing, the
                dtype of a tensor is not supported, or a 4-bit weight is incomplete.
        """
        self._directory = Path(model_dir)
        self._file_of: dict[str, str] = {}
        self.specs: dict[str, Spec] = {}
        for file in self._files():
            try:
                self._read_header(file)
            except SafetensorError as error:
                raise ModelError(
                    f"{self._directory / file} is not a safetensors file ({error}): fetch the "
                    "model again"
                ) from None
        self._parts = self._join_packed()
        self.packed = set(self._parts)

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor. A 4-bit weight is dequantised to float32."""
        if name in self._parts:
            return self._dequantize(name)
        return self._read_stored(name)

    def read_slice(self, name: str, index: int) -> torch.Tensor:
        """Read entry `index` of the first dimension of a tensor that is not in 4 bits."""
        with safe_open(self._directory / self._file_of[name], framework="pt") as tensors:
            tensor: torch.Tensor = tensors.get_slice(name)[index]
            return tensor

    def _read_header(self, file: str) -> None:
        with safe_open(self._directory / file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118, it is not a mapping
                header = tensors.get_slice(name)
                dtype = DTYPES.get(header.get_dtype())
                if dtype is None:
                    raise ModelError(
                        f"{self._directory / file}: {name} has dtype {header.get_dtype()}: "
                        "use a base model in 16 or 32 bits"
                    )
                self._file_of[name] = file
                self.specs[name] = Spec(dtype, tuple(header.get_shape()))

    def _read_stored(self, name: str) -> torch.Tensor:
        with safe_open(self._directory / self._file_of[name], framework="pt") as tensors:
            tensor: torch.Tensor = tensors.get_tensor(name)
            return tensor

    def _join_packed(self) -> dict[str, list[str]]:
        """Give each 4-bit weight its true shape in `specs`; return the names of its other tensors.

        Raises:
            ModelError: a 4-bit weight is incomplete.
        """
        parts: dict[str, list[str]] = {}
        for state in [name for name in self.specs if _STATE in name]:
            weight = state.partition(_STATE)[0]
            try:
                settings = json.loads(bytes(self._read_stored(state).tolist()))
                shape = tuple(int(size) for size in settings["shape"])
                num_stored = self.specs[weight].num_bytes
            except (ValueError, KeyError, TypeError) as error:
                raise ModelError(
                    f"{self._directory}: {weight} is quantised by bitsandbytes, but {state} does "
                    f"not describe it ({error!r}): download the model again"
                ) from None
            if num_stored != (torch.Size(shape).numel() + 1) // 2:
                raise ModelError(
                    f"{self._directory}: {weight} has {num_stored} bytes, too many or too few for "
                    f"{list(shape)} weights of 4 bits: download the model again"
                )
            stored = [state, *(f"{weight}.{name}" for name in _STATS)]
            parts[weight] = [name for name in stored if name in self.specs]
            self.specs[weight] = Spec(torch.float32, shape)
            for name in parts[weight]:
                del self.specs[name]
        return parts

    def _dequantize(self, name: str) -> torch.Tensor:
        # Imported here because only models that bitsandbytes has quantised need it.
        import bitsandbytes.functional as bnb

        stats = {
            part.removeprefix(f"{name}."): self._read_stored(part) for part in self._parts[name]
        }
        try:
            state = bnb.QuantState.from_dict(stats, device=torch.device("cpu"))
        except (ValueError, KeyError, AssertionError, AttributeError) as error:
            raise ModelError(
                f"{self._directory}: bitsandbytes does not read its own weight {name} ({error!r}): "
                "download the model again"
            ) from error
        # Dequantising multiplies code and scale and rounds the product to this type. float32 needs
        # no rounding.
        state.dtype = torch.float32
        # As one row: on a CPU, bitsandbytes 0.50.2 is wrong about a matrix whose blocks span rows.
        state.shape = torch.Size([1, math.prod(self.specs[name].shape)])
        # The values may be stored in another type (bnb_4bit_quant_storage), which means nothing.
        packed = self._read_stored(name).reshape(-1).view(torch.uint8).reshape(-1, 1)
        return bnb.dequantize_4bit(packed, state).reshape(self.specs[name].shape)

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
