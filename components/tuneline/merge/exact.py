"""Check each written tensor of a merged model against a second computation from the inputs.

The proof on prompts has to allow for rounding, and would accept an adapter that is missing in one
layer. The weights themselves are known exactly.

Legend: O outputs and I inputs of a linear layer, R rows of a block, r the adapter's rank.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from tuneline.errors import ProofError
from tuneline.merge.adapter import Update
from tuneline.merge.pieces import Piece
from tuneline.models.checkpoint import Checkpoint

BLOCK_WEIGHTS = 1 << 21
"""Number of weights to compare at a time; 16 MB in float64."""

_SLACK = 2.0**-20
"""Tolerance beside one unit in the last place, as a fraction of the largest weight: the sum is
computed in float32, and terms may cancel."""


def check_tensors(directory: Path, pieces: Callable[[str], Iterable[Piece]]) -> int:
    """Check every tensor of a merged model; return their number.

    Args:
        directory: directory of the merged model.
        pieces: returns the pieces of a tensor by its name in the files, before rounding.

    Raises:
        ProofError: a tensor is not finite, or differs by more than one unit in the last place.
    """
    merged = Checkpoint(directory)
    for name, spec in merged.specs.items():
        num_checked = 0
        for piece in pieces(name):
            base, num_experts = piece.base, 1
            if base.dim() == len(spec.shape) - 1:
                # One expert of a stack.
                ours, num_experts = merged.read_slice(name, num_checked), spec.shape[0]
            else:
                ours = merged.read(name)
            if ours.shape != base.shape:
                problem = f"shape {tuple(ours.shape)} for {tuple(base.shape)}"
                raise ProofError(_differs(name, problem))
            _check(name, ours, base, piece.update)
            num_checked += 1
        if num_checked != num_experts:
            raise ProofError(_differs(name, f"{num_checked} of {num_experts} experts"))
    return len(merged.specs)


def _check(name: str, ours: torch.Tensor, base: torch.Tensor, update: Update | None) -> None:
    """Check one tensor, or one expert's, in blocks of rows."""
    if not ours.is_floating_point():
        if not torch.equal(ours, base):
            raise ProofError(_differs(name, "it is not the base model's"))
        return
    if not ours.numel():
        return
    ours, base = (tensor.reshape(len(tensor) if tensor.dim() else 1, -1) for tensor in (ours, base))
    num_rows = max(1, BLOCK_WEIGHTS // max(1, ours.shape[1]))
    eps = torch.finfo(ours.dtype).eps
    for start in range(0, len(ours), num_rows):
        ours_RI = ours[start : start + num_rows].double()
        expected_RI = base[start : start + num_rows].double()
        largest = expected_RI.abs().amax()
        if update is not None:
            b_Rr = update.b_Or[start : start + num_rows]
            update_RI = update.scale * (b_Rr.double() @ update.a_rI.double())
            largest = torch.maximum(largest, update_RI.abs().amax())
            expected_RI += update_RI
        difference = (ours_RI - expected_RI).abs()
        allowed = eps * expected_RI.abs() + _SLACK * largest + torch.finfo(ours.dtype).tiny
        # A NaN is not within any bound.
        wrong = ~(difference <= allowed)
        if wrong.any():
            row, column = (int(index) for index in wrong.nonzero()[0])
            found, wanted = float(ours_RI[row, column]), float(expected_RI[row, column])
            count = f"{int(wrong.sum())} of {wrong.numel()} weights"
            raise ProofError(
                _differs(name, f"{count}, first {found:g} for {wanted:g} in row {start + row}")
            )


def _differs(name: str, how: str) -> str:
    return (
        f"the merged tensor {name} is not base plus adapter within the last place of its dtype "
        f"({how}): float16 overflows above 65504, so set merge.dtype to bfloat16 if that is the "
        "cause; otherwise the file was damaged as it was written: run merge again"
    )
