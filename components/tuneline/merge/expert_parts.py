"""How checkpoint files hold the stacks of experts that transformers has in one parameter each.

Most families' files have two or three matrices per expert, of which transformers joins two:

    experts.3.gate_proj.weight, experts.3.up_proj.weight   rows of gate_up_proj[3]
    experts.3.down_proj.weight                             down_proj[3]

transformers' own code says which, by splitting a small stack whose entries are numbered.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers.core_model_loading import revert_weight_conversion

from tuneline.errors import ModelError
from tuneline.models.experts import Stack

_ROWS, _COLUMNS = 8, 4
"""Size of an expert in the numbered stack."""


@dataclass(frozen=True)
class Part:
    """What one tensor of the files holds of a stack of experts."""

    stack: str
    """Name of the stack's parameter in the model."""
    expert: int | None
    """Number of the expert; None: all experts, in their order."""
    start: int
    """First of the expert's rows, as the model stores it."""
    stop: int
    """One after the last row."""
    is_transposed: bool
    """Whether the file has rows where the model has columns."""


def parts_of(model: Any, name: str, stack: Stack) -> dict[str, Part]:
    """Return what the files hold of one stack, by the names of the files' tensors.

    Args:
        model: an empty model.
        name: name of the stack's parameter in the model.
        stack: the stack's shape.

    Raises:
        ModelError: the files' layout is none of those above.
    """
    numbers = torch.arange(stack.num_experts * _ROWS * _COLUMNS)
    numbered = numbers.view(stack.num_experts, _ROWS, _COLUMNS)
    parts = {}
    for stored, found in revert_weight_conversion(model, {name: numbered}).items():
        part = _part(found, numbered, name, stack)
        if part is None:
            raise ModelError(
                f"the files of this architecture hold {stored} in an order that cannot be merged: "
                "train without lora.experts, on attention and dense layers"
            )
        parts[stored] = part
    return parts


def _part(found: torch.Tensor, numbered: torch.Tensor, name: str, stack: Stack) -> Part | None:
    first = int(found.min())
    for is_transposed in (False, True):
        seen = found.transpose(-2, -1) if is_transposed else found
        if seen.shape == numbered.shape and torch.equal(seen, numbered):
            return Part(name, None, 0, stack.rows, is_transposed)
        expert, start = first // (_ROWS * _COLUMNS), first // _COLUMNS % _ROWS
        stop = start + (seen.shape[0] if seen.dim() == 2 else 0)
        if seen.dim() == 2 and torch.equal(seen, numbered[expert, start:stop]):
            rows = (stack.rows * edge // _ROWS for edge in (start, stop))
            return Part(name, expert, *rows, is_transposed=is_transposed)
    return None
