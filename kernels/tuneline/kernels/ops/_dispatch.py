"""Which ops run their Triton kernel and which run their plain-torch reference.

The kernel runs for CUDA tensors, and for CPU tensors under Triton's interpreter (if
`TRITON_INTERPRET=1` is set before the first import). The reference runs for CPU tensors without the
interpreter, and for float64 tensors on any device. float64 is used to compute an exact result,
which the kernels cannot do, because they compute in float32.
"""

import torch
from triton import knobs


def use_kernel(x: torch.Tensor) -> bool:
    """Return whether an op whose main input is `x` runs its kernel."""
    if x.dtype == torch.float64:
        return False
    return x.is_cuda or (x.device.type == "cpu" and bool(knobs.runtime.interpret))


def rows(x: torch.Tensor) -> torch.Tensor:
    """Return `x` [..., K] as [T, K] with unit stride along K: a view if possible, else a copy."""
    x_TK = x.reshape(-1, x.shape[-1])
    return x_TK if x_TK.stride(-1) == 1 or x_TK.shape[-1] == 1 else x_TK.contiguous()
