"""linear_cross_entropy and token_log_probs against float64."""

import pytest
import torch

from tuneline.kernels.ops.cross_entropy import (
    label_log_probs,
    label_log_probs_reference,
    linear_cross_entropy,
    linear_cross_entropy_reference,
    token_log_probs,
    token_log_probs_reference,
)

SHAPES = {
    # name: (tokens, vocabulary, hidden, softcap, chunk)
    "one_token": (1, 37, 8, None, None),
    "softcap": (47, 1000, 16, 30.0, 16),
    "odd_chunks": (33, 519, 16, None, 10),
    "several_blocks": (3, 20001, 8, 5.0, None),
}


def _inputs(name, dtype, generator):
    T, V, K, softcap, chunk = SHAPES[name]
    hidden = torch.randn(T, K, generator=generator, device=generator.device).to(dtype)
    weight = (2 * torch.randn(V, K, generator=generator, device=generator.device)).to(dtype)
    labels = torch.randint(V, (T,), generator=generator, device=generator.device)
    labels[1::3] = -100
    return hidden, weight, labels, softcap, chunk


def _run(function, hidden, weight, train_weight, upstream=None, **kwargs):
    hidden = hidden.detach().clone().requires_grad_()
    weight = weight.detach().clone().requires_grad_(train_weight)
    out = function(hidden, weight, **kwargs)
    leaves = [hidden, weight] if train_weight else [hidden]
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


def _check(assert_near, ours, truth, stock, again):
    """Check the value to float32's accuracy of its logits, the gradients to one rounding."""
    for a, b, c, d in zip(ours, truth, stock, again, strict=True):
        assert torch.equal(a, d)
        assert_near(a, b, c)


@pytest.mark.parametrize("train_weight", [False, True], ids=["frozen_head", "trained_head"])
@pytest.mark.parametrize("name", SHAPES)
def test_loss_and_gradient(name, train_weight, dtype, generator, assert_near):
    hidden, weight, labels, softcap, chunk = _inputs(name, dtype, generator)
    kwargs = dict(labels=labels, softcap=softcap)
    wide = hidden.double(), weight.double(), train_weight
    narrow = hidden, weight, train_weight
    ours = _run(linear_cross_entropy, *narrow, chunk_tokens=chunk, **kwargs)
    again = _run(linear_cross_entropy, *narrow, chunk_tokens=chunk, **kwargs)
    truth = _run(linear_cross_entropy_reference, *wide, **kwargs)
    stock = _run(linear_cross_entropy_reference, *narrow, **kwargs)
    _check(assert_near, ours, truth, stock, again)


@pytest.mark.parametrize("name", ["softcap", "odd_chunks"])
def test_token_log_probs_with_any_upstream_gradient(name, dtype, generator, assert_near):
    hidden, weight, labels, softcap, chunk = _inputs(name, dtype, generator)
    upstream = torch.randn(labels.shape, generator=generator, device=generator.device)
    kwargs = dict(labels=labels, softcap=softcap)
    ours = _run(token_log_probs, hidden, weight, False, upstream, chunk_tokens=chunk, **kwargs)
    again = _run(token_log_probs, hidden, weight, False, upstream, chunk_tokens=chunk, **kwargs)
    wide = hidden.double(), weight.double(), False, upstream.double()
    truth = _run(token_log_probs_reference, *wide, **kwargs)
    stock = _run(token_log_probs_reference, hidden, weight, False, upstream, **kwargs)
    _check(assert_near, ours, truth, stock, again)
    assert (ours[0][labels == -100] == 0).all()
    assert (ours[1][labels == -100] == 0).all()


def test_equals_torch_cross_entropy(generator, assert_near):
    hidden, weight, labels, _, chunk = _inputs("odd_chunks", torch.float32, generator)
    loss = linear_cross_entropy(hidden, weight, labels, chunk_tokens=chunk)
    truth = torch.nn.functional.cross_entropy(hidden.double() @ weight.double().T, labels)
    assert_near(loss, truth)


def test_num_items_and_ignore_index(generator):
    hidden, weight, labels, _, _ = _inputs("softcap", torch.float32, generator)
    mean = linear_cross_entropy(hidden, weight, labels)
    kept = (labels != -100).sum()
    half = linear_cross_entropy(hidden, weight, labels, num_items=2 * kept)
    other = linear_cross_entropy(
        hidden, weight, labels.masked_fill(labels == -100, 7), ignore_index=7, num_items=1
    )
    sevens = labels == 7
    logp = token_log_probs(hidden, weight, labels)
    assert torch.allclose(half, mean / 2, rtol=1e-6)
    assert torch.allclose(other, -logp[~sevens].sum(), rtol=1e-6)


@pytest.mark.parametrize("name", ["softcap", "odd_chunks"])
def test_a_known_number_of_labels_gives_the_same_loss_and_gradient(name, generator, assert_near):
    hidden, weight, labels, softcap, chunk = _inputs(name, torch.float32, generator)
    labels[-5:] = -100
    kwargs = dict(labels=labels, softcap=softcap, chunk_tokens=chunk)
    expected = _run(linear_cross_entropy, hidden, weight, False, **kwargs)
    count = int((labels != -100).sum())
    ours = _run(linear_cross_entropy, hidden, weight, False, num_labels=count, **kwargs)
    assert torch.allclose(ours[0], expected[0], rtol=1e-6)
    # Products of another number of rows: a CPU may sum them in another order.
    assert torch.allclose(ours[1], expected[1], rtol=1e-5, atol=1e-6)
    assert_near(ours[1], expected[1].double())
    assert (ours[1][labels == -100] == 0).all()
    nothing = dict(kwargs, labels=torch.full_like(labels, -100), num_labels=0)
    loss, grad = _run(linear_cross_entropy, hidden, weight, False, **nothing)
    assert loss == 0 and not grad.any()


def test_all_ignored_costs_nothing(generator):
    hidden, weight, labels, _, _ = _inputs("softcap", torch.float32, generator)
    hidden.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, torch.full_like(labels, -100))
    loss.backward()
    assert loss == 0
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))


def test_label_outside_the_vocabulary_is_nan(generator):
    hidden, weight, labels, _, _ = _inputs("one_token", torch.float32, generator)
    assert token_log_probs(hidden, weight, torch.full_like(labels, 37)).isnan().all()
    assert token_log_probs(hidden, weight, torch.full_like(labels, -1)).isnan().all()


def test_leading_dimensions_and_no_grad(generator):
    hidden, weight, labels, _, _ = _inputs("odd_chunks", torch.float32, generator)
    flat = token_log_probs(hidden, weight, labels)
    with torch.no_grad():
        shaped = token_log_probs(
            hidden.view(3, 11, 16).requires_grad_(), weight, labels.view(3, 11)
        )
    assert not shaped.requires_grad
    assert torch.equal(shaped.view(-1), flat)


def test_float64_gradient_is_exact(generator):
    hidden, weight, labels, _, _ = _inputs("odd_chunks", torch.float64, generator)
    leaf = hidden[:5].requires_grad_()
    for softcap in (None, 3.0):
        assert torch.autograd.gradcheck(
            lambda h, cap=softcap: token_log_probs(h, weight, labels[:5], softcap=cap), leaf
        )


@pytest.mark.filterwarnings("ignore:(invalid value|divide by zero):RuntimeWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_log_probs_of_labels_and_whether_they_are_the_first_largest(dtype, generator, assert_near):
    # More than one block, and rows with room between them as in padded logits.
    logits = torch.randn(9, 20011, generator=generator, device=generator.device).to(dtype)
    logits = logits[:, :20001]
    labels = torch.randint(20001, (9,), generator=generator, device=generator.device)
    # The largest, beside the last one; equal largest ones before and after the label; -inf
    # throughout the first block; the last token ID; outside the vocabulary; NaN; nothing but -inf.
    logits[0, labels[0]] = 9.0
    labels[1], labels[2], labels[4], labels[5] = 8191, 8192, 20000, 20001
    logits[1:3, 8191:8193] = 9.0
    logits[3, :8200] = -float("inf")
    logits[4, 20000] = 9.0
    logits[6, labels[6]], logits[6, 20000 - labels[6]] = 9.0, float("nan")
    logits[7] = -float("inf")
    found, is_first = label_log_probs(logits, labels)
    stock, stock_is_first = label_log_probs_reference(logits, labels)
    assert found.dtype == torch.float32 and is_first.dtype == torch.bool
    assert is_first.tolist() == [True, True, False, False, True, False, False, False, False]
    assert torch.equal(is_first, stock_is_first)
    usual = [0, 1, 2, 3, 4, 8]
    assert torch.equal(is_first[usual], (logits.cpu().argmax(-1) == labels.cpu())[usual])
    assert found.isnan().tolist() == stock.isnan().tolist() == [n in (5, 6, 7) for n in range(9)]
    truth = logits[usual].double().log_softmax(-1).gather(-1, labels[usual, None])[:, 0]
    finite = truth.isfinite()
    assert torch.equal(found[usual][~finite].double(), truth[~finite])
    assert_near(found[usual][finite], truth[finite], stock[usual][finite])
