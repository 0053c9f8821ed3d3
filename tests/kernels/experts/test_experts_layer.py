"""The patched model with routed experts in NF4, against the stock layers on the same weights."""

import peft
import pytest
import torch
from tiny_families import save_experts

from tuneline.kernels.patching import patch, unpatch
from tuneline.models import nf4
from tuneline.models.experts.adapter import adapt_experts_in_nf4

TARGETS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@pytest.fixture(params=["Mixtral", "Qwen3-MoE"])
def model(request, tmp_path, references):
    """Return a model in NF4 whose adapters are away from their init, with an auxiliary loss."""
    # On a CPU, bitsandbytes needs rows of a multiple of 64 weights.
    dense = {"mlp_only_layers": [0], "intermediate_size": 128}
    settings = dense if request.param == "Qwen3-MoE" else {}
    directory = save_experts(
        request.param, tmp_path / "model", num_hidden_layers=3, router_aux_loss_coef=0.5, **settings
    )
    model = nf4.load_base(directory, dtype=torch.float32, device="cpu", quantized=True)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        target_parameters=TARGETS,
    )
    adapt_experts_in_nf4(config, model)
    model = peft.get_peft_model(model, config)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    return model.train()


def batch(length=40, rows=2):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 250, (rows, length), generator=generator)
    labels = ids.clone()
    labels[:, :5] = -100
    return {"input_ids": ids, "labels": labels}


def step(model, inputs):
    model.zero_grad(set_to_none=True)
    output = model(**inputs)
    output.loss.backward()
    return output, {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


def assert_same(ours, theirs, tolerance=2e-4):
    (output, gradients), (stock, expected) = ours, theirs
    torch.testing.assert_close(output.loss, stock.loss, rtol=1e-5, atol=0)
    assert gradients.keys() == expected.keys()
    assert any("experts.base_layer.lora_B" in name for name in gradients)
    for name, gradient in gradients.items():
        error = (gradient - expected[name]).norm() / expected[name].norm()
        assert error < tolerance, name


@pytest.mark.parametrize("budget", ["lean", "auto"])
@pytest.mark.parametrize("auxiliary", [False, True])
def test_a_step_equals_the_stock_step(model, budget, auxiliary):
    inputs = batch() | {"output_router_logits": auxiliary}
    theirs = step(model, inputs)
    report = patch(model, budget=budget)
    assert report.fused == (0, 1, 2), report
    assert report.loss == "fused"
    ours = step(model, inputs)
    assert ours[0].logits is None
    if auxiliary:
        torch.testing.assert_close(ours[0].aux_loss, theirs[0].aux_loss)
    assert_same(ours, theirs)
    unpatch(model)
    assert_same(step(model, inputs), theirs, tolerance=1e-6)


def test_the_auxiliary_loss_changes_the_gradients(model):
    patch(model, budget="lean")
    _, without = step(model, batch() | {"output_router_logits": False})
    _, with_it = step(model, batch() | {"output_router_logits": True})
    # The last router's logits reach only what comes before it.
    name = next(name for name in without if "q_proj.lora_B" in name)
    assert (with_it[name] - without[name]).norm() > 1e-3 * without[name].norm()


def test_packed_sequences_equal_separate_ones(model):
    inputs = batch(length=24)
    patch(model, budget="lean")
    theirs = step(model, inputs)
    packed = {
        "input_ids": inputs["input_ids"].view(1, -1),
        "labels": inputs["labels"].view(1, -1),
        "position_ids": torch.arange(24).repeat(2)[None],
    }
    assert_same(step(model, packed), theirs)


def test_adapters_that_are_off_leave_the_fused_base(model):
    inputs = {**batch(), "use_cache": False}
    with model.disable_adapter(), torch.no_grad():
        stock = model(**inputs).loss
    patch(model, budget="lean")
    with model.disable_adapter(), torch.no_grad():
        off = model(**inputs)
    torch.testing.assert_close(off.loss, stock)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    policy = model(input_ids=inputs["input_ids"], use_cache=False)
    assert torch.equal(policy.logits, off.logits)


def test_a_trained_router_runs_the_stock_layers(model):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or name.endswith("gate.weight"))
    report = patch(model, budget="lean")
    assert report.unfused
    assert "the router is trained" in str(report)
