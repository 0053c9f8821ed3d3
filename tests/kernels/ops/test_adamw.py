"""FlatAdamW against torch.optim.AdamW and its own reference; the clip against torch's."""

import copy

import pytest
import torch

import tuneline.kernels.ops.adamw as adamw
from tuneline.kernels.ops.adamw import FlatAdamW, clip_grad_norm_flat_, dynamic_map

SHAPES = [(3, 5), (300,), (47, 64)]
OPTIONS = dict(lr=1e-2, weight_decay=0.1)


def _params(generator):
    return [
        torch.randn(s, generator=generator, device=generator.device).requires_grad_()
        for s in SHAPES
    ]


def _copies(params):
    return [p.detach().clone().requires_grad_() for p in params]


def _gradients(generator, step):
    scale = 0.1 ** (step % 3)
    return [scale * torch.randn(s, generator=generator, device=generator.device) for s in SHAPES]


def _set(params, grads):
    for p, g in zip(params, grads, strict=True):
        p.grad = g.clone()


def _distance(params, others):
    return max((a - b).abs().max().item() for a, b in zip(params, others, strict=True))


def test_32_bit_equals_torch(generator):
    ours = _params(generator)
    theirs = _copies(ours)
    optimizer = FlatAdamW(ours, **OPTIONS, max_grad_norm=1.0)
    stock = torch.optim.AdamW(theirs, **OPTIONS)
    for step in range(8):
        grads = _gradients(generator, step)
        _set(ours, grads)
        _set(theirs, grads)
        if step % 2:
            seen = optimizer.grad_norm()
        optimizer.step()
        norm = torch.nn.utils.clip_grad_norm_(theirs, 1.0)
        stock.step()
        assert step % 2 == 0 or torch.allclose(seen, norm, rtol=1e-5)
    assert _distance(ours, theirs) < 3e-6  # parameters of about 1 after updates of 1e-2


def test_8_bit_equals_its_reference_and_follows_32_bit(generator, monkeypatch):
    ours = _params(generator)
    reference, wide = _copies(ours), _copies(ours)
    optimizer = FlatAdamW(ours, **OPTIONS, state_bits=8)
    expected = FlatAdamW(reference, **OPTIONS, state_bits=8)
    stock = torch.optim.AdamW(wide, **OPTIONS)
    start = _copies(ours)
    for _ in range(6):
        grads = _gradients(generator, 0)
        for params in (ours, reference, wide):
            _set(params, grads)
        optimizer.step()
        stock.step()
        with monkeypatch.context() as patch:
            patch.setattr(adamw, "use_kernel", lambda x: False)
            expected.step()
    # The last bit of a quotient may fall on the other side of the middle of two levels: few
    # bytes may differ, and those by one level.
    for name in ("exp_avg", "exp_avg_sq"):
        a = torch.cat([optimizer.state[p][name].reshape(-1) for p in ours]).int()
        b = torch.cat([expected.state[p][name].reshape(-1) for p in reference]).int()
        assert (a - b).abs().max() <= 1
        assert (a != b).float().mean() < 0.01
    moved = _distance(wide, start)
    assert _distance(ours, reference) < 0.02 * moved
    assert _distance(ours, wide) < 0.1 * moved


def test_8_bit_small_gradient_beside_a_large_one_does_not_explode(device):
    param = torch.zeros(256, device=device, requires_grad=True)
    optimizer = FlatAdamW([param], lr=1e-2, weight_decay=0.0, state_bits=8)
    grad = torch.full((256,), 1e-4, device=device)
    grad[0] = 1.0
    for step in range(1, 6):
        param.grad = grad.clone()
        optimizer.step()
        assert param.abs().max() <= 1.05e-2 * step


@pytest.mark.parametrize("state_bits", [32, 8])
def test_same_gradients_same_bits_and_resume(state_bits, generator):
    first = _params(generator)
    second = _copies(first)
    one = FlatAdamW(first, **OPTIONS, state_bits=state_bits, max_grad_norm=1.0)
    two = FlatAdamW(second, **OPTIONS, state_bits=state_bits, max_grad_norm=1.0)
    for step in range(4):
        if step == 2:
            state = copy.deepcopy(two.state_dict())
            second = _copies(second)
            two = FlatAdamW(second, **OPTIONS, state_bits=state_bits, max_grad_norm=1.0)
            two.load_state_dict(state)
        grads = _gradients(generator, step)
        _set(first, grads)
        _set(second, [torch.full_like(g, float("nan")) for g in grads])
        two.grad_norm()
        for p, g in zip(second, grads, strict=True):  # changed in place after it was looked at
            p.grad.copy_(g)
        one.step()
        two.step()
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_state_of_other_bits_is_refused(generator):
    params = _params(generator)
    optimizer = FlatAdamW(params, state_bits=8)
    with pytest.raises(ValueError, match="state_bits=32"):
        FlatAdamW(_copies(params), state_bits=32).load_state_dict(optimizer.state_dict())


def test_groups_have_their_own_settings(generator):
    ours = _params(generator)
    theirs = _copies(ours)
    optimizer = FlatAdamW(
        [dict(params=ours[:1], lr=1e-1), dict(params=ours[1:], weight_decay=0.5)],
        lr=1e-3,
        max_grad_norm=0.5,
    )
    stock = torch.optim.AdamW(
        [dict(params=theirs[:1], lr=1e-1), dict(params=theirs[1:], weight_decay=0.5)], lr=1e-3
    )
    for step in range(3):
        grads = _gradients(generator, step)
        _set(ours, grads)
        _set(theirs, grads)
        optimizer.step()
        torch.nn.utils.clip_grad_norm_(theirs, 0.5)
        stock.step()
    assert _distance(ours, theirs) < 3e-6  # parameters of about 1 after updates of 1e-2


def test_a_parameter_without_gradient_beside_others_is_stepped_with_zeros(generator):
    params = _params(generator)
    others = _copies(params)
    optimizer, stock = FlatAdamW(params, **OPTIONS), torch.optim.AdamW(others, **OPTIONS)
    for step in range(3):
        grads = _gradients(generator, step)
        _set(params, grads)
        _set(others, grads)
        params[1].grad, others[1].grad = None, torch.zeros_like(grads[1])
        version = params[0]._version
        optimizer.step()
        stock.step()
        assert params[0]._version > version
        optimizer.zero_grad()
        assert all(p.grad is None for p in params)
    assert _distance(params, others) < 3e-6


def test_gradients_dropped_after_their_norm_are_not_stepped(generator):
    params = _params(generator)
    before = _copies(params)
    optimizer = FlatAdamW(params, **OPTIONS, max_grad_norm=1.0)
    assert optimizer.grad_norm() == 0
    _set(params, _gradients(generator, 0))
    assert optimizer.grad_norm() > 0
    optimizer.zero_grad()
    optimizer.step()
    assert _distance(params, before) == 0


@pytest.mark.parametrize("state_bits", [8, 32])
def test_a_step_without_any_gradient_changes_nothing(state_bits, generator):
    params = _params(generator)
    optimizer = FlatAdamW(params, lr=0.1, weight_decay=0.1, state_bits=state_bits)
    sum((p * p).sum() for p in params).backward()
    optimizer.step()
    before, state = _copies(params), copy.deepcopy(optimizer.state_dict())
    for p in params:
        p.grad = None
    optimizer.step()
    assert _distance(params, before) == 0
    for number, tensors in optimizer.state_dict()["state"].items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, state["state"][number][name])
    assert optimizer.state_dict()["param_groups"] == state["param_groups"]


def test_values_survive_flattening_and_other_dtypes_are_refused(generator):
    params = _params(generator)
    before = _copies(params)
    FlatAdamW(params)
    assert _distance(params, before) == 0
    with pytest.raises(ValueError, match="float32"):
        FlatAdamW([params[0].detach().bfloat16().requires_grad_()])
    with pytest.raises(ValueError, match="state_bits"):
        FlatAdamW(params, state_bits=4)


@pytest.mark.parametrize("num_steps", [0, 1, 5])
def test_a_model_moved_after_the_optimizer_was_made_is_refused(num_steps, generator):
    model = torch.nn.ParameterList(_params(generator))
    optimizer = FlatAdamW(model.parameters(), **OPTIONS)

    def step():
        sum((p * p).sum() for p in model).backward()
        optimizer.step()

    for _ in range(num_steps):
        step()
    model.double().float()
    with pytest.raises(RuntimeError, match=r"\(.*\) is no longer a slice .* the last move"):
        step()


def test_one_moved_parameter_is_found_in_as_many_steps_as_there_are(generator):
    params = _params(generator)
    optimizer = FlatAdamW(params, **OPTIONS)
    sum((p * p).sum() for p in params).backward()
    optimizer.step()
    params[1].data = params[1].data.clone()
    with pytest.raises(RuntimeError, match="shape \\(300,\\)"):
        for _ in params:
            optimizer.step()


@pytest.mark.parametrize("size, max_norm", [(1, 1.0), (5000, 1.0), (5000, 1e3)])
def test_clip_equals_torch(size, max_norm, generator):
    grad = torch.randn(size, generator=generator, device=generator.device)
    theirs = torch.nn.Parameter(torch.empty_like(grad))
    theirs.grad = grad.clone()
    expected = torch.nn.utils.clip_grad_norm_([theirs], max_norm)
    norm = clip_grad_norm_flat_(grad, max_norm)
    assert torch.allclose(norm, expected, rtol=1e-6)
    assert torch.allclose(grad, theirs.grad, rtol=1e-6)


def test_nan_gradient_is_seen(device):
    grad = torch.ones(100, device=device)
    grad[50] = float("nan")
    assert clip_grad_norm_flat_(grad, 1.0).isnan()
    assert grad.isnan().all()


@pytest.mark.parametrize("signed", [True, False])
def test_dynamic_map_equals_bitsandbytes(signed):
    functional = pytest.importorskip("bitsandbytes.functional")
    assert torch.equal(dynamic_map(signed=signed), functional.create_dynamic_map(signed=signed))
