"""rope against float64: plain, partial, with the head norm, in place."""

import pytest
import torch

from tuneline.kernels.ops.rope import rope, rope_backward, rope_forward, rope_reference

CASES = {
    # name: (B, T, query heads, key heads, head dimension, rotary dimension, norm, gemma)
    "one_token": (1, 1, 4, 2, 16, 16, False, False),
    "partial": (1, 7, 3, 1, 96, 72, False, False),
    "qwen3": (2, 7, 6, 3, 24, 24, True, False),
    "gemma3": (2, 5, 4, 1, 32, 32, True, True),
    "partial_norm": (2, 5, 4, 1, 32, 16, True, True),
}


def _inputs(case, dtype, generator):
    B, T, H, HK, D, R, norm, gemma = CASES[case]

    def randn(*size):
        return torch.randn(*size, generator=generator, device=generator.device)

    angle = randn(1, T, R // 2)
    # q lies as [B, H, T, D], as transformers has it; k as a slice of a fused projection
    tensors = dict(
        q=randn(B, H, T, D).transpose(1, 2),
        k=randn(B, T, HK + 2, D)[:, :, 1:-1],
        cos=torch.cat([angle.cos()] * 2, -1),
        sin=torch.cat([angle.sin()] * 2, -1),
        dq=randn(B, T, H, D),
        dk=randn(B, T, HK, D),
    )
    if norm:
        tensors |= dict(q_weight=randn(D), k_weight=randn(D))
    return {name: t.to(dtype) for name, t in tensors.items()}, gemma


def _run(function, inputs, gemma, train_weights=False):
    inputs = {n: t.detach().requires_grad_(n in "qk") for n, t in inputs.items()}
    dq, dk = inputs.pop("dq"), inputs.pop("dk")
    names = ["q", "k"]
    if train_weights:
        names += ["q_weight", "k_weight"]
        for name in names[2:]:
            inputs[name].requires_grad_()
    outputs = function(**inputs, eps=1e-6, gemma=gemma)
    grads = torch.autograd.grad(outputs, [inputs[n] for n in names], (dq, dk))
    return [t.detach() for t in (*outputs, *grads)]


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(case, dtype, generator, assert_near):
    inputs, gemma = _inputs(case, dtype, generator)
    ours = _run(rope, inputs, gemma)
    truth = _run(rope_reference, {n: t.double() for n, t in inputs.items()}, gemma)
    stock = _run(rope_reference, inputs, gemma)
    again = _run(rope, inputs, gemma)
    for a, b, c, d in zip(ours, truth, stock, again, strict=True):
        assert_near(a, b, c)
        assert torch.equal(a, d)


def test_trained_head_norm_gets_its_gradient(dtype, generator, assert_near):
    inputs, gemma = _inputs("qwen3", dtype, generator)
    ours = _run(rope, inputs, gemma, train_weights=True)
    wide = {n: t.double() for n, t in inputs.items()}
    truth = _run(rope_reference, wide, gemma, train_weights=True)
    stock = _run(rope_reference, inputs, gemma, train_weights=True)
    for a, b, c in zip(ours, truth, stock, strict=True):
        assert_near(a, b, c)


@pytest.mark.parametrize("case", ["partial", "qwen3"])
def test_in_place_gives_the_same_bits(case, generator):
    inputs, gemma = _inputs(case, torch.float32, generator)
    dq, dk = inputs.pop("dq"), inputs.pop("dk")
    before = inputs["q"].clone(), inputs["k"].clone()
    expected = rope_forward(**inputs, gemma=gemma)
    assert torch.equal(inputs["q"], before[0]) and torch.equal(inputs["k"], before[1])
    in_place = dict(inputs, q=before[0], k=before[1])
    out = rope_forward(**in_place, gemma=gemma, out=before)
    assert out[0] is before[0] and out[1] is before[1]
    assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))
    expected = rope_backward(dq, dk, **inputs, gemma=gemma)
    out = rope_backward(dq, dk, **inputs, gemma=gemma, out=(dq, dk))
    assert out[0] is dq and out[1] is dk
    assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))


def test_float64_gradient_is_exact(generator):
    inputs, gemma = _inputs("partial_norm", torch.float64, generator)
    del inputs["dq"], inputs["dk"]
    q, k = inputs.pop("q")[:1, :2], inputs.pop("k")[:1, :2]
    inputs["cos"], inputs["sin"] = inputs["cos"][:, :2], inputs["sin"][:, :2]
    leaves = [t.detach().requires_grad_() for t in (q, k)]
    assert torch.autograd.gradcheck(lambda a, b: rope(a, b, **inputs, gemma=gemma), leaves)


def test_norm_backward_asks_for_its_inputs(generator):
    inputs, _ = _inputs("qwen3", torch.float32, generator)
    del inputs["q"], inputs["k"]
    with pytest.raises(ValueError, match="q and k"):
        rope_backward(**inputs)
