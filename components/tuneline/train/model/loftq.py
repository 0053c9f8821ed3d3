"""LoftQ: an adapter that starts from the quantisation error of each weight instead of from zero.

    B A = best approximation of rank r of (W - W') / s,    W' = dequantize(NF4(W))

so that the model with its new adapter is closer to the full-precision model than the 4-bit base is
(arXiv 2310.08659, with one iteration). W' does not change, so merging and serving need no support
for LoftQ. peft has LoftQ only for CUDA devices and a scale of one. This version runs on any device,
and divides by the adapter's scale s.
"""

import json
import logging
from pathlib import Path
from typing import Any, cast

import bitsandbytes.functional as bnb
import peft
import torch
from peft.tuners.lora import Linear4bit
from safetensors import safe_open

from tuneline.errors import ModelError
from tuneline.models.weight_files import INDEX_FILE

logger = logging.getLogger(__name__)


def start_from_error(model: peft.PeftModel, base_model_dir: str | Path) -> None:
    """Set the initial weights of the adapters on 4-bit layers; leave other adapters unchanged.

    Raises:
        ModelError: the base model's files have no tensor with the name of a layer's weight.
    """
    files = _files(Path(base_model_dir))
    before = after = 0.0
    count = 0
    with torch.no_grad():
        for name, layer in model.get_base_model().named_modules():
            if not isinstance(layer, Linear4bit):
                continue
            if f"{name}.weight" not in files:
                raise ModelError(
                    f"{base_model_dir} has no tensor {name}.weight, so lora.init_lora_weights "
                    "loftq cannot compute its error: set it to default"
                )
            with safe_open(files[f"{name}.weight"], framework="pt") as tensors:
                weight = tensors.get_tensor(f"{name}.weight")
            adapted = cast(Any, layer)
            packed = adapted.get_base_layer().weight
            kept = bnb.dequantize_4bit(packed.data, packed.quant_state).float()
            error = weight.to(kept.device).float() - kept
            a, b = adapted.lora_A["default"].weight, adapted.lora_B["default"].weight
            down, up = low_rank(error, a.shape[0])
            a.copy_(down)
            b.copy_(up / adapted.scaling["default"])
            before += float(error.square().sum())
            after += float((error - up @ down).square().sum())
            count += 1
    logger.info(
        "LoftQ: the adapters of %d layers remove %.1f %% of the squared quantisation error",
        count,
        100 * (1 - after / max(before, 1e-30)),
    )


def low_rank(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A [rank, in] and B [out, rank] whose product B A is nearest to a matrix [out, in].

    The factors are computed from the eigenvectors of the smaller Gram matrix. This method is exact,
    needs no random start, and costs a fraction of a full singular value decomposition. Both factors
    have the same singular values.
    """
    is_wide = matrix.shape[0] <= matrix.shape[1]
    wide = matrix if is_wide else matrix.T
    values, vectors = torch.linalg.eigh(wide @ wide.T)
    count = min(rank, len(values))
    left = vectors[:, -count:]
    roots = values[-count:].clamp(min=1e-30).pow(0.25)
    up, down = left * roots, (left / roots).T @ wide
    if count < rank:
        # The layer is narrower than the rank: fill the factors with zeros.
        up = torch.nn.functional.pad(up, (0, rank - count))
        down = torch.nn.functional.pad(down, (0, 0, 0, rank - count))
    return (down, up) if is_wide else (up.T, down.T)


def _files(base_model_dir: Path) -> dict[str, Path]:
    """Return the file of each tensor, by the tensor's name."""
    index = base_model_dir / INDEX_FILE
    if index.is_file():
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {name: base_model_dir / file for name, file in names.items()}
    files = {}
    for file in sorted(base_model_dir.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            files.update(dict.fromkeys(tensors.keys(), file))
    return files
