"""rms_norm against float64, with and without residual, Llama and Gemma."""

import pytest
import torch

from tuneline.kernels.ops import rms_norm as rms_norm_module
from tuneline.kernels.ops.rms_norm import (
    rms_norm,
    rms_norm_backward,
    rms_norm_forward,
    rms_norm_reference,
)

EPS = 1e-5


def _inputs(shape, dtype, generator):
    def randn(*size):
        return torch.randn(*size, generator=generator, device=generator.device).to(dtype)

    return randn(*shape), randn(*shape), randn(shape[-1]), randn(*shape), randn(*shape)


def _reference(x, weight, eps, *, residual, gemma):
    total = x + residual
    return rms_norm_reference(total, weight, eps, gemma=gemma), total


def _run(function, x, residual, weight, dy, ds, gemma, train_weight):
    leaves = [t.detach().clone().requires_grad_() for t in (x, residual)]
    weight = weight.detach().clone().requires_grad_(train_weight)
    y, s = function(leaves[0], weight, EPS, residual=leaves[1], gemma=gemma)
    torch.autograd.backward((y, s), (dy, ds))
    grads = [leaf.grad for leaf in leaves] + ([weight.grad] if train_weight else [])
    return [y.detach(), s.detach(), *grads]


@pytest.mark.parametrize("gemma", [False, True], ids=["llama", "gemma"])
@pytest.mark.parametrize("shape", [(1, 64), (47, 576), (3, 5, 100), (2, 1500)])
def test_values_and_gradients(shape, gemma, dtype, generator, assert_near):
    inputs = _inputs(shape, dtype, generator)
    ours = _run(rms_norm, *inputs, gemma, train_weight=True)
    truth = _run(_reference, *(t.double() for t in inputs), gemma, train_weight=True)
    stock = _run(_reference, *inputs, gemma, train_weight=True)
    again = _run(rms_norm, *inputs, gemma, train_weight=True)
    for a, b, c, d in zip(ours, truth, stock, again, strict=True):
        assert_near(a, b, c)
        assert torch.equal(a, d)


def test_without_residual_on_strided_rows(dtype, generator, assert_near):
    wide = torch.randn(47, 200, generator=generator, device=generator.device).to(dtype)
    x = wide[:, 3:103]
    weight = torch.randn(100, generator=generator, device=generator.device).to(dtype)
    dy = torch.randn(100, 47, generator=generator, device=generator.device).to(dtype).T
    leaf = x.detach().requires_grad_()
    y = rms_norm(leaf, weight, EPS)
    y.backward(dy)
    truth, vjp = torch.func.vjp(
        lambda t: rms_norm_reference(t, weight.double(), EPS), x.detach().double()
    )
    stock, stock_vjp = torch.func.vjp(lambda t: rms_norm_reference(t, weight, EPS), x.detach())
    assert_near(y.detach(), truth, stock)
    assert_near(leaf.grad, vjp(dy.double())[0], stock_vjp(dy)[0])


def test_out_fills_a_wider_buffer_and_nothing_else(device, generator):
    x, _, weight, _, _ = _inputs((2, 47, 96), torch.float32, generator)
    buffer = torch.full((2, 47, 160), float("nan"), device=device)
    y = rms_norm(x, weight, EPS, out=buffer[..., :96])
    assert torch.equal(y, rms_norm(x, weight, EPS))
    assert buffer[..., 96:].isnan().all()


def test_the_sum_is_written_where_the_caller_wants_it(device, generator, monkeypatch):
    x, residual, weight, _, _ = _inputs((5, 96), torch.float32, generator)
    for reference in (False, True):
        if reference:
            monkeypatch.setattr(rms_norm_module, "use_kernel", lambda x: False)
        for added, total in [(None, x), (residual, x + residual)]:
            buffer = torch.full((7, 160), float("nan"), device=device)
            place = buffer[1:6, :96]
            y, s, rstd = rms_norm_forward(x, weight, EPS, residual=added, sum_out=place)
            without = rms_norm_forward(x, weight, EPS, residual=added)
            assert s is place and torch.equal(place, total)
            assert torch.equal(y, without[0]) and torch.equal(rstd, without[2])
            assert buffer.isnan().sum() == 7 * 160 - 5 * 96


def test_out_refuses_to_lose_a_gradient(generator):
    x, _, weight, _, _ = _inputs((2, 16), torch.float32, generator)
    with pytest.raises(ValueError, match="no_grad"):
        rms_norm(x.requires_grad_(), weight, EPS, out=torch.empty_like(x))


def test_only_the_new_residual_is_used(generator):
    x, residual, weight, _, ds = _inputs((4, 32), torch.float32, generator)
    x.requires_grad_()
    _, s = rms_norm(x, weight, EPS, residual=residual)
    s.backward(ds)
    assert torch.equal(x.grad, ds)


def test_float64_runs_the_reference_with_its_exact_gradient(generator):
    x, residual, weight, _, _ = _inputs((3, 8), torch.float64, generator)
    leaves = [t.requires_grad_() for t in (x, weight, residual)]
    assert torch.autograd.gradcheck(
        lambda a, w, r: rms_norm(a, w, EPS, residual=r, gemma=True), leaves
    )


def test_backward_needs_no_weight_gradient(generator):
    x, _, weight, dy, _ = _inputs((5, 64), torch.float32, generator)
    _, none, rstd = rms_norm_forward(x, weight, EPS)
    dx, dweight = rms_norm_backward(dy, x, weight, rstd, gemma=False)
    with_weight, _ = rms_norm_backward(dy, x, weight, rstd, gemma=False, need_dweight=True)
    assert none is None and dweight is None
    assert torch.equal(dx, with_weight)
