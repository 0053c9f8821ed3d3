"""Copies of small tensors to the device, for which the host does not wait; needs no Triton."""

import torch


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a host tensor's copy on `device`; on a CPU, the tensor itself.

    From pageable memory, torch would copy only after the GPU has computed all that was launched
    before, and would let the host wait for it.
    """
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
