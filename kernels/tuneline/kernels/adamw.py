"""AdamW over one flat buffer, and the gradient-norm clip over the same."""

import torch


def clip_grad_norm_flat_(flat_grad: torch.Tensor, max_norm: float) -> torch.Tensor:
    """Scale the flat gradient in place to a norm of at most `max_norm`; return the norm before."""
    norm = flat_grad.norm()
    flat_grad.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


class FlatAdamW(torch.optim.AdamW):
    """AdamW whose parameters, gradients and state are slices of flat buffers."""
