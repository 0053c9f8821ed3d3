"""Check each written tensor of a merged model against a second computation from the inputs.

The proof on prompts has to allow for rounding, and would accept an adapter that is missing in one
layer. The weights themselves are known exactly.

Legend: O outputs and I inputs of a linear layer, R rows of a block, r the adapter's rank.
"""

from collections.abc import Callable
from pathlib import Path

import torch

from tuneline.errors import ProofError
from tuneline.merge.adapter import Adapter
from tuneline.models.checkpoint import Checkpoint

BLOCK_WEIGHTS = 1 << 21
"""Number of weights to compare at a time; 16 MB in float64."""

_SLACK = 2.0**-20
"""Tolerance beside one unit in the last place, as a fraction of the largest weight: the sum is
computed in float32, and terms may cancel."""


def check_tensors(
    directory: Path,
    expected: Callable[[str], torch.Tensor],
    adapted: dict[str, str],
    adapter: Adapter,
) -> int:
    """Check every tensor of a merged model; return their number.

    Args:
        directory: directory of the merged model.
        expected: returns the base model's weight by its name in the files, before the adapter is
            added and before rounding.
        adapted: module by the name of its weight in the files, for each low-rank update.
        adapter: the adapter.

    Raises:
        ProofError: a tensor is not finite, or differs by more than one unit in the last place.
    """
    merged = Checkpoint(directory)
    for name in merged.specs:
        ours, base = merged.read(name), expected(name)
        if not ours.is_floating_point():
            if not torch.equal(ours, base):
                raise ProofError(_differs(name, "it is not the base model's"))
            continue
        if ours.shape != base.shape:
            raise ProofError(_differs(name, f"shape {tuple(ours.shape)} for {tuple(base.shape)}"))
        factors = adapter.factors(adapted[name]) if name in adapted else None
        _check(name, ours, base, factors)
    return len(merged.specs)


def _check(
    name: str,
    ours: torch.Tensor,
    base: torch.Tensor,
    factors: tuple[torch.Tensor, torch.Tensor, float] | None,
) -> None:
    """Check one tensor in blocks of rows."""
    if not ours.numel():
        return
    ours, base = (tensor.reshape(len(tensor) if tensor.dim() else 1, -1) for tensor in (ours, base))
    num_rows = max(1, BLOCK_WEIGHTS // max(1, ours.shape[1]))
    eps = torch.finfo(ours.dtype).eps
    for start in range(0, len(ours), num_rows):
        ours_RI = ours[start : start + num_rows].double()
        expected_RI = base[start : start + num_rows].double()
        largest = expected_RI.abs().amax()
        if factors is not None:
            a_rI, b_Or, scale = factors
            update_RI = scale * (b_Or[start : start + num_rows].double() @ a_rI.double())
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
