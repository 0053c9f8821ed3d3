"""SwiGLU and GeGLU: the activation of a gated MLP, from one [gate | up] buffer.

Both activations are the gate times a sigmoid, so one kernel serves both:

    h = e * sig * g,                 sig = sigmoid(z(e))
    dg = dh * e * sig
    de = dh * g * sig * (1 + e * (1 - sig) * z'(e))

    silu:      z = e,                             z' = 1
    gelu_tanh: z = 2 c (e + 0.044715 e^3),        z' = 2 c (1 + 0.134145 e^2),   c = sqrt(2 / pi)

The last line is true because 0.5 (1 + tanh(u)) = sigmoid(2 u). Everything is computed in float32,
and each result is rounded once.

Shapes: gate_up [..., 2 F] with the gate e first, or a pair (e, g) of [..., F]; h [..., F].
"""

# Triton's types declare neither a launch's options nor plain values for constexpr parameters.
# pyright: reportCallIssue=false, reportArgumentType=false

from typing import Literal

import torch
import triton
import triton.language as tl

from tuneline.kernels.ops._dispatch import rows, use_kernel

Kind = Literal["silu", "gelu_tanh"]
GateUp = torch.Tensor | tuple[torch.Tensor, torch.Tensor]

_BLOCK = 1024
_NUM_WARPS = 4


@triton.jit
def _gate(e, GELU: tl.constexpr):
    """Return sigmoid(z(e)) and e (1 - sigmoid) z'(e)."""
    if GELU:
        c: tl.constexpr = 1.5957691216057308  # 2 sqrt(2 / pi)
        sig = tl.sigmoid(c * (e + 0.044715 * e * e * e))
        slope = c * (1.0 + 0.134145 * e * e)
    else:
        sig = tl.sigmoid(e)
        slope = 1.0
    return sig, e * (1.0 - sig) * slope


@triton.jit
def _fwd_kernel(
    e_ptr, g_ptr, h_ptr, e_stride, g_stride, h_stride,
    F: tl.constexpr, GELU: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    blocks: tl.constexpr = (F + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // blocks).to(tl.int64)
    cols = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < F
    e = tl.load(e_ptr + row * e_stride + cols, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(g_ptr + row * g_stride + cols, mask=mask, other=0.0).to(tl.float32)
    sig, _ = _gate(e, GELU)
    h = e * sig * g
    tl.store(h_ptr + row * h_stride + cols, h.to(h_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _bwd_kernel(
    dh_ptr, e_ptr, g_ptr, de_ptr, dg_ptr, h_ptr,
    dh_stride, e_stride, g_stride, de_stride, dg_stride, h_stride,
    F: tl.constexpr, GELU: tl.constexpr, NEED_H: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    blocks: tl.constexpr = (F + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // blocks).to(tl.int64)
    cols = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < F
    dh = tl.load(dh_ptr + row * dh_stride + cols, mask=mask, other=0.0).to(tl.float32)
    e = tl.load(e_ptr + row * e_stride + cols, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(g_ptr + row * g_stride + cols, mask=mask, other=0.0).to(tl.float32)
    sig, bend = _gate(e, GELU)
    act = e * sig
    de = dh * g * sig * (1.0 + bend)
    # If in place, de and dg overwrite e and g, which have been loaded into registers.
    tl.store(de_ptr + row * de_stride + cols, de.to(de_ptr.dtype.element_ty), mask=mask)
    tl.store(dg_ptr + row * dg_stride + cols, (dh * act).to(dg_ptr.dtype.element_ty), mask=mask)
    if NEED_H:
        h = act * g
        tl.store(h_ptr + row * h_stride + cols, h.to(h_ptr.dtype.element_ty), mask=mask)


def _split(gate_up: GateUp) -> tuple[torch.Tensor, torch.Tensor]:
    if isinstance(gate_up, torch.Tensor):
        e, g = rows(gate_up).chunk(2, dim=-1)
        return e, g
    return rows(gate_up[0]), rows(gate_up[1])


def _is_gelu(kind: Kind) -> bool:
    if kind not in ("silu", "gelu_tanh"):
        raise ValueError(f"kind={kind!r}: must be 'silu' or 'gelu_tanh'")
    return kind == "gelu_tanh"


def gated_activation_forward(
    gate_up: GateUp, kind: Kind, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Return h = act(gate) * up without recording a gradient.

    Args:
        gate_up: One tensor [..., 2 F], or a pair of [..., F].
        kind: The activation.
        out: Where h is written, [..., F] with any row stride; allocated if None.
    """
    gelu = _is_gelu(kind)
    e_TF, g_TF = _split(gate_up)
    T, F = e_TF.shape
    if not use_kernel(e_TF):
        h = gated_activation_reference(gate_up, kind)
        return h if out is None else out.copy_(h)
    leading = (gate_up if isinstance(gate_up, torch.Tensor) else gate_up[0]).shape[:-1]
    h = torch.empty(*leading, F, dtype=e_TF.dtype, device=e_TF.device) if out is None else out
    h_TF = h.view(T, F)
    _fwd_kernel[(T * triton.cdiv(F, _BLOCK),)](
        e_TF, g_TF, h_TF, e_TF.stride(0), g_TF.stride(0), h_TF.stride(0),
        F=F, GELU=gelu, BLOCK=_BLOCK, num_warps=_NUM_WARPS,
    )  # fmt: skip
    return h


def gated_activation_backward(
    dh: torch.Tensor, gate_up: GateUp, kind: Kind, *, inplace: bool = False, need_h: bool = True
) -> tuple[GateUp, torch.Tensor | None]:
    """Return the gradient of gate_up, and the recomputed h or None.

    Args:
        dh: Gradient of h [..., F].
        gate_up: Input of the forward: one tensor [..., 2 F], or a pair of [..., F].
        kind: The activation.
        inplace: Overwrite gate_up with its gradient. The caller must own gate_up and not read it
            again, and `rows(gate_up)` must be a view, as for a contiguous tensor.
        need_h: Compute h [..., F] too.

    Raises:
        ValueError: `inplace` is set, but `rows(gate_up)` is a copy.
    """
    gelu = _is_gelu(kind)
    if inplace and _copied(gate_up):
        raise ValueError("inplace needs a gate_up with unit stride along F and even row strides")
    if not use_kernel(dh):
        h, vjp = torch.func.vjp(lambda t: gated_activation_reference(t, kind), gate_up)[:2]
        (d_gate_up,) = vjp(dh)
        if inplace:
            for old, new in zip(_split(gate_up), _split(d_gate_up), strict=True):
                old.copy_(new)
        return gate_up if inplace else d_gate_up, h if need_h else None
    if inplace:
        d_gate_up = gate_up
    elif isinstance(gate_up, torch.Tensor):
        d_gate_up = torch.empty_like(gate_up, memory_format=torch.contiguous_format)
    else:
        d_gate_up = (
            torch.empty_like(gate_up[0], memory_format=torch.contiguous_format),
            torch.empty_like(gate_up[1], memory_format=torch.contiguous_format),
        )
    e_TF, g_TF = _split(gate_up)
    de_TF, dg_TF = _split(d_gate_up)
    dh_TF = rows(dh)
    T, F = e_TF.shape
    h_TF = torch.empty(T, F, dtype=e_TF.dtype, device=e_TF.device) if need_h else dh_TF
    _bwd_kernel[(T * triton.cdiv(F, _BLOCK),)](
        dh_TF, e_TF, g_TF, de_TF, dg_TF, h_TF,
        dh_TF.stride(0), e_TF.stride(0), g_TF.stride(0),
        de_TF.stride(0), dg_TF.stride(0), h_TF.stride(0),
        F=F, GELU=gelu, NEED_H=need_h, BLOCK=_BLOCK, num_warps=_NUM_WARPS,
    )  # fmt: skip
    return d_gate_up, h_TF.view(dh.shape) if need_h else None


def _copied(gate_up: GateUp) -> bool:
    """Return whether `rows(gate_up)` is a copy: writes to it would not reach `gate_up`."""
    whole = [gate_up] if isinstance(gate_up, torch.Tensor) else list(gate_up)
    return any(rows(t).data_ptr() != t.data_ptr() for t in whole)


class GatedActivationFunction(torch.autograd.Function):
    """Autograd function of `gated_activation`; it saves only gate and up."""

    @staticmethod
    def forward(ctx, kind, *gate_up):  # noqa: D102
        ctx.save_for_backward(*gate_up)
        ctx.kind = kind
        return gated_activation_forward(gate_up if len(gate_up) == 2 else gate_up[0], kind)

    @staticmethod
    def backward(ctx, dh):  # noqa: D102
        saved = ctx.saved_tensors
        gate_up = tuple(saved) if len(saved) == 2 else saved[0]
        grads, _ = gated_activation_backward(dh, gate_up, ctx.kind, need_h=False)
        return None, *(grads if len(saved) == 2 else (grads,))


def gated_activation_reference(gate_up: GateUp, kind: Kind) -> torch.Tensor:
    """Compute `gated_activation` in plain torch; same arguments."""
    e, g = gate_up.chunk(2, dim=-1) if isinstance(gate_up, torch.Tensor) else gate_up
    wide = torch.promote_types(e.dtype, torch.float32)
    if _is_gelu(kind):
        act = torch.nn.functional.gelu(e.to(wide), approximate="tanh")
    else:
        act = torch.nn.functional.silu(e.to(wide))
    return (act * g.to(wide)).to(e.dtype)


def gated_activation(gate_up: GateUp, kind: Kind = "silu") -> torch.Tensor:
    """Return act(gate) * up, differentiable in gate and up."""
    if isinstance(gate_up, torch.Tensor):
        return GatedActivationFunction.apply(kind, gate_up)
    return GatedActivationFunction.apply(kind, *gate_up)
