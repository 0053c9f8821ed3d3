"""The linear layers that a checkpoint quantises, and the groups of weights that share a scale."""

from pathlib import Path
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from tuneline.errors import ModelError
from tuneline.kinds import ExportKind
from tuneline.models.nf4 import empty_model
from tuneline.quantize import formats


def linear_layers(model_dir: Path) -> dict[str, tuple[int, int]]:
    """Return the numbers of inputs and outputs of the model's linear layers, by their names.

    The embeddings and the output head are not quantised.

    Raises:
        ModelError: the model has no such layers.
    """
    layers: dict[str, tuple[int, int]] = {}
    model: Any = empty_model(model_dir)
    for name, module in model.named_modules():
        if module is model.get_output_embeddings():
            continue
        if isinstance(module, torch.nn.Linear):
            layers[name] = (module.in_features, module.out_features)
        elif isinstance(module, Conv1D):
            layers[name] = (module.nx, module.nf)
    if not layers:
        raise ModelError(f"{model_dir} has no linear layers that could be quantised")
    return layers


def linear_widths(model_dir: Path) -> dict[int, str]:
    """Return the input widths of the model's linear layers, each with the first layer that has it.

    Raises:
        ModelError: the model has no such layers.
    """
    widths: dict[int, str] = {}
    for name, (num_inputs, _) in linear_layers(model_dir).items():
        widths.setdefault(num_inputs, name)
    return widths


def choose_group_size(
    widths: dict[int, str], wanted: int, *, kind: ExportKind, largest: int | None = None
) -> tuple[int, str | None]:
    """Return the largest group size up to `wanted` that divides every width, and a note.

    The note says why the size is not `wanted`; None if it is. gptqmodel does not check the group
    size: with one that does not divide a width, it quantises and saves a checkpoint whose first
    forward pass fails.

    Args:
        widths: the widths that `linear_widths` returns.
        wanted: `quantize.group_size` of the recipe.
        kind: the kind of checkpoint to make.
        largest: the largest group size that the kernels of this kind support; None: `wanted`.

    Raises:
        ModelError: no group size divides every width.
    """
    most = min(wanted, largest or wanted)
    for size in (size for size in formats.GROUP_SIZES if size <= most):
        if all(width % size == 0 for width in widths):
            if size == wanted:
                return size, None
            odd = _odd(widths, most)
            reason = odd or f"the kernels for {kind.upper()} support groups of up to {most}"
            return size, f"group size {size}, not {wanted}: {reason}"
    smallest = formats.GROUP_SIZES[-1]
    raise ModelError(
        f"{kind.upper()} cannot store this model: no group size from {smallest} to {most} divides "
        f"the width of each layer ({_odd(widths, smallest)}): set quantize.{kind} to []"
    )


def _odd(widths: dict[int, str], size: int) -> str:
    """Return the widths that `size` does not divide in words, each with a layer that has it."""
    odd = [f"{name} is {width} wide" for width, name in sorted(widths.items()) if width % size]
    return ", ".join(odd)
