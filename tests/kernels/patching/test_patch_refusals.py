"""What cannot be fused runs as transformers and PEFT compute it, and the report has the reason."""

import re

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from patch_cases import assert_same, batch, fused_layers, make_model, step

from tuneline.kernels import binding, binding_adapter, spec
from tuneline.kernels.ops.host_tables import HostEmbedding
from tuneline.kernels.patching import patch, unpatch


@pytest.mark.parametrize(
    ("lora", "reason"),
    [
        ({"lora_dropout": 0.5}, "lora_dropout=0.5"),
        ({"use_dora": True}, "variant"),
        ({"lora_bias": True}, "lora_bias"),
    ],
)
def test_other_adapters_fall_back_with_a_reason_and_the_right_numbers(lora, reason):
    model = make_model(**lora)
    torch.manual_seed(5)
    want = step(model, batch())
    report = patch(model)
    assert report.fused == () and all(reason in why for why in report.unfused.values())
    torch.manual_seed(5)
    assert_same(step(model, batch()), want)


@pytest.mark.parametrize(
    "name", ["attention_dropout", "resid_pdrop", "embd_pdrop", "hidden_dropout"]
)
def test_any_dropout_of_the_config_keeps_the_layers_stock(name):
    for value, fused in ((0.0, (0, 1)), (None, (0, 1)), (0.1, ())):
        model = make_model()
        setattr(model.get_base_model().config, name, value)
        report = patch(model)
        assert report.fused == fused
        reason = f"config.{name}=0.1: only 0 is fused"
        assert report.unfused == ({} if fused else dict.fromkeys((0, 1), reason))


PARTS = ["input_layernorm", "self_attn", "self_attn.o_proj", "mlp.up_proj", "self_attn.scaling"]


@pytest.mark.parametrize("part", PARTS)
def test_an_entry_of_the_table_that_describes_another_layer_is_no_error(part):
    model = make_model()
    owner, _, name = ("layers.0." + part).rpartition(".")
    layer = model.get_base_model().model.layers[0]
    stock = type(layer)
    delattr(model.get_base_model().model.get_submodule(owner), name)
    named = "self_attn.q_proj" if part == "self_attn" else part
    reason = f"LlamaDecoderLayer has no {named}: its entry in the table of families (spec.py)"
    with pytest.raises(binding_adapter.Unfusable, match=re.escape(reason)):
        binding.check_parts(layer, spec.family_spec(layer))
    report = patch(model)
    assert report.fused == (1,) and report.unfused[0].startswith(reason)
    assert type(layer) is stock


def test_a_layer_that_cannot_be_fused_stays_stock_beside_fused_ones():
    # Without use_cache=False the stock model makes a cache, and then sees no packing.
    positions = torch.cat([torch.arange(4), torch.arange(6)])[None]
    packed = {**batch(1, 10), "use_cache": False, "position_ids": positions}
    model = make_model()
    norm = model.get_base_model().model.layers[0].input_layernorm
    norm.weight.requires_grad_(True)
    want = step(model, packed)
    report = patch(model)
    assert report.fused == (1,) and "norm" in report.unfused[0]
    assert fused_layers(model) == 1
    got = step(model, packed)
    assert "base_model.model.model.layers.0.input_layernorm.weight" in got[1]
    assert_same(got, want)
    norm.weight.requires_grad_(False)
    assert fused_layers(model) == 2


@pytest.mark.parametrize(
    "part",
    ["", "self_attn", "mlp", "self_attn.q_proj", "mlp.up_proj.base_layer"],
)
def test_a_layer_with_a_replaced_forward_stays_stock(part):
    # As accelerate replaces it in a model that is on several devices.
    model = make_model()
    packed = {**batch(1, 10), "use_cache": False}
    packed["position_ids"] = torch.cat([torch.arange(4), torch.arange(6)])[None]
    want = step(model, packed)
    layer = model.get_base_model().model.layers[0]
    module = layer.get_submodule(part)
    add_hook_to_module(module, ModelHook())
    report = patch(model)
    assert report.fused == (1,) and "forward has been replaced" in report.unfused[0]
    assert_same(step(model, packed), want)
    if part:
        # The next forward notices either change.
        remove_hook_from_module(module)
        del module.forward
        assert fused_layers(model) == 2
        add_hook_to_module(module, ModelHook())
        assert fused_layers(model) == 1


def test_the_device_of_a_model_is_where_it_computes():
    model = make_model()
    patch(model)
    causal = model.get_base_model()
    assert causal.device == torch.device("cpu")
    # The first parameter, whose device transformers takes, is then in host memory.
    embedding = causal.get_input_embeddings()
    embedding.__class__, embedding._tuneline_device = HostEmbedding, torch.device("meta")
    assert causal.device == model.device == torch.device("meta")
    embedding._tuneline_device = torch.device("cpu")
    unpatch(model)
    assert causal.device == next(model.parameters()).device


def test_tables_that_stay_where_they_are_are_told(caplog):
    model = make_model()
    patch(model, tables_on_host=True)
    assert "tables_on_host=True: the input embedding is on cpu" in caplog.text
    assert "tables_on_host=True: the head is on cpu" in caplog.text
    unpatch(model)
    assert type(model.get_input_embeddings()) is torch.nn.Embedding
    patch(torch.nn.Linear(2, 2), tables_on_host=True)
    assert "tables_on_host=True: no table moves, because no layer can be fused" in caplog.text


def test_bad_budget_and_unknown_model():
    model = make_model()
    with pytest.raises(ValueError, match="'auto', 'lean' or a number"):
        patch(model, budget="much")
    with pytest.raises(ValueError, match="-1"):
        patch(model, budget=-1)
    report = patch(torch.nn.Linear(2, 2))
    assert report.fused == () and "lm_head is a NoneType" in report.loss
