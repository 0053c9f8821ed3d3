"""Fused layers in a model that only scores texts, on a GPU that runs them."""

import logging
from typing import Any

import torch

from tuneline.kernels.limits import MIN_CAPABILITY

logger = logging.getLogger(__name__)


def fuse_for_scores(model: Any) -> bool:
    """Let a model's forwards without gradients and without a cache run fused layers.

    The parameters are frozen, which the fused layers require.

    Returns:
        Whether all layers are fused. Such a model reads several sequences in one row, without
        padding and without a mask; see `patching.find_sequences`.
    """
    if model.device.type != "cuda" or torch.version.hip:
        return False
    if torch.cuda.get_device_capability(model.device) < MIN_CAPABILITY:
        return False
    # Imported here because Triton asks for a GPU's driver where it compiles.
    from tuneline.kernels import patch

    model.requires_grad_(False)
    report = patch(model, in_evaluation=True)
    logger.info("fused layers for scores: %s", report)
    return bool(report.fused) and not report.unfused
