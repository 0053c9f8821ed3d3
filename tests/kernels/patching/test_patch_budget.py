"""Whatever layers keep, offload or compute again, the bits are the same."""

import itertools

import pytest
import torch
from patch_cases import batch, engine_of, make_model, make_nf4_model, step
from peft import LoraConfig

from tuneline.kernels import decisions
from tuneline.kernels.decoder import operands
from tuneline.kernels.decoder.attention_half import Saved
from tuneline.kernels.decoder.budget import Kept, kept_bytes, normed_bytes, wide_bytes
from tuneline.kernels.decoder.layer import LayerCall
from tuneline.kernels.ops.lora import pack
from tuneline.kernels.ops.nf4 import dequantize_nf4
from tuneline.kernels.patching import patch


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_any_budget_gives_the_same_bits(family, interpreted):
    model = make_model(family, dtype=torch.float32)
    patch(model, budget="lean")
    loss, expected = step(model, batch(1, 5))
    engine = engine_of(model)
    assert engine.last_kept == Kept(0, 0)
    weights = [weights for states in engine.bound.values() for weights in states.values()]
    layer, normed = (max(size(w, 5, 4) for w in weights) for size in (kept_bytes, normed_bytes))
    wide = max(wide_bytes(w, 4) for w in weights)
    wanted = {
        1.5 * layer: Kept(1, 0),
        2 * layer + 0.5 * normed: Kept(2, 0),
        2 * layer + 1.5 * normed: Kept(2, 1),
        2 * layer + 2 * normed + 1.5 * wide: Kept(2, 2, 1 if wide else 0),
        2**30: Kept(2, 2, 2 if wide else 0),
    }
    for num_bytes, kept in wanted.items():
        patch(model, budget=num_bytes / 2**30)
        found, grads = step(model, batch(1, 5))
        assert engine_of(model).last_kept == kept
        assert torch.equal(found, loss)
        for name, grad in expected.items():
            assert torch.equal(grads[name], grad), name


@pytest.mark.parametrize("choice", list(itertools.product((False, True), repeat=3)))
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_whatever_waits_for_the_backward_gives_the_same_bits(family, choice, monkeypatch):
    model = make_model(family, dtype=torch.float32)
    patch(model, budget="lean")
    loss, expected = step(model, batch())
    seen = []

    def holding(*args, **kwargs):
        seen.append(LayerCall(*args, **{**kwargs, "holds": True, "waits": Saved(*choice)}))
        return seen[-1]

    monkeypatch.setattr(decisions, "LayerCall", holding)
    found, grads = step(model, batch())
    assert [call.saved for call in seen] == [Saved(*choice)] * 2
    assert torch.equal(found, loss)
    for name, grad in expected.items():
        assert torch.equal(grads[name], grad), name


@pytest.mark.parametrize("num_wide", [0, 1, 2])
def test_kept_weights_are_dequantised_once_and_give_the_same_bits(num_wide, monkeypatch):
    model = make_nf4_model()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)

    def two_steps():
        found = []
        for _ in range(2):
            found.append(step(model, batch(1, 5)))
            optimizer.step()
        return found

    start = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    patch(model, budget="lean")
    want = two_steps()
    with torch.no_grad():
        for name, value in start.items():
            model.get_parameter(name).copy_(value)
    engine = engine_of(model)
    weights = list(engine.current.values())
    stored = sum(2 * max(size(w, 5, 4) for w in weights) for size in (kept_bytes, normed_bytes))
    wide = max(wide_bytes(w, 4) for w in weights)
    patch(model, budget=(stored + (num_wide + 0.5) * wide) / 2**30)
    dequantised = []

    def counted(weight, **kwargs):
        dequantised.append(weight)
        return dequantize_nf4(weight, **kwargs)

    packed = []
    monkeypatch.setattr(operands, "dequantize_nf4", counted)
    monkeypatch.setattr(operands, "pack", lambda *args: (packed.append(args), pack(*args)))
    got = two_steps()
    assert engine_of(model).last_kept == Kept(2, 2, num_wide)
    # Seven linears per layer; without kept weights, one dequantisation per forward and backward.
    assert len(dequantised) == 7 * (num_wide + (2 - num_wide) * 4)
    # A kept weight has the adapters of the forward beside it, so a backward does not pack them.
    num_groups = sum(group.num_columns > 0 for group in weights[0].groups())
    assert len(packed) == num_groups * (2 * num_wide + (2 - num_wide) * 4)
    for (loss, grads), (want_loss, want_grads) in zip(got, want, strict=True):
        assert torch.equal(loss, want_loss)
        assert all(torch.equal(grads[name], grad) for name, grad in want_grads.items())
    assert not torch.equal(got[0][0], got[1][0])


def test_layers_that_are_all_kept_leave_the_stash_alone(monkeypatch):
    model = make_model(dtype=torch.float32)
    patch(model)
    # A layer that waited for copies of an earlier forward could not be captured in a graph.
    engine_of(model).stash = object()
    monkeypatch.setattr(decisions, "STASH_MIN_TOKENS", 1)
    calls = []
    monkeypatch.setattr(
        decisions, "LayerCall", lambda *a, **k: calls.append(LayerCall(*a, **k)) or calls[-1]
    )
    step(model, batch())
    assert engine_of(model).last_kept.num_layers == len(calls) == 2
    assert [(call.stash, call.fetches) for call in calls] == [(None, False)] * 2


def test_kept_fp8_weights_follow_every_change_of_the_adapters():
    """Two adapters in turn, no adapter, other shapes between and sums of gradients."""
    model = make_nf4_model()
    model.add_adapter("other", LoraConfig(r=4, target_modules=["q_proj", "o_proj", "down_proj"]))
    names = [name for name, _ in model.named_parameters() if "lora_" in name]
    torch.manual_seed(5)
    start = {name: 0.1 * torch.randn_like(model.get_parameter(name)) for name in names}

    def run():
        with torch.no_grad():
            for name, value in start.items():
                model.get_parameter(name).copy_(value)
        found = []
        turns = [("default", 1), ("default", 30), ("other", 1), ("default", 0.1), ("default", 2)]
        for adapter, factor in turns:
            model.set_adapter(adapter)
            with torch.no_grad():
                for name in names:
                    if f".{adapter}." in name:
                        # Not a multiple alone, whose bytes beside W8 and V8 may be the same.
                        parameter = model.get_parameter(name)
                        parameter.copy_(factor * parameter.roll(1, 0))
            outstanding = model(**batch(1, 7)).loss
            with torch.no_grad(), model.disable_adapter():
                found.append(model(**batch(1, 5)).logits)
            with torch.no_grad():
                found.append(model(**batch(2, 6)).logits)
            loss, grads = step(model, batch(1, 5))
            outstanding.backward()
            found += [loss, *grads.values()]
            found += [p.grad for p in model.parameters() if p.grad is not None]
        return found

    patch(model, budget="lean", fp8=True)
    want = run()
    patch(model, budget=1, fp8=True)
    got = run()
    engine = engine_of(model)
    assert engine.last_kept == Kept(2, 2, 2)
    groups = [group for weights in engine.current.values() for group in weights.groups()]
    assert sum(isinstance(group.place.arena, operands.Fp8Arena) for group in groups) == 6
    assert len(got) == len(want)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
