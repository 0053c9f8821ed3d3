"""Rotary position embedding of q and k in one launch, with Qwen3's and Gemma-3's norm fused in.

    n = q, or RMSNorm(q) over the head (q_weight given; roundings as in rms_norm.py)
    y1 = n1 cos - n2 sin,   y2 = n2 cos + n1 sin    (halves of the head, Hugging Face's convention)

    dn1 = dy1 cos + dy2 sin,   dn2 = dy2 cos - dy1 sin    (the rotation with -sin)

cos and sin are the tables of transformers: [B or 1, T, R], each half of R the same. R may be less
than the head dimension D: the rest of the head passes through. Any attention scaling is in them.

Shapes: q [B, T, H, D], k [B, T, Hk, D], any strides but 1 along D. transformers holds
[B, H, T, D]: pass q.transpose(1, 2).
"""

import torch

from tuneline.kernels.rms_norm import rms_norm_reference


def rope_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    gemma: bool = False,
    inplace: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rotated (q, k) without recording a gradient; `inplace` overwrites q and k."""
    new_q, new_k = rope_reference(
        q, k, cos, sin, q_weight=q_weight, k_weight=k_weight, eps=eps, gemma=gemma
    )
    return (q.copy_(new_q), k.copy_(new_k)) if inplace else (new_q, new_k)


def rope_backward(
    dq: torch.Tensor,
    dk: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    q: torch.Tensor | None = None,
    k: torch.Tensor | None = None,
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    gemma: bool = False,
    inplace: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (dq, dk) of the inputs; q and k as they went in are needed only with the norm."""
    new_dq, new_dk = rope_reference(dq, dk, cos, -sin)
    if q_weight is not None:
        def norms(a, b):
            return (
                rms_norm_reference(a, q_weight, eps, gemma=gemma),
                rms_norm_reference(b, k_weight, eps, gemma=gemma),
            )

        new_dq, new_dk = torch.func.vjp(norms, q, k)[1]((new_dq, new_dk))
    return (dq.copy_(new_dq), dk.copy_(new_dk)) if inplace else (new_dq, new_dk)


def rope_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    gemma: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute `rope` in plain torch."""

    def rotate(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        n = x if weight is None else rms_norm_reference(x, weight, eps, gemma=gemma)
        wide = torch.promote_types(x.dtype, torch.float32)
        turned, rest = n.split([cos.shape[-1], x.shape[-1] - cos.shape[-1]], dim=-1)
        half_1, half_2 = turned.to(wide).chunk(2, dim=-1)
        c, s = cos[:, :, None].to(wide), sin[:, :, None].to(wide)
        y = torch.cat([half_1, half_2], -1) * c + torch.cat([-half_2, half_1], -1) * s
        return torch.cat([y.to(x.dtype), rest], dim=-1)

    return rotate(q, q_weight), rotate(k, k_weight)


def rope(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    gemma: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rotated (q, k); differentiable in q, k and the norm weights."""
    return rope_reference(
        q, k, cos, sin, q_weight=q_weight, k_weight=k_weight, eps=eps, gemma=gemma
    )
