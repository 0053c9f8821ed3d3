"""Convert quantised weights to bfloat16, one matrix at a time.

    FP8, int8   W = q * s        one scale s per block, row or tensor
    MXFP4       W = q * 2^(s - 127)    4-bit floats q, two in a byte, in blocks of 32

Every product is computed in float32 and rounded once. Of a stack of experts, one expert at a time
is in memory.

Legend: E experts, R rows and C columns of a weight, r and c of its scales.
"""

import logging
from collections.abc import Iterator
from pathlib import Path

import torch

from tuneline.errors import ModelError
from tuneline.fetch.quantised import Quantisation
from tuneline.models.checkpoint import Checkpoint, Spec
from tuneline.models.sharded_files import write_sharded

logger = logging.getLogger(__name__)

MAX_SHARD_BYTES = 4 << 30

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""The values of the 4-bit floats of MXFP4, by their codes."""
_NARROW = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8)
# What the name of a scale puts in place of "weight", or adds to the name of a stack of experts.
_OF_WEIGHT = ("weight_scale_inv", "weight_scale", "SCB", "scale", "qscale_weight")
_OF_STACK = ("_scale_inv", "_scale")
# Scales of activations and of the KV cache, bitsandbytes' note about the order of weights, and the
# zero points of symmetric formats.
_UNUSED = (
    *("input_scale", "activation_scale", "output_scale", "input_scale_ub", "qscale_act"),
    *("q_scale", "k_scale", "v_scale", "kv_scale", "weight_format", "weight_zero_point"),
)
_INT8_LEVELS = 127
"""bitsandbytes' scale SCB is the largest weight of a row, which has this code."""
_BY_ROWS = 0
"""Value of bitsandbytes' weight_format for weights that are stored row by row."""


def write_dequantised(model_dir: Path, target: Path, quantisation: Quantisation) -> int:
    """Write the weights of a quantised model in bfloat16; return the number of converted weights.

    Args:
        model_dir: the quantised model.
        target: directory to write the weight files to.
        quantisation: how the weights are quantised.

    Raises:
        ModelError: a weight has no scale, or one of another shape.
    """
    source = _Source(Checkpoint(model_dir), str(model_dir), quantisation)
    specs: dict[str, Spec] = {}
    shape: tuple[int, ...]
    for name, spec in source.checkpoint.specs.items():
        if name.endswith("_blocks") and f"{name.removesuffix('_blocks')}_scales" in source.scales:
            num_experts, num_rows, num_blocks, num_bytes = spec.shape
            shape = (num_experts, 2 * num_blocks * num_bytes, num_rows)
            specs[name.removesuffix("_blocks")] = Spec(torch.bfloat16, shape)
        elif name in source.scale_of:
            shape = (
                spec.shape if not source.is_fp4(name) else (*spec.shape[:-1], 2 * spec.shape[-1])
            )
            specs[name] = Spec(torch.bfloat16, shape)
        elif name in source.checkpoint.packed:
            specs[name] = Spec(torch.bfloat16, spec.shape)
        elif name not in source.scales and name.rpartition(".")[2] not in _UNUSED:
            if spec.dtype in _NARROW:
                raise ModelError(
                    f"{model_dir}: {name} is quantised, but there is no tensor with its scales: "
                    "download the model again, or name the model in 16 bits"
                )
            specs[name] = spec
        elif name.endswith(".weight_format") and int(source.checkpoint.read(name)) != _BY_ROWS:
            raise ModelError(
                f"{model_dir}: {name} says that an old bitsandbytes stored this weight in the "
                "order of one kind of GPU: name the model in 16 bits that it was made from"
            )
    write_sharded(target, specs, source.make, max_shard_bytes=MAX_SHARD_BYTES)
    return len(source.scale_of) + len(source.checkpoint.packed)


class _Source:
    """The tensors of a quantised model.

    Attributes:
        checkpoint: the weight files.
        scale_of: name of the scales, by the name of the quantised weight.
        scales: names of all tensors with scales.
    """

    def __init__(self, checkpoint: Checkpoint, name: str, quantisation: Quantisation) -> None:
        self.checkpoint, self._name, self._quantisation = checkpoint, name, quantisation
        self.scale_of: dict[str, str] = {}
        for weight, spec in checkpoint.specs.items():
            scales = _scales_of(weight, checkpoint) if spec.dtype in _NARROW else None
            if scales is not None:
                self.scale_of[weight] = scales
        self.scales = set(self.scale_of.values())

    def is_fp4(self, name: str) -> bool:
        """Return whether a weight with scales has two 4-bit floats in each byte."""
        is_bytes = self.checkpoint.specs[name].dtype in (torch.int8, torch.uint8)
        return is_bytes and self._quantisation.name == "fp8"

    def make(self, name: str) -> Iterator[torch.Tensor]:
        """Return a tensor in the parts that `write_sharded` writes."""
        blocks = f"{name}_blocks"
        if blocks in self.scale_of:
            for index in range(self.checkpoint.specs[blocks].shape[0]):
                values_RC = self._mxfp4(blocks, index)
                yield values_RC.T.contiguous()
        elif name in self.scale_of:
            spec = self.checkpoint.specs[name]
            if len(spec.shape) == 3:
                for index in range(spec.shape[0]):
                    weight = self.checkpoint.read_slice(name, index)
                    scales = self._read_scales(name, index)
                    yield self._scaled(name, weight, scales)
            else:
                yield self._scaled(name, self.checkpoint.read(name), self._read_scales(name))
        elif name in self.checkpoint.packed:
            yield self.checkpoint.read(name).bfloat16()
        else:
            yield self.checkpoint.read(name)

    def _read_scales(self, name: str, index: int | None = None) -> torch.Tensor:
        scales = self.scale_of[name]
        if index is None or not self.checkpoint.specs[scales].shape:
            return _as_float(self.checkpoint.read(scales))
        return _as_float(self.checkpoint.read_slice(scales, index))

    def _scaled(self, name: str, weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        weight_RC = _unpack_fp4(weight) if self.is_fp4(name) else weight.float()
        if self.scale_of[name].endswith(".SCB"):
            scales = scales / _INT8_LEVELS
        if scales.dim() < 2:
            scales = scales.reshape(-1, 1)  # of each row, or of the tensor
        if weight_RC.dim() != 2:
            raise ModelError(f"{self._name}: {name} is quantised, but is not a matrix")
        num_rows, num_columns = weight_RC.shape
        block = self._quantisation.block
        if block is None or not _is_grid(weight_RC.shape, scales.shape, block):
            # Of a row, a tensor, or blocks of another size, as experts of some models have.
            block = (num_rows // max(1, len(scales)), num_columns // max(1, scales.shape[1]))
        if not _is_grid(weight_RC.shape, scales.shape, block):
            raise ModelError(
                f"{self._name}: {name} has shape {list(weight_RC.shape)}, but its scales have "
                f"{list(scales.shape)}, which are no blocks of it: download the model again"
            )
        by_row_Rc = scales.repeat_interleave(block[0], dim=0)[:num_rows]
        by_weight_RC = by_row_Rc.repeat_interleave(block[1], dim=1)[:, :num_columns]
        return weight_RC.mul_(by_weight_RC).bfloat16()

    def _mxfp4(self, blocks: str, index: int) -> torch.Tensor:
        """Return one expert's weight, [R, C]: rows are outputs, as in other models' files."""
        scales = _as_float(self.checkpoint.read_slice(self.scale_of[blocks], index))
        values = _unpack_fp4(self.checkpoint.read_slice(blocks, index))
        return values.mul_(scales[..., None]).flatten(1).bfloat16()


def _scales_of(weight: str, checkpoint: Checkpoint) -> str | None:
    if weight.endswith("_blocks"):
        names = [f"{weight.removesuffix('_blocks')}_scales"]
    elif weight.endswith(".weight"):
        names = [weight.removesuffix("weight") + ending for ending in _OF_WEIGHT]
    else:
        names = [weight + ending for ending in _OF_STACK]
    return next((name for name in names if name in checkpoint.specs), None)


def _as_float(scales: torch.Tensor) -> torch.Tensor:
    """Return scales in float32; those in a byte are exponents of 2."""
    if scales.dtype == torch.uint8:
        return (scales.float() - 127).exp2()
    return scales.float()


def _unpack_fp4(packed: torch.Tensor) -> torch.Tensor:
    """Return the 4-bit floats of each byte, the lower half first: [..., n] to [..., 2 n]."""
    pairs = torch.tensor([(_E2M1[byte & 15], _E2M1[byte >> 4]) for byte in range(256)])
    return torch.nn.functional.embedding(packed.view(torch.uint8).int(), pairs).flatten(-2)


def _is_grid(weight: torch.Size, scales: torch.Size, block: tuple[int, int]) -> bool:
    """Return whether scales belong to blocks of a weight; the last ones may be smaller."""
    return all(
        size > 0 and -(-num // size) == count
        for num, count, size in zip(weight, scales, block, strict=True)
    )
