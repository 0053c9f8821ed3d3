"""Experts in NF4: loading, the forward pass, gradients, and adapters in peft's layout."""

import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from tiny_families import EXPERT_FAMILIES, save_experts

from tuneline.kernels.binding_experts import expert_stack
from tuneline.models import nf4
from tuneline.models.experts import (
    Stack,
    expert_modules,
    projections,
    quantized_experts,
    round_trip_experts,
)
from tuneline.models.experts import forward as experts_forward
from tuneline.models.experts.adapter import adapt_experts_in_nf4
from tuneline.models.experts.forward import dequantized_expert

TARGETS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
RANK = 4


@pytest.fixture(scope="module", params=EXPERT_FAMILIES)
def model_dir(request: Any, tmp_path_factory: Any) -> Path:
    return save_experts(request.param, tmp_path_factory.mktemp(request.param) / "model")


def load(directory: Path, *, quantized: bool, dtype: torch.dtype = torch.float32) -> Any:
    return nf4.load_base(directory, dtype=dtype, device="cpu", quantized=quantized)


def plain_copy(directory: Path) -> Any:
    """Return the unquantised model with the weights that the quantised one computes with."""
    model = load(directory, quantized=False)
    empty = nf4.empty_model(directory)
    stacks = quantized_experts(empty)
    layers = nf4.quantized_modules(empty)
    options: Any = {"dtype": torch.float32, "device": "cpu"}
    for name, parameter in model.named_parameters():
        if name in stacks:
            parameter.data = round_trip_experts(parameter.data, **options)
        elif name.removesuffix(".weight") in layers:
            parameter.data = nf4.round_trip(parameter.data, **options)
    return model


def adapted(model: Any) -> Any:
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=RANK,
        lora_alpha=8,
        target_modules=["o_proj"],
        target_parameters=TARGETS,
    )
    adapt_experts_in_nf4(config, model)
    model = peft.get_peft_model(model, config)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    return model


def tokens(rows: int = 2, length: int = 40) -> torch.Tensor:
    return torch.randint(3, 250, (rows, length), generator=torch.Generator().manual_seed(0))


def test_every_stack_of_experts_is_quantised(model_dir: Path) -> None:
    empty, model = nf4.empty_model(model_dir), load(model_dir, quantized=True)
    stacks = quantized_experts(empty)
    assert stacks == quantized_experts(model)
    shapes = {
        name: parameter for name, parameter in empty.named_parameters() if parameter.dim() == 3
    }
    assert set(stacks) == set(shapes) and stacks
    for name, stack in stacks.items():
        assert (stack.num_experts, stack.rows, stack.columns) == tuple(shapes[name].shape)
        packed = model.get_parameter(name)
        assert packed.dtype == torch.uint8 and not packed.requires_grad
        assert packed.numel() == stack.numel // 2


def test_a_loaded_expert_is_what_merge_computes(model_dir: Path) -> None:
    plain = load(model_dir, quantized=False)
    model = load(model_dir, quantized=True, dtype=torch.bfloat16)
    for name, stack in quantized_experts(model).items():
        module, _, projection = name.rpartition(".")
        packed = expert_stack(model.get_submodule(module), projection, torch.float32)
        weight = plain.get_parameter(name).data
        merged = round_trip_experts(weight, dtype=torch.bfloat16, device="cpu")
        for number in range(stack.num_experts):
            ours = dequantized_expert(packed, number)
            ours = ours.T if stack.is_transposed else ours
            assert torch.equal(ours, merged[number])
            one = round_trip_experts(weight[number], dtype=torch.bfloat16, device="cpu")
            assert torch.equal(ours, one)
            error = float((ours - weight[number]).norm() / weight[number].norm())
            assert 0.05 < error < 0.15


def test_logits_equal_those_of_the_dequantised_model(model_dir: Path) -> None:
    with torch.no_grad():
        ours = load(model_dir, quantized=True)(tokens()).logits
        theirs = plain_copy(model_dir)(tokens()).logits
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-5)


def test_gradients_equal_those_of_peft_on_the_dequantised_model(
    model_dir: Path, tmp_path: Path
) -> None:
    ours = adapted(load(model_dir, quantized=True))
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(plain_copy(model_dir), tmp_path, is_trainable=True)
    losses = [model(input_ids=tokens(), labels=tokens()).loss for model in (ours, theirs)]
    assert torch.allclose(*losses, rtol=1e-6)
    for loss in losses:
        loss.backward()
    expected = {n: p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    found = {n: p.grad for n, p in ours.named_parameters() if p.requires_grad}
    assert found.keys() == expected.keys()
    assert any("experts.base_layer.lora_A" in name for name in found)
    for name, gradient in found.items():
        assert gradient.dtype == torch.float32
        scale = float(expected[name].abs().max())
        assert scale > 0 and float((gradient - expected[name]).abs().max()) < 1e-4 * scale, name


def test_kernels_get_what_plain_torch_computes_with(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernels run their references here; tests/kernels compares them with these."""
    model = adapted(load(model_dir, quantized=True))
    calls = []

    def counted(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(args)
        return experts_mlp(*args, **kwargs)

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        loss = model(input_ids=tokens(), labels=tokens()).loss
        loss.backward()
        found = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
        return {"loss": loss.detach(), **found}

    experts_mlp = experts_forward.experts_mlp
    monkeypatch.setattr(experts_forward, "experts_mlp", counted)
    expected = gradients()
    assert not calls
    experts_forward.use_kernels(model)
    for name in [name for name in sys.modules if name.startswith("tuneline.kernels.")]:
        if hasattr(sys.modules[name], "use_kernel"):
            monkeypatch.setattr(sys.modules[name], "use_kernel", lambda x: False)
    found = gradients()
    assert calls
    for name, value in expected.items():
        scale = float(value.abs().max())
        assert scale > 0 and float((found[name] - value).abs().max()) < 1e-4 * scale, name


def test_the_saved_adapter_gives_the_same_logits_in_plain_peft(
    model_dir: Path, tmp_path: Path
) -> None:
    ours = adapted(load(model_dir, quantized=True)).eval()
    ours.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    for name, stack in quantized_experts(nf4.empty_model(model_dir)).items():
        module = name.rpartition(".")[0]
        inner = ".base_layer" if name.endswith("gate_up_proj") else ""
        prefix = f"base_model.model.{module}{inner}"
        rows = stack.num_experts * RANK
        assert saved[f"{prefix}.lora_A.weight"].shape == (rows, stack.in_features)
        assert saved[f"{prefix}.lora_B.weight"].shape == (stack.out_features, rows)
    theirs = peft.PeftModel.from_pretrained(plain_copy(model_dir), tmp_path).eval()
    with torch.no_grad():
        assert torch.allclose(ours(tokens()).logits, theirs(tokens()).logits, atol=1e-5)
        with ours.disable_adapter(), theirs.disable_adapter():
            assert torch.allclose(ours(tokens()).logits, theirs(tokens()).logits, atol=1e-5)


def test_a_cast_of_the_whole_model_leaves_the_experts_as_they_are(tmp_path: Path) -> None:
    model = load(save_experts("Qwen3-MoE", tmp_path / "model"), quantized=True)
    module = next(iter(expert_modules(model).values()))
    before = dequantized_expert(expert_stack(module, "down_proj", torch.float32), 1)
    # As DeepSpeed casts a model to bfloat16. `to` of a quantised model is refused.
    torch.nn.Module.bfloat16(module)
    after = dequantized_expert(expert_stack(module, "down_proj", torch.float32), 1)
    assert torch.equal(after, before)


def test_experts_are_in_the_state_of_their_module(tmp_path: Path) -> None:
    model = load(save_experts("gpt-oss", tmp_path / "model"), quantized=True)
    first, second = expert_modules(model).values()
    second.load_state_dict(first.state_dict())
    for number in range(4):
        weights = [
            dequantized_expert(expert_stack(module, "gate_up_proj", torch.float32), number)
            for module in (first, second)
        ]
        assert torch.equal(*weights) and weights[0].any()


def test_rows_of_a_batch_and_experts_without_rows_do_not_matter(tmp_path: Path) -> None:
    model = load(save_experts("Qwen3-MoE", tmp_path / "model"), quantized=True)
    with torch.no_grad():
        one = model(tokens(rows=1, length=1)).logits
        many = model(tokens(rows=1, length=1).repeat(3, 1)).logits
    assert torch.allclose(one.expand_as(many), many, atol=1e-5)


def test_projections_and_features_of_a_transposed_stack() -> None:
    stack = Stack(num_experts=2, rows=3, columns=5, is_transposed=True)
    assert (stack.in_features, stack.out_features, stack.numel) == (3, 5, 30)
    module: Any = torch.nn.Module()
    module.has_gate = False
    assert projections(module) == ("up_proj", "down_proj")
