"""gated_activation against float64: both kinds, fused and separate, in place."""

import pytest
import torch

from tuneline.kernels.ops.gated_activation import (
    gated_activation,
    gated_activation_backward,
    gated_activation_forward,
    gated_activation_reference,
)

KINDS = ["silu", "gelu_tanh"]

# The interpreter's numpy warns where exp(-z) is infinite and 1 / (1 + inf) = 0 is right.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")


def _randn(generator, *size):
    return torch.randn(*size, generator=generator, device=generator.device)


def _run(function, gate_up, dh, kind):
    leaf = gate_up.detach().requires_grad_()
    h = function(leaf, kind)
    (grad,) = torch.autograd.grad(h, leaf, dh)
    return h.detach(), grad


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 16), (7, 1500), (3, 5, 97)])
def test_values_and_gradients(shape, kind, dtype, generator, assert_near):
    gate_up = (_randn(generator, *shape[:-1], 2 * shape[-1]) * 3).to(dtype)
    dh = _randn(generator, *shape).to(dtype)
    ours = _run(gated_activation, gate_up, dh, kind)
    truth = _run(gated_activation_reference, gate_up.double(), dh.double(), kind)
    again = _run(gated_activation, gate_up, dh, kind)
    for a, b, c in zip(ours, truth, again, strict=True):
        assert_near(a, b)
        assert torch.equal(a, c)


@pytest.mark.parametrize("kind", KINDS)
def test_two_tensors_equal_one_buffer(kind, generator):
    gate_up, dh = _randn(generator, 7, 600), _randn(generator, 7, 300)
    pair = [half.detach().clone().requires_grad_() for half in gate_up.chunk(2, -1)]
    h = gated_activation(tuple(pair), kind)
    h.backward(dh)
    expected_h, expected_grad = _run(gated_activation, gate_up, dh, kind)
    assert torch.equal(h, expected_h)
    assert torch.equal(torch.cat([p.grad for p in pair], -1), expected_grad)


@pytest.mark.parametrize("kind", KINDS)
def test_in_place_backward_and_recomputed_h(kind, generator):
    buffer = _randn(generator, 7, 640)
    gate_up, dh = buffer[:, :600], _randn(generator, 7, 300)
    expected_h, expected_grad = _run(gated_activation, gate_up, dh, kind)
    beside = buffer[:, 600:].clone()
    grad, h = gated_activation_backward(dh, gate_up, kind, inplace=True)
    assert grad.data_ptr() == gate_up.data_ptr()
    assert torch.equal(grad, expected_grad) and torch.equal(h, expected_h)
    assert torch.equal(buffer[:, 600:], beside)


def test_in_place_refuses_what_it_would_have_to_copy(generator):
    gate_up = _randn(generator, 32, 7).T
    with pytest.raises(ValueError, match="stride"):
        gated_activation_backward(_randn(generator, 7, 16), gate_up, "silu", inplace=True)


def test_out_fills_a_wider_buffer_and_nothing_else(device, generator):
    gate_up = _randn(generator, 7, 600)
    buffer = torch.full((7, 364), float("nan"), device=device)
    h = gated_activation_forward(gate_up, "silu", out=buffer[:, :300])
    assert torch.equal(h, gated_activation_forward(gate_up, "silu"))
    assert buffer[:, 300:].isnan().all()


@pytest.mark.parametrize("kind", KINDS)
def test_large_gates_saturate_without_nan(kind, device):
    gate = torch.tensor([[-200.0, -30.0, 0.0, 30.0, 200.0]], device=device)
    grad, h = gated_activation_backward(
        torch.ones_like(gate), (gate, torch.ones_like(gate)), kind, need_h=True
    )
    assert torch.allclose(h, torch.relu(gate), atol=1e-6)
    assert torch.allclose(grad[0], torch.tensor([[0.0, 0.0, 0.5, 1.0, 1.0]], device=device))


@pytest.mark.parametrize("kind", KINDS)
def test_float64_gradient_is_exact(kind, generator):
    gate_up = _randn(generator, 3, 8).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda t: gated_activation(t, kind), gate_up)


def test_unknown_kind_is_refused(generator):
    with pytest.raises(ValueError, match="relu"):
        gated_activation(_randn(generator, 2, 4), "relu")
