"""The gated activation of routed experts, and its backward with the gradient of the routing weight.

    silu, gelu_tanh:  h = act(e) u                         e = gate, u = up: [S, 2 F] = [e | u]
    clamped_swiglu:   h = (clip(u, -m, m) + 1) c sigmoid(a c),  c = min(e, m)
                                                           gpt-oss: e and u alternate along 2 F

The backward gets dh' = dd W_down, the gradient of h before the routing weight w of its row, and
returns in one pass

    h,   dw = sum_F dh' h,   de = w dh' dh/de,   du = w dh' dh/du

dw is the gradient of w because <dd, W_down h> = <dd W_down, h>: the experts' outputs need not be
stored or computed again. Everything is computed in float32, and each result is rounded once.

Shapes: S rows (slots sorted by expert), F intermediate size.
"""

# Triton's types declare neither a launch's options nor plain values for constexpr parameters.
# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from tuneline.kernels.experts.route import Routing
from tuneline.kernels.ops._dispatch import use_kernel
from tuneline.kernels.ops.gated_activation import _gate

_BLOCK = 1024
_NUM_WARPS = 4
_KINDS = {"silu": 0, "gelu_tanh": 1, "clamped_swiglu": 2}


@dataclass(frozen=True, slots=True)
class ExpertActivation:
    """The activation of an expert's MLP.

    Attributes:
        kind: `clamped_swiglu` is gpt-oss's; its gate and up alternate along the last dimension.
        alpha: a of `clamped_swiglu`.
        limit: m of `clamped_swiglu`.
    """

    kind: Literal["silu", "gelu_tanh", "clamped_swiglu"] = "silu"
    alpha: float = 1.702
    limit: float = 7.0

    def __post_init__(self) -> None:
        """Check the kind.

        Raises:
            ValueError: The kind is unknown.
        """
        if self.kind not in _KINDS:
            raise ValueError(f"kind={self.kind!r}: must be one of {sorted(_KINDS)}")

    @property
    def interleaved(self) -> bool:
        """Whether gate and up alternate; otherwise the gate is the first half."""
        return self.kind == "clamped_swiglu"

    def apply(self, gate_up: Tensor) -> Tensor:
        """Compute h [..., F] from gate and up [..., 2 F] in plain torch, in the input's dtype."""
        wide = torch.promote_types(gate_up.dtype, torch.float32)
        e, u = (
            (gate_up[..., ::2], gate_up[..., 1::2])
            if self.interleaved
            else gate_up.chunk(2, dim=-1)
        )
        e, u = e.to(wide), u.to(wide)
        if self.kind == "silu":
            h = torch.nn.functional.silu(e) * u
        elif self.kind == "gelu_tanh":
            h = torch.nn.functional.gelu(e, approximate="tanh") * u
        else:
            e, u = e.clamp(max=self.limit), u.clamp(-self.limit, self.limit)
            h = (u + 1) * e * torch.sigmoid(self.alpha * e)
        return h.to(gate_up.dtype)


@triton.jit
def _activate(e, u, alpha, limit, KIND: tl.constexpr):
    """Return h, dh/de and dh/du."""
    if KIND == 2:
        # torch passes the gradient at the limits themselves.
        inside_e = e <= limit
        inside_u = (u >= -limit) & (u <= limit)
        c = tl.minimum(e, limit)
        up = tl.minimum(tl.maximum(u, -limit), limit) + 1.0
        sig = tl.sigmoid(alpha * c)
        act = c * sig
        h_e = tl.where(inside_e, up * sig * (1.0 + alpha * c * (1.0 - sig)), 0.0)
        h_u = tl.where(inside_u, act, 0.0)
        h = up * act
    else:
        sig, bend = _gate(e, KIND == 1)
        act = e * sig
        h = act * u
        h_e = u * sig * (1.0 + bend)
        h_u = act
    return h, h_e, h_u


@triton.jit
def _fwd_kernel(
    gate_up_ptr, h_ptr, end_ptr, gate_up_stride, h_stride, alpha, limit,
    F: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    blocks: tl.constexpr = (F + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // blocks).to(tl.int64)
    if row < tl.load(end_ptr):
        col = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
        mask = col < F
        pointers = gate_up_ptr + row * gate_up_stride
        if KIND == 2:
            e = tl.load(pointers + 2 * col, mask=mask, other=0.0).to(tl.float32)
            u = tl.load(pointers + 2 * col + 1, mask=mask, other=0.0).to(tl.float32)
        else:
            e = tl.load(pointers + col, mask=mask, other=0.0).to(tl.float32)
            u = tl.load(pointers + F + col, mask=mask, other=0.0).to(tl.float32)
        h, _, _ = _activate(e, u, alpha, limit, KIND)
        tl.store(h_ptr + row * h_stride + col, h.to(h_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _bwd_kernel(
    dh_ptr, gate_up_ptr, out_ptr, dw_ptr, weights_ptr, slot_of_row_ptr, end_ptr,
    gate_up_stride, out_stride, alpha, limit,
    F: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the gradients of gate and up of one row, and overwrite dh by h."""
    row = tl.program_id(0).to(tl.int64)
    if row < tl.load(end_ptr):
        slot = tl.load(slot_of_row_ptr + row)
        w = tl.load(weights_ptr + slot).to(tl.float32)
        total = tl.zeros([BLOCK], dtype=tl.float32)
        for i in tl.static_range((F + BLOCK - 1) // BLOCK):
            col = i * BLOCK + tl.arange(0, BLOCK)
            mask = col < F
            if KIND == 2:
                e_col = 2 * col
                u_col = 2 * col + 1
            else:
                e_col = col
                u_col = F + col
            pointers = gate_up_ptr + row * gate_up_stride
            e = tl.load(pointers + e_col, mask=mask, other=0.0).to(tl.float32)
            u = tl.load(pointers + u_col, mask=mask, other=0.0).to(tl.float32)
            dh_ptrs = dh_ptr + row * F + col
            dh = tl.load(dh_ptrs, mask=mask, other=0.0).to(tl.float32)
            h, h_e, h_u = _activate(e, u, alpha, limit, KIND)
            total += tl.where(mask, dh * h, 0.0)
            dh = dh * w
            out = out_ptr + row * out_stride
            tl.store(out + e_col, (dh * h_e).to(out_ptr.dtype.element_ty), mask=mask)
            tl.store(out + u_col, (dh * h_u).to(out_ptr.dtype.element_ty), mask=mask)
            tl.store(dh_ptrs, h.to(dh_ptr.dtype.element_ty), mask=mask)
        tl.store(dw_ptr + slot, tl.sum(total, axis=0))


def expert_activation_forward(
    gate_up_SF: Tensor, routing: Routing, activation: ExpertActivation, *, out: Tensor
) -> None:
    """Write h [S, F] of the rows that have an expert.

    Args:
        gate_up_SF: Gate and up [S, 2 F], unit stride along 2 F.
        routing: The rows.
        activation: The activation.
        out: Where h is written, unit stride along F.
    """
    S, F = out.shape
    if not use_kernel(gate_up_SF):
        out.copy_(activation.apply(gate_up_SF))
        return
    block = min(_BLOCK, triton.next_power_of_2(F))
    _fwd_kernel[(S * triton.cdiv(F, block),)](
        gate_up_SF, out, routing.starts[-1:], gate_up_SF.stride(0), out.stride(0),
        activation.alpha, activation.limit,
        F=F, KIND=_KINDS[activation.kind], BLOCK=block, num_warps=_NUM_WARPS,
    )  # fmt: skip


def expert_activation_backward(
    dh_SF: Tensor,
    gate_up_SF: Tensor,
    weights_Tk: Tensor,
    routing: Routing,
    activation: ExpertActivation,
    *,
    out: Tensor,
) -> Tensor:
    """Write the gradient of gate and up, overwrite dh by h, and return dw [T, k] in float32.

    Args:
        dh_SF: Gradient of h before the routing weights, contiguous; overwritten by h.
        gate_up_SF: Gate and up of the forward, unit stride along 2 F.
        weights_Tk: Routing weights.
        routing: The rows.
        activation: The activation.
        out: Where the gradient of gate and up is written; may be `gate_up_SF`.
    """
    wide = torch.promote_types(dh_SF.dtype, torch.float32)
    F = dh_SF.shape[1]
    dw = torch.zeros(weights_Tk.shape, dtype=wide, device=dh_SF.device)
    if not use_kernel(dh_SF):
        num_rows = int(routing.starts[-1])
        slot = routing.slot_of_row[:num_rows].long()
        h, vjp = torch.func.vjp(activation.apply, gate_up_SF[:num_rows].to(wide))[:2]
        dh = dh_SF[:num_rows].to(wide)
        dw.view(-1)[slot] = (dh * h).sum(1)
        (grad,) = vjp(dh * weights_Tk.reshape(-1)[slot, None].to(wide))
        out[:num_rows] = grad
        dh_SF[:num_rows] = h
        return dw
    block = min(_BLOCK, triton.next_power_of_2(F))
    _bwd_kernel[(dh_SF.shape[0],)](
        dh_SF, gate_up_SF, out, dw, weights_Tk.contiguous(), routing.slot_of_row,
        routing.starts[-1:], gate_up_SF.stride(0), out.stride(0), activation.alpha,
        activation.limit,
        F=F, KIND=_KINDS[activation.kind], BLOCK=block, num_warps=_NUM_WARPS,
    )  # fmt: skip
    return dw
