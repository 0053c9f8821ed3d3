"""LoftQ: an adapter that starts from what 4 bits lose of each weight, and not from nought.

    B A = best approximation of rank r of (W - W') / s,    W' = dequantize(NF4(W))

so that the first forward is nearer to that of the full-precision model (arXiv 2310.08659, with one
round: W' stays as it is, so that merging and serving need to know nothing of it). peft has this for
CUDA devices and a scale of one only; here it runs on any, and the adapter's scale s is divided out.
"""

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuneline.errors import ModelError
from tuneline.models.weight_files import INDEX_FILE

if TYPE_CHECKING:
    import peft
    import torch

logger = logging.getLogger(__name__)


def start_from_the_rest(model: "peft.PeftModel", base_model_dir: str | Path) -> None:
    """Set every adapter on a 4-bit layer; those on other layers stay as they are.

    Raises:
        ModelError: the files name a weight otherwise than the model does.
    """
    import bitsandbytes.functional as bnb
    import torch
    from peft.tuners.lora import Linear4bit
    from safetensors import safe_open

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
                    "loftq cannot compare it with its 4 bits: take default"
                )
            with safe_open(files[f"{name}.weight"], framework="pt") as tensors:
                weight = tensors.get_tensor(f"{name}.weight")
            packed: Any = layer.get_base_layer().weight
            kept = bnb.dequantize_4bit(packed.data, packed.quant_state).float()
            rest = weight.to(kept.device).float() - kept
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            down, up = low_rank(rest, a.shape[0])
            a.copy_(down)
            b.copy_(up / layer.scaling["default"])
            before += float(rest.square().sum())
            after += float((rest - up @ down).square().sum())
            count += 1
    logger.info(
        "LoftQ: the adapters of %d layers take back %.1f %% of what 4 bits lose (squares)",
        count,
        100 * (1 - after / max(before, 1e-30)),
    )


def low_rank(rest: "torch.Tensor", rank: int) -> "tuple[torch.Tensor, torch.Tensor]":
    """Return A [rank, in] and B [out, rank] whose product B A is nearest to a matrix [out, in].

    By the eigenvectors of the smaller Gram matrix: exact, without a random start, and a fraction of
    a whole singular value decomposition. Both factors have singular values of the same size.
    """
    import torch

    is_wide = rest.shape[0] <= rest.shape[1]
    wide = rest if is_wide else rest.T
    values, vectors = torch.linalg.eigh(wide @ wide.T)
    count = min(rank, len(values))
    left = vectors[:, -count:]
    roots = values[-count:].clamp(min=1e-30).pow(0.25)
    up, down = left * roots, (left / roots).T @ wide
    if count < rank:
        # A layer narrower than the rank: what is left over adds nothing.
        up = torch.nn.functional.pad(up, (0, rank - count))
        down = torch.nn.functional.pad(down, (0, 0, 0, rank - count))
    return (down, up) if is_wide else (up.T, down.T)


def _files(base_model_dir: Path) -> dict[str, Path]:
    """Return the file of each tensor."""
    from safetensors import safe_open

    index = base_model_dir / INDEX_FILE
    if index.is_file():
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {name: base_model_dir / file for name, file in names.items()}
    found = {}
    for file in sorted(base_model_dir.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            found.update(dict.fromkeys(tensors.keys(), file))
    return found
