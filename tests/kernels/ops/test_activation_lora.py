"""The activation's backward with its LoRA gradients against float64 autograd."""

import pytest
import torch

from tuneline.kernels.ops import activation_lora
from tuneline.kernels.ops.activation_lora import (
    MAX_RANK,
    activation_lora_backward,
    activation_lora_backward_reference,
)
from tuneline.kernels.ops.gated_activation import gated_activation_reference
from tuneline.kernels.ops.lora import LoraGroup, LoraLinear

CASES = {
    # name: (tokens, F, rank of down, ranks of gate and up, or the one of a fused gate_up)
    "one_token": (1, 40, 4, (4, 4)),
    "odd": (47, 97, 5, (7, 3)),
    "fused_gate_up": (33, 50, 3, (5,)),
    "down_alone": (7, 40, 6, (0, 0)),
    "no_down": (7, 40, 0, (4, 4)),
    "up_alone": (7, 40, 2, (0, 3)),
    "no_adapter": (7, 40, 0, (0, 0)),
    "rank_too_wide": (7, 40, MAX_RANK + 1, (4, 4)),
}
HIDDEN = 8

# The interpreter's numpy warns where exp(-z) is infinite and 1 / (1 + inf) = 0 is right.
pytestmark = [
    pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning"),
    pytest.mark.usefixtures("poisoned", "short_programs"),
]


@pytest.fixture
def short_programs(monkeypatch):
    """Give a program 32 tokens: 47 are two programs, whose sums are added."""
    monkeypatch.setattr(activation_lora, "_ROWS", 32)


def _linear(num_out, num_in, rank, generator):
    if not rank:
        return LoraLinear(torch.empty(0), num_out, num_in)

    def randn(*size):
        return torch.randn(*size, generator=generator, device=generator.device)

    return LoraLinear(
        torch.empty(0), num_out, num_in, lora_a=randn(rank, num_in), lora_b=randn(num_out, rank)
    )


def _inputs(case, dtype, generator):
    """Return the function's arguments; columns beyond the ranks are NaN, for nobody reads them."""
    T, F, down_rank, ranks = CASES[case]

    def randn(*size):
        return torch.randn(*size, generator=generator, device=generator.device).to(dtype)

    down = LoraGroup((_linear(HIDDEN, F, down_rank, generator),))
    width = 2 * F // len(ranks)
    gate_up = LoraGroup(tuple(_linear(width, HIDDEN, rank, generator) for rank in ranks))
    g_TP = torch.full((T, down.num_columns), float("nan"), dtype=dtype, device=generator.device)
    g_TP[:, :down_rank] = randn(T, down_rank)
    # X A^T lies in the last columns of a wider buffer, as the layer has it.
    x_TKP = torch.full((T, HIDDEN + gate_up.num_columns), float("nan"), device=generator.device)
    xa_TP = x_TKP.to(dtype)[:, HIDDEN:]
    xa_TP[:, : gate_up.rank] = randn(T, gate_up.rank)
    return dict(
        dh_TF=randn(T, F + 3)[:, :F],
        gate_up_TF=3 * randn(T, 2 * F),
        down=down,
        gate_up=gate_up,
        g_TP=g_TP if down_rank else None,
        xa_TP=xa_TP,
    )


def _outputs(gradients, inputs):
    """Flatten what came back into d_gate_up, dA_down, dB... without padded rows."""
    rank = inputs["down"].rank
    da = [] if gradients.da_down is None else [gradients.da_down[:rank]]
    return [gradients.d_gate_up, *da, *(gradients.db_gate_up or [])]


def _truth(inputs, kind):
    """Differentiate the MLP's middle in float64, adapters at zero."""
    dh, base = inputs["dh_TF"].double(), inputs["gate_up_TF"].double()
    down, gate_up = inputs["down"], inputs["gate_up"]
    leaf = base.clone().requires_grad_()
    b = [torch.zeros(x.num_out, x.rank, dtype=base.dtype, device=base.device) for x in
         gate_up.linears]  # fmt: skip
    a = torch.zeros(down.rank, down.num_in, dtype=base.dtype, device=base.device)
    leaves = [leaf, *([a] if down.rank else []), *(b if gate_up.rank else [])]
    for x in leaves[1:]:
        x.requires_grad_()
    columns = (
        inputs["xa_TP"][:, : gate_up.rank].double().split([x.rank for x in gate_up.linears], 1)
    )
    sides = [xa @ x.T for xa, x in zip(columns, b, strict=True)]
    h = gated_activation_reference(leaf + torch.cat(sides, 1), kind)
    loss = (h * dh).sum()
    if down.rank:
        loss = loss + (h @ a.T * inputs["g_TP"][:, : down.rank].double()).sum()
    return list(torch.autograd.grad(loss, leaves))


@pytest.mark.parametrize("kind", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("case", CASES)
def test_gradients(case, kind, dtype, generator, assert_near):
    inputs = _inputs(case, dtype, generator)
    ours = _outputs(activation_lora_backward(**inputs, kind=kind), inputs)
    again = _outputs(activation_lora_backward(**inputs, kind=kind), inputs)
    stock = _outputs(activation_lora_backward_reference(**inputs, kind=kind), inputs)
    truth = _truth(inputs, kind)
    for a, b, c, d in zip(ours, truth, stock, again, strict=True):
        assert_near(a, b, c)
        assert torch.equal(a, d)


@pytest.mark.parametrize("case", ["odd", "rank_too_wide"])
def test_in_place_overwrites_gate_up_alone(case, generator):
    inputs = _inputs(case, torch.float32, generator)
    expected = _outputs(activation_lora_backward(**inputs, kind="silu"), inputs)
    before = {name: inputs[name].clone() for name in ("dh_TF", "g_TP", "xa_TP")}
    gradients = activation_lora_backward(**inputs, kind="silu", inplace=True)
    assert gradients.d_gate_up.data_ptr() == inputs["gate_up_TF"].data_ptr()
    for a, b in zip(_outputs(gradients, inputs), expected, strict=True):
        assert torch.equal(a, b)
    for name, tensor in before.items():
        assert torch.equal(tensor.nan_to_num(), inputs[name].nan_to_num())
