"""Triton kernels for QLoRA training; the file of each op has its equation, kernel and reference.

An exported name is imported when it is first used, so that `tuneline.kernels.limits` can be
imported without torch. No submodule has the name of an exported function, because the import of
such a submodule would replace the function.
"""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tuneline.kernels.ops.adamw import FlatAdamW, clip_grad_norm_flat_
    from tuneline.kernels.ops.cross_entropy import linear_cross_entropy, token_log_probs
    from tuneline.kernels.ops.gated_activation import gated_activation
    from tuneline.kernels.ops.nf4 import NF4Weight, dequantize_nf4
    from tuneline.kernels.ops.rms_norm import rms_norm
    from tuneline.kernels.ops.rope import rope
    from tuneline.kernels.patching import PatchReport, patch, unpatch

_MODULES = {
    "FlatAdamW": "tuneline.kernels.ops.adamw",
    "NF4Weight": "tuneline.kernels.ops.nf4",
    "PatchReport": "tuneline.kernels.patching",
    "clip_grad_norm_flat_": "tuneline.kernels.ops.adamw",
    "dequantize_nf4": "tuneline.kernels.ops.nf4",
    "gated_activation": "tuneline.kernels.ops.gated_activation",
    "linear_cross_entropy": "tuneline.kernels.ops.cross_entropy",
    "patch": "tuneline.kernels.patching",
    "rms_norm": "tuneline.kernels.ops.rms_norm",
    "rope": "tuneline.kernels.ops.rope",
    "token_log_probs": "tuneline.kernels.ops.cross_entropy",
    "unpatch": "tuneline.kernels.patching",
}

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


def __getattr__(name: str) -> object:
    """Import an exported name from its module."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(_import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Return the exported names and all names that are defined in this module."""
    return sorted({*globals(), *__all__})
