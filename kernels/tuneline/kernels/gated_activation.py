"""SwiGLU and GeGLU: the activation of a gated MLP, from one [gate | up] buffer.

Both activations are the gate times a sigmoid, so one kernel serves both:

    h = e * sig * g,                 sig = sigmoid(z(e))
    dg = dh * e * sig
    de = dh * g * sig * (1 + e * (1 - sig) * z'(e))

    silu:      z = e,                             z' = 1
    gelu_tanh: z = 2 c (e + 0.044715 e^3),        z' = 2 c (1 + 0.134145 e^2),   c = sqrt(2 / pi)

because 0.5 (1 + tanh(u)) = sigmoid(2 u). All in float32, rounded once.

Shapes: gate_up [..., 2 F] with the gate e first, or a pair (e, g) of [..., F]; h [..., F].
"""

from typing import Literal

import torch

Kind = Literal["silu", "gelu_tanh"]
GateUp = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


def gated_activation_forward(
    gate_up: GateUp, kind: Kind, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Return h without recording a gradient; `out` [..., F] may have any row stride."""
    h = gated_activation_reference(gate_up, kind)
    return h if out is None else out.copy_(h)


def gated_activation_backward(
    dh: torch.Tensor, gate_up: GateUp, kind: Kind, *, inplace: bool = False, need_h: bool = True
) -> tuple[GateUp, torch.Tensor | None]:
    """Return (d_gate_up, h recomputed or None); `inplace` overwrites gate_up with d_gate_up."""
    h, vjp = torch.func.vjp(lambda t: gated_activation_reference(t, kind), gate_up)
    (d_gate_up,) = vjp(dh)
    if inplace:
        gate_up.copy_(d_gate_up)
        d_gate_up = gate_up
    return d_gate_up, h if need_h else None


def gated_activation_reference(gate_up: GateUp, kind: Kind) -> torch.Tensor:
    """Compute `gated_activation` in plain torch."""
    e, g = gate_up.chunk(2, dim=-1) if isinstance(gate_up, torch.Tensor) else gate_up
    wide = torch.promote_types(e.dtype, torch.float32)
    act = torch.nn.functional.silu if kind == "silu" else _gelu_tanh
    return (act(e.to(wide)) * g.to(wide)).to(e.dtype)


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.gelu(x, approximate="tanh")


def gated_activation(gate_up: GateUp, kind: Kind = "silu") -> torch.Tensor:
    """Return act(gate) * up; differentiable."""
    return gated_activation_reference(gate_up, kind)
