"""flash attention against float64: softcap, window, GQA, packed sequences of odd lengths."""

import math

import pytest
import torch

from tuneline.kernels.ops import flash
from tuneline.kernels.ops.attention import AttentionConfig, AttentionPlan, attention_reference
from tuneline.kernels.ops.flash import flash_backward, flash_forward

HEADS, KV_HEADS, SCALE = 4, 2, 0.3
CASES = {
    # name: (lengths of the sequences, head dimension, window, softcap)
    "packed": ((19, 1, 21), 24, None, 2.0),
    "packed_window": ((37, 9), 16, 7, 5.0),
    "no_softcap": ((33,), 16, None, None),
}

pytestmark = pytest.mark.usefixtures("poisoned", "small_tiles")


@pytest.fixture
def small_tiles(monkeypatch):
    """Shrink the tiles: several a sequence, and few masked positions to interpret."""
    small, wide = flash.Blocks(16, 16, 4, 2), flash.Blocks(16, 32, 4, 2)
    monkeypatch.setattr(flash, "_MIN_QUERIES", 8)
    monkeypatch.setattr(flash, "_forward_blocks", lambda head_dim, is_hopper: small)
    monkeypatch.setattr(flash, "_dq_blocks", lambda head_dim, is_hopper: wide)
    monkeypatch.setattr(flash, "_dkdv_blocks", lambda head_dim, is_hopper: wide)


def _inputs(case, dtype, generator):
    """Return q, k, v as slices of one fused projection, and a gradient of other strides."""
    lengths, head_dim, window, softcap = CASES[case]

    def randn(*size):
        x = torch.randn(*size, generator=generator, device=generator.device)
        return x.to(dtype)

    qkv = randn(sum(lengths), HEADS + 2 * KV_HEADS, head_dim)
    upstream = randn(HEADS, sum(lengths), head_dim).transpose(0, 1)
    heads = qkv.split([HEADS, KV_HEADS, KV_HEADS], 1)
    return lengths, heads, upstream, {"scale": SCALE, "window": window, "softcap": softcap}


def _bounds(lengths, device):
    return torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)


def _run(lengths, qkv, upstream, settings):
    """Return o, dq, dk, dv, and lse."""
    return _run_up_to(max(lengths), lengths, qkv, upstream, settings)


def _run_up_to(longest, lengths, qkv, upstream, settings):
    """Write into slices of wider rows, as a layer has it."""
    bounds = _bounds(lengths, upstream.device)
    T, H, D = qkv[0].shape
    o = qkv[0].new_empty(T, H * D + 16)[:, : H * D].view(T, H, D)
    lse = flash_forward(*qkv, bounds, longest, out=o, **settings)
    fused = qkv[0].new_empty(T, sum(x.shape[1] for x in qkv), D)
    grads = fused.split([x.shape[1] for x in qkv], 1)
    flash_backward(upstream, *qkv, o, lse, bounds, longest, out=grads, **settings)
    return [o, *grads, lse]


def _reference(lengths, qkv, upstream, settings, dtype):
    config = AttentionConfig(HEADS, KV_HEADS, qkv[0].shape[2], **settings)
    leaves = [x.to(dtype)[None].requires_grad_() for x in qkv]
    o = attention_reference(*leaves, AttentionPlan(sequence_lengths=lengths), config)
    grads = torch.autograd.grad(o, leaves, upstream.to(dtype)[None])
    return [x[0].detach() for x in (o, *grads)]


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(case, dtype, generator, assert_near):
    inputs = _inputs(case, dtype, generator)
    ours = _run(*inputs)
    again = _run(*inputs)
    truth = _reference(*inputs, torch.float64)
    stock = _reference(*inputs, dtype)
    for a, b, c in zip(ours[:4], truth, stock, strict=True):
        assert_near(a, b, c)
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))


@pytest.mark.parametrize("case", ["packed", "packed_window"])
def test_packed_sequences_have_the_bits_of_each_alone(case, dtype, generator):
    lengths, qkv, upstream, settings = _inputs(case, dtype, generator)
    packed = _run(lengths, qkv, upstream, settings)
    start = 0
    for length in lengths:
        part = slice(start, start + length)
        alone = _run((length,), [x[part] for x in qkv], upstream[part], settings)
        assert all(torch.equal(a, b[part]) for a, b in zip(alone[:4], packed[:4], strict=True))
        assert torch.equal(alone[4], packed[4][:, part])
        start += length


def test_one_token_attends_to_itself(generator):
    q, k, v, upstream = torch.randn(4, 1, 2, 16, generator=generator, device=generator.device)
    o, dq, dk, dv, lse = _run((1,), (q, k, v), upstream, {"scale": SCALE, "softcap": 2.0})
    capped = 2.0 * torch.tanh(SCALE * (q * k).sum(-1) / 2.0)
    torch.testing.assert_close(lse, capped.T * math.log2(math.e))
    assert torch.equal(o, v) and torch.equal(dv, upstream)
    # do . v less do . o: two sums of the same numbers, in two orders.
    assert max(dq.abs().max(), dk.abs().max()) < 1e-5


def test_a_longer_bound_changes_no_bit(generator):
    inputs = _inputs("packed_window", torch.float32, generator)
    longer = _run_up_to(10 * max(inputs[0]), *inputs)
    assert all(torch.equal(a, b) for a, b in zip(longer, _run(*inputs), strict=True))
