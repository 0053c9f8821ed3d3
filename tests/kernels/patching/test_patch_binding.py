"""A patched model follows its adapters when they are changed, switched, disabled or merged."""

import copy

import pytest
import torch
from patch_cases import (
    FAMILIES,
    TARGETS,
    assert_same,
    batch,
    engine_of,
    fused_layers,
    make_model,
    step,
)
from peft import LoraConfig
from transformers import LlamaForCausalLM

from tuneline.kernels import binding, decisions, patching
from tuneline.kernels.ops.host_tables import HostHead
from tuneline.kernels.patching import patch, unpatch


def count_fused_layers(monkeypatch):
    """Return a list that gets an entry for every fused layer that runs."""
    calls = []

    def counted(*args):
        calls.append(args)
        return fused_layer(*args)

    fused_layer = patching.fused_layer
    monkeypatch.setattr(patching, "fused_layer", counted)
    return calls


@pytest.mark.parametrize("family", ["llama_tied_bias", "qwen3", "gemma3"])
def test_the_reference_is_the_policy_bit_for_bit_while_b_is_zero(family, monkeypatch, interpreted):
    model = make_model(family, dtype=torch.float32)
    patch(model, budget="lean")
    calls = count_fused_layers(monkeypatch)
    inputs = {"input_ids": batch(1, 5)["input_ids"], "use_cache": False}
    policy = model(**inputs).logits
    with torch.no_grad(), model.disable_adapter():
        reference = model(**inputs).logits
        unpatch(model)
        torch.testing.assert_close(reference, model(**inputs).logits, rtol=1e-4, atol=1e-5)
    assert len(calls) == 4 and not reference.requires_grad
    assert not torch.equal(policy, reference)
    patch(model, budget="lean")
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    assert torch.equal(model(**inputs).logits, reference)
    assert len(calls) == 6


def test_layers_are_bound_once_with_and_once_without_adapters(monkeypatch):
    model, bound = make_model(), []
    patch(model)
    monkeypatch.setattr(
        decisions, "bind_layer", lambda *args, **kwargs: bound.append(1) or bind(*args, **kwargs)
    )
    bind, inputs = binding.bind_layer, {**batch(), "use_cache": False}
    for _ in range(3):
        model(**inputs).loss.backward()
        with torch.no_grad(), model.disable_adapter():
            model(**inputs)
    assert len(bound) == 4


def test_layers_are_checked_in_each_forward_or_when_told():
    model = make_model()
    patch(model)
    engine = engine_of(model)
    step(model, batch())
    weights = engine.current[0]
    model.base_model.model.model.layers[0].self_attn.q_proj.scaling["default"] *= 2
    changed = step(model, batch())
    assert engine.current[0] is not weights
    patching.check_layers_once(model)
    checks = []
    with pytest.MonkeyPatch.context() as patched:
        fingerprint = decisions.fingerprint
        patched.setattr(
            decisions, "fingerprint", lambda *of: (checks.append(1), fingerprint(*of))[1]
        )
        for _ in range(3):
            assert_same(step(model, batch()), changed)
        assert len(checks) == 2
        patching.check_layers_once(model)
        step(model, batch())
        assert len(checks) == 4


def test_several_adapters_and_disabled_ones_take_the_stock_path():
    model = make_model()
    model.add_adapter("second", LoraConfig(r=2, target_modules=TARGETS))
    for name, parameter in model.named_parameters():
        if "lora_B.second" in name:
            parameter.data = 0.1 * torch.randn_like(parameter)
    patch(model)
    assert fused_layers(model) == 2
    with model.disable_adapter():
        base = model.get_base_model()(**batch()).loss
    model.base_model.set_adapter(["default", "second"])
    both = step(model, batch())
    unpatch(model)
    assert_same(both, step(model, batch()))
    with model.disable_adapter():
        stock = model.get_base_model()(**batch()).loss
        torch.testing.assert_close(base, stock, check_dtype=False)
    model.base_model.set_adapter("second")
    alone = step(model, batch())
    patch(model)
    assert fused_layers(model) == 2
    assert_same(step(model, batch()), alone)


def test_an_adapter_changed_between_forward_and_backward_is_refused():
    model = make_model()
    patch(model)
    loss = model(**batch()).loss
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_A" in n).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_copy_of_a_model_runs_fused_with_its_own_head():
    model = make_model()
    patch(model)
    head = model.get_base_model().lm_head
    # As `move_to_host` makes it of a head on a GPU.
    head.__class__, head._tuneline_device = HostHead, torch.device("cpu")
    engine_of(model).head = head
    want = step(model, batch())
    twin = copy.deepcopy(model)
    assert engine_of(twin).head is twin.get_base_model().lm_head is not head
    for parameter in model.parameters():
        parameter.data.zero_()
    assert fused_layers(twin) == 2
    assert_same(step(twin, batch()), want)


def test_saving_loading_merging_and_state_dict(tmp_path):
    model = make_model()
    keys = list(model.state_dict())
    patch(model)
    assert list(model.state_dict()) == keys
    assert isinstance(model.get_base_model(), LlamaForCausalLM)
    model.save_pretrained(tmp_path)
    want = step(model, batch())
    torch.manual_seed(7)
    fresh = LlamaForCausalLM(FAMILIES["llama"][1]).double()
    fresh.load_state_dict(
        {
            k.replace("base_model.model.", "").replace(".base_layer", ""): v
            for k, v in model.state_dict().items()
            if "lora_" not in k
        }
    )
    from peft import PeftModel

    loaded = PeftModel.from_pretrained(fresh, tmp_path, is_trainable=True).train()
    assert_same(step(loaded, batch()), want)
    model.merge_adapter()
    assert fused_layers(model) == 0
    torch.testing.assert_close(
        model(**batch()).loss, want[0], rtol=1e-5, atol=1e-6, check_dtype=False
    )
    model.unmerge_adapter()
    assert fused_layers(model) == 2
    merged = model.merge_and_unload().eval()
    torch.testing.assert_close(
        merged(**batch()).loss, want[0], rtol=1e-5, atol=1e-6, check_dtype=False
    )
