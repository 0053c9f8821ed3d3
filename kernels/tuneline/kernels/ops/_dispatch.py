"""Which ops run their Triton kernel and which run their plain-torch reference.

The rule is the same for every op of the package. The kernel runs on CUDA tensors, and on CPU
tensors under Triton's interpreter (`TRITON_INTERPRET=1` before the first import). Everything else
runs the reference: CPU tensors without the interpreter, and float64 tensors on any device, because
the kernels compute in float32 and float64 is used to compute the exact result.
"""

import torch
from triton import knobs


def use_kernel(x: torch.Tensor) -> bool:
    """Return whether an op whose main input is `x` runs its kernel."""
    if x.dtype == torch.float64:
        return False
    return x.is_cuda or (x.device.type == "cpu" and bool(knobs.runtime.interpret))


def rows(x: torch.Tensor) -> torch.Tensor:
    """Return `x` [..., K] as [T, K] with unit stride along K, copied only if it must be."""
    x_TK = x.reshape(-1, x.shape[-1])
    return x_TK if x_TK.stride(-1) == 1 or x_TK.shape[-1] == 1 else x_TK.contiguous()
