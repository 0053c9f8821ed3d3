"""Triton kernels for QLoRA training; each op's file holds its equation, kernel and reference."""

from tuneline.kernels.ops.adamw import FlatAdamW, clip_grad_norm_flat_
from tuneline.kernels.ops.cross_entropy import linear_cross_entropy, token_log_probs
from tuneline.kernels.ops.gated_activation import gated_activation
from tuneline.kernels.ops.nf4 import NF4Weight, dequantize_nf4
from tuneline.kernels.ops.rms_norm import rms_norm
from tuneline.kernels.ops.rope import rope
from tuneline.kernels.patch import PatchReport, patch, unpatch

__all__ = [
    "FlatAdamW",
    "NF4Weight",
    "PatchReport",
    "clip_grad_norm_flat_",
    "dequantize_nf4",
    "gated_activation",
    "linear_cross_entropy",
    "patch",
    "rms_norm",
    "rope",
    "token_log_probs",
    "unpatch",
]
