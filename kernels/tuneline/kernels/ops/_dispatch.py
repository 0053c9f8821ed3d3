"""Say when an op runs its Triton kernel and when its plain-torch reference.

The rule, for every op of the package: the kernel runs on CUDA tensors, and on CPU tensors when
Triton interprets (`TRITON_INTERPRET=1` before the first import). Everything else runs the
reference: CPU tensors without the interpreter, and float64 anywhere, because the kernels
compute in float32 and float64 is asked for where the truth is wanted.
"""

import torch
import triton


def use_kernel(x: torch.Tensor) -> bool:
    """Return whether an op whose main input is `x` runs its kernel."""
    if x.dtype == torch.float64:
        return False
    return x.is_cuda or (x.device.type == "cpu" and bool(triton.knobs.runtime.interpret))


def rows(x: torch.Tensor) -> torch.Tensor:
    """Return `x` [..., K] as [T, K] with unit stride along K, copying only if no view does it."""
    x_TK = x.reshape(-1, x.shape[-1])
    return x_TK if x_TK.stride(-1) == 1 or x_TK.shape[-1] == 1 else x_TK.contiguous()
