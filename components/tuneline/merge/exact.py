"""Check each tensor of a merged model against a second computation from the inputs.

The proof on prompts has to allow for rounding, and would accept an adapter that is missing in one
layer. The weights themselves are known exactly.

Legend: O outputs and I inputs of a linear layer, R rows of a block, r the adapter's rank.
"""

import torch

from tuneline.errors import ProofError
from tuneline.merge.adapter import Update
from tuneline.merge.pieces import Piece

BLOCK_WEIGHTS = 1 << 21
"""Number of weights to compare at a time; 16 MB in float64."""

_SLACK = 2.0**-20
"""Tolerance beside one unit in the last place, as a fraction of the largest weight: the sum is
computed in float32, and terms may cancel."""


def check_piece(name: str, ours: torch.Tensor, piece: Piece) -> None:
    """Check a merged tensor, or one expert's matrix of it, before it is written.

    Args:
        name: name of the tensor in the files.
        ours: the merged weight, in the dtype of the files.
        piece: the weight before the update and before rounding, and the update.

    Raises:
        ProofError: the weight is not finite, or differs by more than one unit in the last place.
    """
    if ours.shape != piece.base.shape:
        problem = f"shape {tuple(ours.shape)} for {tuple(piece.base.shape)}"
        raise ProofError(_differs(name, ours, problem))
    _check(name, ours, piece.base, piece.update)


def _check(name: str, ours: torch.Tensor, base: torch.Tensor, update: Update | None) -> None:
    """Check a weight in blocks of rows."""
    if not ours.is_floating_point():
        if not torch.equal(ours, base):
            raise ProofError(_differs(name, ours, "it is not the base model's"))
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
                _differs(
                    name, ours, f"{count}, first {found:g} for {wanted:g} in row {start + row}"
                )
            )


def _differs(name: str, ours: torch.Tensor, how: str) -> str:
    advice = "the sum was computed wrongly: report it"
    if ours.dtype == torch.float16 and ours.isinf().any():
        advice = "float16 ends at 65504: set merge.dtype to bfloat16"
    elif not ours.isfinite().all():
        advice = (
            "the adapter or the base model holds numbers that are not finite: lower "
            "train.learning_rate, or fetch the base model again"
        )
    return (
        f"the merged tensor {name} is not base plus adapter within the last place of its dtype "
        f"({how}): {advice}"
    )
