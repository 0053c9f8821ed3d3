"""What lora.target_modules reaches in each family, and that plain peft loads the adapter."""

from pathlib import Path

import peft
import pytest
import torch
from small_records import new_origin
from tiny_families import FAMILIES, new_model
from transformers import AutoModelForCausalLM, HrmTextConfig, HrmTextForCausalLM

from tuneline.errors import ModelError
from tuneline.models.linear_layers import short_names
from tuneline.train.config import LoraConfig
from tuneline.train.model.adapter import save_adapter
from tuneline.train.model.targets import (
    adapted_modules,
    attach_to_the_rest,
    check_targets,
    lora_config,
)

ATTENTION = {f"self_attn.{name}_proj" for name in "qkvo"}
MLP = {f"mlp.{name}_proj" for name in ("gate", "up", "down")}
DENSE = ATTENTION | MLP
LATENT = {f"self_attn.{name}" for name in ("kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "q_proj")}
GATED_DELTA = {f"linear_attn.{name}" for name in ("in_proj_qkv", "in_proj_z", "out_proj")}
GATED_DELTA |= {"linear_attn.in_proj_a", "linear_attn.in_proj_b"}


def shared(name: str) -> set[str]:
    return {f"{name}.{each}_proj" for each in ("gate", "up", "down")}


REACHED = {
    **dict.fromkeys(
        (
            *("Llama 3", "Yi", "Mistral", "Ministral 3", "Qwen2", "Qwen3", "Gemma 2", "Gemma 3"),
            *("SmolLM3", "Granite", "OLMo 3", "Cohere 2"),
        ),
        DENSE,
    ),
    "Phi-3": {"self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"},
    "GLM-4": ATTENTION | {"mlp.gate_up_proj", "mlp.down_proj"},
    "Qwen3.5": DENSE | GATED_DELTA,
    "Qwen3-Next": ATTENTION
    | shared("shared_expert")
    | {f"linear_attn.{name}" for name in ("in_proj_ba", "in_proj_qkvz", "out_proj")},
    "Qwen3.5-MoE": ATTENTION | shared("shared_expert") | GATED_DELTA,
    **dict.fromkeys(("Mixtral", "Phi-3.5-MoE", "Qwen3-MoE", "gpt-oss"), ATTENTION),
    "Qwen2-MoE": ATTENTION | shared("shared_expert"),
    "DeepSeek V2": LATENT | MLP | shared("shared_experts"),
    "DeepSeek V3": (LATENT - {"self_attn.q_proj"})
    | {"self_attn.q_a_proj", "self_attn.q_b_proj"}
    | MLP
    | shared("shared_experts"),
    "GLM-4-MoE": DENSE | shared("shared_experts"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_auto_reaches_attention_mlps_and_shared_experts(family: str) -> None:
    with torch.device("meta"):
        model = new_model(FAMILIES[family], vocab_size=128)
    modules = adapted_modules(model, LoraConfig())
    assert {".".join(name.split(".")[-2:]) for name in modules} == REACHED[family]
    # By name, and all linear layers: only routers of shared experts are reached beyond these.
    last = {name.rpartition(".")[2] for name in modules}
    named = LoraConfig(target_modules=tuple(sorted(last)))
    assert set(adapted_modules(model, named)) == set(modules)
    beyond = set(adapted_modules(model, LoraConfig(target_modules="all-linear"))) - set(modules)
    assert all(name.endswith("shared_expert_gate") for name in beyond)


def test_a_dense_model_gets_the_seven_names() -> None:
    names = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    model = new_model(FAMILIES["Llama 3"], vocab_size=128)
    assert sorted(lora_config(LoraConfig(), model).target_modules or ()) == names


def test_names_are_as_short_as_they_can_be() -> None:
    model = new_model(FAMILIES["DeepSeek V2"], vocab_size=128)
    dense = ["model.layers.0.mlp.down_proj"]
    shared_expert = ["model.layers.1.mlp.shared_experts.down_proj"]
    assert short_names(model, dense + shared_expert) == ["down_proj"]
    assert short_names(model, dense) == ["mlp.down_proj"]
    assert short_names(model, shared_expert) == ["shared_experts.down_proj"]
    first = ["model.layers.0.self_attn.o_proj"]
    assert short_names(model, first) == ["0.self_attn.o_proj"]


@pytest.mark.parametrize("targets", ["auto", ("down_proj",)])
@pytest.mark.parametrize("family", ["DeepSeek V2", "Qwen2-MoE", "GLM-4-MoE"])
def test_plain_peft_loads_an_adapter_on_shared_experts(
    tmp_path: Path, family: str, targets: str | tuple[str, ...]
) -> None:
    lora = LoraConfig(r=4, target_modules=targets, lora_dropout=0.1)  # type: ignore[arg-type]
    model = new_model(FAMILIES[family], vocab_size=128)
    model.save_pretrained(tmp_path / "base")
    modules = adapted_modules(model, lora)
    adapted = peft.get_peft_model(model, lora_config(lora, model))
    attach_to_the_rest(adapted, modules)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        ours = adapted.eval()(input_ids=ids).logits
        with adapted.disable_adapter():
            without = adapted(input_ids=ids).logits
    save_adapter(adapted, tmp_path / "adapter", new_origin())
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    loaded = peft.PeftModel.from_pretrained(plain, str(tmp_path / "adapter"))
    with torch.no_grad():
        theirs = loaded.eval()(input_ids=ids).logits
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert (ours - without).abs().max() > 0.1


def test_names_of_experts_are_refused_with_the_way_out(tmp_path: Path) -> None:
    new_model(FAMILIES["Mixtral"], vocab_size=128).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"names 'gate_proj'.*to auto, and lora.experts to true"):
        check_targets(LoraConfig(target_modules=("q_proj", "gate_proj")), tmp_path)


def test_what_is_reached_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    new_model(FAMILIES["gpt-oss"], vocab_size=128).save_pretrained(tmp_path)
    with caplog.at_level("INFO"):
        check_targets(LoraConfig(target_modules="all-linear"), tmp_path)
    assert (
        "the adapter is on 8 linear layers (2 q_proj, 2 k_proj, 2 v_proj, 2 o_proj); without an "
        "adapter: the routed experts"
    ) in caplog.text


def test_weights_that_files_join_cannot_be_merged(tmp_path: Path) -> None:
    config = HrmTextConfig(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, head_dim=32,
    )  # fmt: skip
    HrmTextForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"_proj' cannot be merged, because this layer has a wei"):
        check_targets(LoraConfig(), tmp_path)
