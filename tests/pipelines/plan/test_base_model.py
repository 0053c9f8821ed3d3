"""plan: what config.json says of a base model, before fetch and quantize would find it."""

import csv
import functools
import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from plan_cases import (
    attention,
    ends,
    facts_of,
    files_of,
    header,
    llama_8b,
    mlp,
    qwen3_30b_a3b,
    recipe,
    write,
)
from tiny_families import FAMILIES, new_model

from tuneline.gpu_profiles import GPU_PROFILES
from tuneline.pipelines.plan.base_model import read_base_model
from tuneline.pipelines.plan.check import Check
from tuneline.pipelines.plan.estimate import (
    RECOMPUTE_SLOWDOWN,
    UNFUSED_EXPERTS_SLOWDOWN,
    estimate,
)
from tuneline.pipelines.plan.model_facts import ModelFacts, model_facts
from tuneline.pipelines.plan.model_files import read_model
from tuneline.pipelines.plan.plan import plan
from tuneline.quantize.formats import FORMATS
from tuneline.train.config import LoraConfig
from tuneline.train.memory.shape import model_shape

RESULTS = Path(__file__).parents[3] / "kernels/benchmarks/results/scaled_step_h100.csv"


def checks_of(path: Path, config: dict[str, Any], *assignments: str) -> list[Check]:
    """Return the checks of a model with a config.json and the tensors of a small Llama."""
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 8}
    shapes = attention(0, 8, 8, 8) | mlp("model.layers.0.mlp", 8, 16) | ends(8, 8)
    source = write(path, files_of({**sizes, **config}, shapes))
    loaded = recipe(f"base_model={source}", *assignments)
    return plan(loaded, model=read_base_model(loaded))


@pytest.mark.parametrize("family", FAMILIES)
def test_plan_sees_the_shape_that_train_sees(family: str, tmp_path: Path) -> None:
    model = new_model(FAMILIES[family], vocab_size=128)
    model.save_pretrained(tmp_path)
    if family == "Qwen3.5-MoE":
        # It has no dense layers; the common sizes of the tiny families give it their width.
        settings = json.loads((tmp_path / "config.json").read_text())
        del settings["intermediate_size"]
        (tmp_path / "config.json").write_text(json.dumps(settings))
    lora = LoraConfig(r=4, experts=FAMILIES[family].has_experts)
    expected = model_shape(tmp_path, lora)
    found = model_facts(read_model(str(tmp_path))).shape(lora)
    assert expected is not None
    # Routers of two families have a buffer with a number per expert in the files.
    assert found.num_other - expected.num_other in (0, 4)
    assert replace(found, num_other=expected.num_other) == expected


def test_modules_that_are_trained_in_full_are_counted_as_train_does(tmp_path: Path) -> None:
    new_model(FAMILIES["Llama 3"], vocab_size=128).save_pretrained(tmp_path)
    lora = LoraConfig(modules_to_save=("lm_head", "embed_tokens", "k_proj"))
    found = model_facts(read_model(str(tmp_path))).shape(lora)
    assert found == model_shape(tmp_path, lora)


@pytest.mark.parametrize(
    ("quantization", "words"),
    [
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
            "its weights are in bitsandbytes nf4, and trained on as they are",
        ),
        ({"quant_method": "fp8"}, "its weights are in fp8, and converted to bfloat16 by fetch"),
        ({"quant_method": "mxfp4"}, "its weights are in mxfp4, and converted to bfloat16 by fetch"),
    ],
)
def test_quantised_weights_that_are_taken(
    quantization: dict[str, Any], words: str, tmp_path: Path
) -> None:
    checks = checks_of(tmp_path / "model", {"quantization_config": quantization})
    assert [check.verdict for check in checks if check.words == words] == ["ok"]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, "in a format (gptq) that tuneline nei"),
        ({"quantization_config": {"quant_method": "awq"}}, "in a format (awq) that tuneline neith"),
        ({"model_type": "mistral3", "text_config": {"model_type": "mistral"}}, "family (mistral3)"),
    ],
)
def test_a_base_that_fetch_would_refuse(config: dict[str, Any], words: str, tmp_path: Path) -> None:
    checks = checks_of(tmp_path / "model", config)
    (refusal,) = [check for check in checks if check.name == "base model"]
    assert refusal.verdict == "fail"
    assert words in refusal.words and "as base_model" in refusal.words


@pytest.mark.parametrize(
    ("config", "assignments", "words"),
    [
        ({"model_type": "qwen3_moe"}, [], "always normalises the weights of the experts"),
        ({"model_type": "phimoe"}, ["quantize.gguf=[]"], None),
        (
            {"model_type": "jetmoe", "architectures": ["JetMoeForCausalLM"]},
            [],
            "llama.cpp does not know its architecture (JetMoeForCausalLM)",
        ),
        ({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, [], None),
    ],
)
def test_a_base_that_cannot_be_exported(
    config: dict[str, Any], assignments: list[str], words: str | None, tmp_path: Path
) -> None:
    checks = checks_of(tmp_path / "model", config, *assignments)
    found = [check for check in checks if check.name == "exports"]
    assert [check.verdict for check in found] == ([] if words is None else ["fail"])
    assert words is None or words in found[0].words


@pytest.mark.parametrize("name", ["gptq-4bit", "awq", "fp8"])
def test_checkpoints_of_experts_are_refused(name: str, tmp_path: Path) -> None:
    kind = FORMATS[name].kind
    config, shapes = qwen3_30b_a3b()
    source = write(tmp_path / "model", files_of({**config, "norm_topk_prob": True}, shapes))
    loaded = recipe(f"base_model={source}", "quantize.gptq=[]", f'quantize.{kind}=["{name}"]')
    (found,) = [
        check for check in plan(loaded, model=read_base_model(loaded)) if check.name == "exports"
    ]
    assert found.verdict == "fail" and f"experts that {kind.upper()} has" in found.words
    assert found.advice == f"set quantize.{kind} to [], and export it as GGUF"


def test_awq_of_a_family_with_which_gptqmodel_fails(tmp_path: Path) -> None:
    assignments = ("quantize.gguf=[]", 'quantize.awq=["awq"]')
    (found,) = [
        check
        for check in checks_of(tmp_path / "model", {"model_type": "phi3"}, *assignments)
        if check.name == "exports"
    ]
    assert found.verdict == "fail" and "cannot be exported as AWQ: gptqmodel" in found.words
    assert found.advice == "set quantize.awq to [], and take gptq-4bit or fp8"


@pytest.mark.parametrize(
    ("profile", "warns"), [("a100-80g", True), ("l4", False), ("small", False)]
)
def test_a_gpu_without_fp8_is_told(profile: str, warns: bool, tmp_path: Path) -> None:
    assignments = (f"placement.profile={profile}", 'quantize.fp8=["fp8"]')
    found = [
        check
        for check in checks_of(tmp_path / "model", {"model_type": "llama"}, *assignments)
        if check.name == "exports"
    ]
    assert [check.verdict for check in found] == ["warn"] * warns
    assert not warns or "the profile a100-80g do not multiply FP8" in found[0].words


def test_the_text_model_of_gemma_3() -> None:
    """google/gemma-3-4b-it leaves the numbers of heads and of tokens to the class."""
    text = {"model_type": "gemma3_text", "hidden_size": 2560, "num_hidden_layers": 2}
    config = {"model_type": "gemma3", "text_config": text | {"intermediate_size": 10240}}
    shapes = {"language_model.model.embed_tokens.weight": (262208, 2560)}
    for layer in range(2):
        parts = attention(layer, 2560, 2048, 1024) | mlp(f"model.layers.{layer}.mlp", 2560, 10240)
        shapes |= {f"language_model.{name}": shape for name, shape in parts.items()}
    encoder = "vision_tower.vision_model.encoder.layers.5.self_attn.q_proj"
    shapes |= {f"{encoder}.weight": (1152, 1152), "multi_modal_projector.weight": (1152, 2560)}
    facts = facts_of(config, shapes)
    shape = facts.shape(LoraConfig(r=1))
    assert (shape.query, shape.key_value, shape.mlp) == (2048, 1024, 10240)
    assert (shape.num_layers, shape.vocab, shape.is_fused) == (2, 262208, True)
    assert shape.num_adapter == 2 * (2 * (2560 + 2048) + 2 * (2560 + 1024) + 3 * (2560 + 10240))
    # The encoder is loaded and not trained; that of Qwen3.5 is not even loaded.
    assert facts.num_parameters == sum(a * b for a, b in shapes.values())
    shapes["model.visual.blocks.0.attn.proj.weight"] = (9, 9)
    alone = facts_of({**config, "model_type": "qwen3_5"}, shapes)
    assert facts.num_parameters - alone.num_parameters == 1152 * 1152 + 1152 * 2560


@functools.cache
def qwen3_facts() -> ModelFacts:
    return facts_of(*qwen3_30b_a3b())


@functools.cache
def mixtral_8x7b() -> ModelFacts:
    config = {
        **{"model_type": "mixtral", "hidden_size": 4096, "num_hidden_layers": 32},
        **{"num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336},
        **{"num_local_experts": 8, "num_experts_per_tok": 2, "vocab_size": 32000},
    }
    shapes = ends(4096, 32000)
    for layer in range(32):
        shapes |= attention(layer, 4096, 4096, 1024)
        for expert in range(8):
            stem = f"model.layers.{layer}.block_sparse_moe.experts.{expert}"
            shapes |= mlp(stem, 4096, 14336)
    return facts_of(config, shapes)


@pytest.mark.parametrize(
    ("model", "mode", "tolerance"),
    [
        ("qwen3-30b-a3b", "lean", 0.01),
        ("qwen3-30b-a3b", "free", 0.01),
        ("qwen3-30b-a3b", "lean/attention", 0.01),
        ("qwen3-30b-a3b", "free/attention", 0.01),
        ("mixtral-8x7b", "lean", 0.06),
        ("mixtral-8x7b", "free", 0.06),
        ("mixtral-8x7b", "lean/attention", 0.06),
        ("mixtral-8x7b", "free/attention", 0.06),
    ],
)
def test_speeds_of_experts_are_the_measured_ones(
    model: str, mode: str, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    with RESULTS.open() as file:
        speeds = [
            float(row["tokens_per_second"])
            for row in csv.DictReader(file)
            if (row["engine"], row["model"], row["mode"]) == ("tuneline", model, mode)
        ]
    facts = qwen3_facts() if model.startswith("qwen") else mixtral_8x7b()
    # A GPU with room for no activations, and one with room for all.
    room = {"lean": 1.0, "free": 1000.0}[mode.partition("/")[0]]
    h100 = replace(GPU_PROFILES["h100"], gpu_memory_gib=room)
    monkeypatch.setitem(GPU_PROFILES, "h100", h100)
    experts = str("attention" not in mode).lower()
    loaded = recipe(
        "train.global_batch_size=4",
        "train.micro_batch_size=4",
        "prepare.max_seq_length=2048",
        f"train.lora.experts={experts}",
    )
    found = estimate(loaded, facts.num_parameters, facts)
    assert found.tokens_per_second == pytest.approx(statistics.median(speeds), rel=tolerance)
    assert found.speed_note == ""


def test_layers_that_are_not_fused_are_slower_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = recipe(profile="h100")
    config, shapes = llama_8b()
    stock = facts_of({**config, "model_type": "olmo3"}, shapes)
    found = estimate(loaded, stock.num_parameters, stock)
    assert found.tokens_per_second == pytest.approx(11_700 / RECOMPUTE_SLOWDOWN, rel=0.01)
    assert found.speed_note == (
        "roughly: kernels compute the loss of this family, transformers its layers"
    )
    assert found.gpu_bytes > estimate(loaded, 8.03e9).gpu_bytes
    # With memory for no activations, as the measured slowdown is of layers that recompute them.
    monkeypatch.setitem(GPU_PROFILES, "h100", replace(GPU_PROFILES["h100"], gpu_memory_gib=1.0))
    fused = qwen3_facts()
    rough = estimate(loaded, fused.num_parameters, replace(fused, is_fused=False))
    assert "experts and loss of this family" in rough.speed_note
    exact = estimate(loaded, fused.num_parameters, fused)
    ratio = (exact.tokens_per_second or 0) / (rough.tokens_per_second or 1)
    assert ratio == pytest.approx(UNFUSED_EXPERTS_SLOWDOWN, rel=0.01)
    layers = {f"model.layers.0.{name}.in_proj.weight": (8, 8) for name in ("linear_attn", "mixer")}
    for name, shape in layers.items():
        hybrid = facts_of(config, shapes | {name: shape})
        note = estimate(loaded, hybrid.num_parameters, hybrid).speed_note
        assert "linear attention was not measured" in note


def test_weights_that_cannot_be_read_do_not_hide_the_config(tmp_path: Path) -> None:
    path = tmp_path / "model-8b"
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": "qwen3_moe"}))
    (path / "pytorch_model.bin").write_bytes(header({}))
    loaded = recipe(f"base_model={path}")
    known = read_base_model(loaded)
    assert known.reason == "it has no model.safetensors" and known.facts is None
    assert "exports" in [check.name for check in plan(loaded, model=known)]
