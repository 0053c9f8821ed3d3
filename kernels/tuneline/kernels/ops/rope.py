"""Rotary position embedding of q and k in one launch, fused with the head norms of some families.

    n = q, or RMSNorm(q) over the head if q_weight is given (rounded as in rms_norm.py)
    y1 = n1 cos - n2 sin,   y2 = n2 cos + n1 sin    (halves of the head, Hugging Face's convention)

    dn1 = dy1 cos + dy2 sin,   dn2 = dy2 cos - dy1 sin    (the rotation with -sin)

cos and sin are the tables of transformers: [B or 1, T, R], with two equal halves along R. They
include any attention scaling. If R is less than the head dimension D, the rest of the head passes
through.

Shapes: q [B, T, H, D] and k [B, T, Hk, D], with unit stride along D and any other strides.
transformers stores q and k as [B, H, T, D]: pass q.transpose(1, 2) and k.transpose(1, 2).
"""

# Triton's types declare neither a launch's options nor plain values for constexpr parameters.
# pyright: reportCallIssue=false, reportArgumentType=false

import torch
import triton
import triton.language as tl

from tuneline.kernels.ops._dispatch import use_kernel
from tuneline.kernels.ops.rms_norm import rms_norm, rms_norm_reference

_ELEMENTS_PER_WARP = 512


@triton.jit
def _heads(
    in_ptr, in_stride_h, x_ptr, x_stride_h, weight_ptr, out_ptr, out_stride_h, c, s, eps,
    H: tl.constexpr, D: tl.constexpr, R: tl.constexpr, BLOCK_H: tl.constexpr,
    HALF: tl.constexpr, REST: tl.constexpr,
    NORM: tl.constexpr, GEMMA: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """Normalise (if NORM) and rotate all heads of one token; elements from R on are not rotated."""
    head = tl.arange(0, BLOCK_H)[:, None]
    half = tl.arange(0, HALF)
    beyond = R + tl.arange(0, REST)
    has_half = (head < H) & (half < R // 2)[None, :]
    has_rest = (head < H) & (beyond < D)[None, :]
    src = in_ptr + head * in_stride_h
    v1 = tl.load(src + half[None, :], mask=has_half, other=0.0).to(tl.float32)
    v2 = tl.load(src + R // 2 + half[None, :], mask=has_half, other=0.0).to(tl.float32)
    v3 = tl.zeros([BLOCK_H, REST], dtype=tl.float32)
    if R < D:
        v3 += tl.load(src + beyond[None, :], mask=has_rest, other=0.0).to(tl.float32)
    if BACKWARD:
        turned1 = v1 * c + v2 * s
        v2 = v2 * c - v1 * s
        v1 = turned1
    if NORM:
        # In the forward, v is x. In the backward, v is the gradient of the norm's output, and x is
        # loaded in addition.
        w1 = tl.load(weight_ptr + half, mask=half < R // 2, other=0.0).to(tl.float32)
        w2 = tl.load(weight_ptr + R // 2 + half, mask=half < R // 2, other=0.0).to(tl.float32)
        w3 = tl.load(weight_ptr + beyond, mask=beyond < D, other=0.0).to(tl.float32)
        if GEMMA:
            w1 += 1.0
            w2 += 1.0
            w3 += 1.0
        if BACKWARD:
            x_row = x_ptr + head * x_stride_h
            x1 = tl.load(x_row + half[None, :], mask=has_half, other=0.0).to(tl.float32)
            x2 = tl.load(x_row + R // 2 + half[None, :], mask=has_half, other=0.0).to(tl.float32)
            x3 = tl.zeros([BLOCK_H, REST], dtype=tl.float32)
            if R < D:
                x3 += tl.load(x_row + beyond[None, :], mask=has_rest, other=0.0).to(tl.float32)
        else:
            x1, x2, x3 = v1, v2, v3
        square = tl.sum(x1 * x1 + x2 * x2, axis=1)
        if R < D:
            square += tl.sum(x3 * x3, axis=1)
        rstd = tl.rsqrt(square / D + eps)[:, None]
        n1, n2, n3 = x1 * rstd, x2 * rstd, x3 * rstd
        if BACKWARD:
            v1, v2, v3 = v1 * w1[None, :], v2 * w2[None, :], v3 * w3[None, :]
            dot = tl.sum(v1 * n1 + v2 * n2, axis=1)
            if R < D:
                dot += tl.sum(v3 * n3, axis=1)
            mean = (dot / D)[:, None]
            v1, v2, v3 = rstd * (v1 - n1 * mean), rstd * (v2 - n2 * mean), rstd * (v3 - n3 * mean)
        else:
            if not GEMMA:
                n1 = n1.to(in_ptr.dtype.element_ty).to(tl.float32)
                n2 = n2.to(in_ptr.dtype.element_ty).to(tl.float32)
                n3 = n3.to(in_ptr.dtype.element_ty).to(tl.float32)
            v1, v2, v3 = n1 * w1[None, :], n2 * w2[None, :], n3 * w3[None, :]
            # Round here, because transformers rounds between the norm and the rotation.
            v1 = v1.to(in_ptr.dtype.element_ty).to(tl.float32)
            v2 = v2.to(in_ptr.dtype.element_ty).to(tl.float32)
    if not BACKWARD:
        turned1 = v1 * c - v2 * s
        v2 = v2 * c + v1 * s
        v1 = turned1
    dst = out_ptr + head * out_stride_h
    tl.store(dst + half[None, :], v1.to(out_ptr.dtype.element_ty), mask=has_half)
    tl.store(dst + R // 2 + half[None, :], v2.to(out_ptr.dtype.element_ty), mask=has_half)
    if R < D:
        tl.store(dst + beyond[None, :], v3.to(out_ptr.dtype.element_ty), mask=has_rest)


@triton.jit
def _rope_kernel(
    q_ptr, k_ptr, xq_ptr, xk_ptr, qw_ptr, kw_ptr, cos_ptr, sin_ptr, oq_ptr, ok_ptr,
    q_sb, q_st, q_sh, k_sb, k_st, k_sh, xq_sb, xq_st, xq_sh, xk_sb, xk_st, xk_sh,
    oq_sb, oq_st, oq_sh, ok_sb, ok_st, ok_sh, cos_sb, cos_st, sin_sb, sin_st, T, eps,
    HQ: tl.constexpr, HK: tl.constexpr, D: tl.constexpr, R: tl.constexpr,
    BLOCK_HQ: tl.constexpr, BLOCK_HK: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
    NORM: tl.constexpr, GEMMA: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    b = (tl.program_id(0) // T).to(tl.int64)
    t = (tl.program_id(0) % T).to(tl.int64)
    half = tl.arange(0, HALF)
    table = half < R // 2
    c = tl.load(cos_ptr + b * cos_sb + t * cos_st + half, mask=table, other=0.0)
    s = tl.load(sin_ptr + b * sin_sb + t * sin_st + half, mask=table, other=0.0)
    c = c.to(tl.float32)[None, :]
    s = s.to(tl.float32)[None, :]
    _heads(
        q_ptr + b * q_sb + t * q_st, q_sh, xq_ptr + b * xq_sb + t * xq_st, xq_sh, qw_ptr,
        oq_ptr + b * oq_sb + t * oq_st, oq_sh, c, s, eps,
        HQ, D, R, BLOCK_HQ, HALF, REST, NORM, GEMMA, BACKWARD,
    )  # fmt: skip
    _heads(
        k_ptr + b * k_sb + t * k_st, k_sh, xk_ptr + b * xk_sb + t * xk_st, xk_sh, kw_ptr,
        ok_ptr + b * ok_sb + t * ok_st, ok_sh, c, s, eps,
        HK, D, R, BLOCK_HK, HALF, REST, NORM, GEMMA, BACKWARD,
    )  # fmt: skip


def _launch(q, k, xq, xk, cos, sin, q_weight, k_weight, eps, gemma, out, backward):
    B, T, HQ, D = q.shape
    HK, R = k.shape[2], cos.shape[-1]
    if max(t.stride(-1) for t in (q, k, xq, xk, cos, sin)) != 1:
        raise ValueError("q, k, cos and sin need unit stride along the head dimension")
    oq, ok = (
        (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
        if (out is None)
        else out
    )
    norm = q_weight is not None
    cos, sin = cos.expand(B, T, R), sin.expand(B, T, R)
    block_hq = triton.next_power_of_2(HQ)
    half = triton.next_power_of_2(R // 2)
    _rope_kernel[(B * T,)](
        q, k, xq, xk, q_weight if norm else cos, k_weight if norm else cos, cos, sin, oq, ok,
        *q.stride()[:3], *k.stride()[:3], *xq.stride()[:3], *xk.stride()[:3],
        *oq.stride()[:3], *ok.stride()[:3], *cos.stride()[:2], *sin.stride()[:2], T, eps,
        HQ=HQ, HK=HK, D=D, R=R, BLOCK_HQ=block_hq, BLOCK_HK=triton.next_power_of_2(HK),
        HALF=half, REST=triton.next_power_of_2(max(D - R, 1)),
        NORM=norm, GEMMA=gemma, BACKWARD=backward,
        num_warps=max(1, min(8, block_hq * half // _ELEMENTS_PER_WARP)),
    )  # fmt: skip
    return oq, ok


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
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rotated (q, k) without recording a gradient.

    Args:
        q: Queries [B, T, H, D].
        k: Keys [B, T, Hk, D].
        cos: Table [B or 1, T, R].
        sin: Table [B or 1, T, R].
        q_weight: Scale [D] of the norm over each head of q; None without a norm.
        k_weight: Scale [D] of the norm over each head of k; given together with q_weight.
        eps: Added to the mean square of the norm.
        gemma: Use Gemma's equation for the norm.
        out: Where the results are written, in the shapes of q and k; may be q and k themselves.
    """
    if use_kernel(q):
        return _launch(q, k, q, k, cos, sin, q_weight, k_weight, eps, gemma, out, False)
    new_q, new_k = rope_reference(
        q, k, cos, sin, q_weight=q_weight, k_weight=k_weight, eps=eps, gemma=gemma
    )
    return _written(new_q, new_k, out)


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
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients (dq, dk) of the inputs of `rope_forward`.

    Args:
        dq: Gradient of the rotated q [B, T, H, D].
        dk: Gradient of the rotated k [B, T, Hk, D].
        cos: Table [B or 1, T, R].
        sin: Table [B or 1, T, R].
        q: Input q of the forward; needed only with the norm.
        k: Input k of the forward; needed only with the norm.
        q_weight: Scale [D] of the norm over each head of q; None without a norm.
        k_weight: Scale [D] of the norm over each head of k; given together with q_weight.
        eps: Added to the mean square of the norm.
        gemma: Use Gemma's equation for the norm.
        out: Where the results are written, in the shapes of dq and dk; may be dq and dk themselves.

    Raises:
        ValueError: q_weight is given but q or k is not.
    """
    if q_weight is not None and (q is None or k is None):
        raise ValueError("the norm's backward needs q and k, the inputs of rope_forward")
    xq, xk = (dq, dk) if q_weight is None else (q, k)
    if use_kernel(dq):
        return _launch(dq, dk, xq, xk, cos, sin, q_weight, k_weight, eps, gemma, out, True)
    new_dq, new_dk = rope_reference(dq, dk, cos, -sin)
    if q_weight is not None:
        assert k_weight is not None

        def norms(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return (
                rms_norm_reference(a, q_weight, eps, gemma=gemma),
                rms_norm_reference(b, k_weight, eps, gemma=gemma),
            )

        new_dq, new_dk = torch.func.vjp(norms, q, k)[1]((new_dq, new_dk))
    return _written(new_dq, new_dk, out)


def _written(
    q: torch.Tensor, k: torch.Tensor, out: tuple[torch.Tensor, torch.Tensor] | None
) -> tuple[torch.Tensor, torch.Tensor]:
    return (q, k) if out is None else (out[0].copy_(q), out[1].copy_(k))


class RopeFunction(torch.autograd.Function):
    """Autograd function of `rope`; it saves q and k only if the heads have a norm."""

    @staticmethod
    def forward(ctx, q, k, cos, sin, q_weight, k_weight, eps, gemma):  # noqa: D102
        normed = () if q_weight is None else (q, k, q_weight, k_weight)
        ctx.save_for_backward(cos, sin, *normed)
        ctx.eps, ctx.gemma = eps, gemma
        return rope_forward(
            q, k, cos, sin, q_weight=q_weight, k_weight=k_weight, eps=eps, gemma=gemma
        )

    @staticmethod
    def backward(ctx, dq, dk):  # noqa: D102
        cos, sin, *normed = ctx.saved_tensors
        q, k, q_weight, k_weight = normed or (None,) * 4
        dq, dk = (t if t.stride(-1) == 1 else t.contiguous() for t in (dq, dk))
        dq, dk = rope_backward(
            dq, dk, cos, sin, q=q, k=k, q_weight=q_weight, k_weight=k_weight,
            eps=ctx.eps, gemma=ctx.gemma,
        )  # fmt: skip
        return dq, dk, None, None, None, None, None, None


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
    """Compute `rope` in plain torch; same arguments."""

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
    """Return rotated (q, k), differentiable in q, k and the norm weights.

    Args:
        q: Queries [B, T, H, D].
        k: Keys [B, T, Hk, D].
        cos: Table [B or 1, T, R].
        sin: Table [B or 1, T, R].
        q_weight: Scale [D] of the norm over each head of q; None without a norm.
        k_weight: Scale [D] of the norm over each head of k; given together with q_weight.
        eps: Added to the mean square of the norm.
        gemma: Use Gemma's equation for the norm.

    Raises:
        ValueError: Only one of the norm weights is given.
    """
    norms = [weight for weight in (q_weight, k_weight) if weight is not None]
    if len(norms) == 1:
        raise ValueError("the head norm takes q_weight and k_weight: give both or neither")
    if any(weight.requires_grad for weight in norms):
        # The fused norm computes no gradient of its weights, because they are rarely trained.
        q = rms_norm(q, norms[0], eps, gemma=gemma)
        k = rms_norm(k, norms[1], eps, gemma=gemma)
        q_weight = k_weight = None
    return RopeFunction.apply(q, k, cos, sin, q_weight, k_weight, eps, gemma)
