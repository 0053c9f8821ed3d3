"""The memory estimate against peaks measured on an H200, and against what torch really keeps."""

import dataclasses
import itertools
import sys

import pytest
import torch
import transformers
from random_weights import GPT_OSS_20B
from tiny_families import FAMILIES, new_model, save_experts

from tuneline.kernels.ops.host_tables import move_to_host
from tuneline.kernels.spec import is_fused_family
from tuneline.models.experts.forward import use_kernels
from tuneline.models.nf4 import load_base
from tuneline.pipelines.plan.model_facts import model_facts
from tuneline.pipelines.plan.model_files import read_model
from tuneline.train.config import LoraConfig
from tuneline.train.memory.estimate import (
    GIB,
    SCALED_EMBEDDINGS,
    WHOLE_SCORES,
    Settings,
    Shape,
    estimate_memory,
    movable_table_bytes,
)
from tuneline.train.memory.shape import model_shape
from tuneline.train.model.targets import adapted_modules, attach_to_the_rest, lora_config

LORA_SUMS = 2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336)
LLAMA_8B = Shape(
    num_layers=32,
    hidden=4096,
    query=4096,
    key_value=1024,
    mlp=14336,
    vocab=128256,
    num_quantized=32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336),
    num_other=2 * 128256 * 4096 + 65 * 4096,
    num_adapter=32 * 16 * LORA_SUMS,
    num_tables=2 * 128256 * 4096,
    num_copied=128256 * 4096,
)


# Rows, length, recompute, loss, fused, and the peak of torch's allocator in GiB as
# kernels/benchmarks/train_step.py measured it (kernels/benchmarks/results).
@pytest.mark.parametrize(
    ("rows", "length", "recompute", "loss", "fused", "optim", "measured"),
    [
        (4, 2048, False, "whole", False, "adamw_8bit", 62.36),
        (4, 2048, True, "whole", False, "adamw_8bit", 19.40),
        (2, 512, False, "whole", False, "adamw_8bit", 12.66),
        (1, 8192, True, "whole", False, "adamw_8bit", 19.40),
        (4, 2048, True, "tiled", True, "adamw_8bit", 7.34),
        (1, 8192, True, "tiled", True, "adamw_8bit", 7.37),
    ],
)
def test_estimate_is_within_a_tenth_of_the_measured_peak(
    rows, length, recompute, loss, fused, optim, measured
):
    settings = Settings(
        rows, length, recompute, quantized=True, itemsize=2, optim=optim, loss=loss, fused=fused
    )
    assert estimate_memory(LLAMA_8B, settings).total / GIB == pytest.approx(measured, rel=0.1)


def test_a_fused_projection_is_kept_beside_its_parts(tmp_path):
    from transformers import Phi3Config

    sizes = {"vocab_size": 32064, "hidden_size": 3072, "intermediate_size": 8192, "pad_token_id": 0}
    Phi3Config(**sizes).save_pretrained(tmp_path)
    shape = model_shape(tmp_path, LoraConfig())
    assert shape.fused_qkv == 3 * 3072
    settings = Settings(
        2, 2048, False, quantized=True, itemsize=2, optim="adamw_8bit", loss="tiled"
    )
    # On an H100: tests/measure/gpu/memory_on_gpu.py.
    assert estimate_memory(shape, settings).total / GIB == pytest.approx(20.32, rel=0.02)


@pytest.mark.parametrize(
    ("rows", "length", "fp8", "measured"),
    [(4, 2048, False, 46.97), (2, 512, False, 22.65), (4, 2048, True, 47.51)],
)
def test_estimate_knows_what_the_kernels_keep(rows, length, fp8, measured):
    settings = Settings(
        rows, length, True, quantized=True, itemsize=2, optim="adamw_8bit", fused=True, fp8=fp8,
        kept_bytes=60 * GIB,
    )  # fmt: skip
    assert estimate_memory(LLAMA_8B, settings).total / GIB == pytest.approx(measured, rel=0.05)


QWEN3_30B_A3B = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 8,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "tie_word_embeddings": False,
}
MIXTRAL_8X7B = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 2,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
}


# Peaks of torch's allocator on an H100 at 4 x 2048 tokens, r=16 on attention and, in some, on
# experts, as kernels/benchmarks/scaled_step.py measured them (kernels/benchmarks/results) before
# fused layers kept dequantised weights. In `lean` the benchmark holds the input embedding on the
# host; `stock` layers are transformers' own.
@pytest.mark.parametrize(
    ("family", "sizes", "mode", "experts", "measured"),
    [
        ("Qwen3Moe", QWEN3_30B_A3B, "lean", True, 5.71),
        ("Qwen3Moe", QWEN3_30B_A3B, "free", True, 9.30),
        ("Qwen3Moe", QWEN3_30B_A3B, "stock", True, 6.87),
        ("Qwen3Moe", QWEN3_30B_A3B, "lean", False, 4.77),
        ("Qwen3Moe", QWEN3_30B_A3B, "free", False, 8.62),
        ("Mixtral", MIXTRAL_8X7B, "lean", True, 5.70),
        ("Mixtral", MIXTRAL_8X7B, "free", True, 7.51),
        ("Mixtral", MIXTRAL_8X7B, "lean", False, 5.59),
        ("Mixtral", MIXTRAL_8X7B, "free", False, 7.40),
    ],
)
def test_estimate_of_experts_is_within_a_twentieth_of_the_measured_peak(
    tmp_path, monkeypatch, family, sizes, mode, experts, measured
):
    monkeypatch.setattr("tuneline.train.memory.estimate._wide_bytes", lambda *sizes: 0)
    getattr(transformers, f"{family}Config")(**sizes).save_pretrained(tmp_path)
    shape = model_shape(tmp_path, LoraConfig(experts=experts))
    assert shape.is_fused
    if mode == "stock":
        shape = dataclasses.replace(shape, is_fused=False)
    settings = Settings(
        4, 2048, True, quantized=True, itemsize=2, optim="adamw_8bit", fused=True,
        kept_bytes=60 * GIB if mode == "free" else 0,
    )  # fmt: skip
    host = 2 * sizes["vocab_size"] * sizes["hidden_size"] if mode == "lean" else 0
    found = estimate_memory(shape, settings).total - host
    assert found / GIB == pytest.approx(measured, rel=0.05)


def test_whole_matrices_of_scores_are_in_the_estimate(tmp_path):
    transformers.GptOssConfig(**GPT_OSS_20B).save_pretrained(tmp_path)
    settings = Settings(
        2, 2048, True, quantized=True, itemsize=2, optim="adamw_8bit", fused=True
    )  # fmt: skip
    estimate = estimate_memory(model_shape(tmp_path, LoraConfig()), settings)
    # On an H100: tests/measure/gpu/capped_on_gpu.py.
    assert estimate.total / GIB == pytest.approx(16.55, rel=0.01)


def test_attention_with_whole_matrices_holds_four_of_them_per_head():
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssAttention

    # Short heads beside long sequences: what is not as long as the square counts little.
    length, heads, dtype = 512, 4, torch.bfloat16
    sizes = {"num_attention_heads": heads, "num_key_value_heads": 2, "head_dim": 4}
    config = transformers.GptOssConfig(num_hidden_layers=1, hidden_size=32, **sizes)
    model = transformers.AutoModelForCausalLM.from_config(config)
    assert model.config.model_type in WHOLE_SCORES
    attention = model.model.layers[0].self_attn.requires_grad_(False).to(dtype)
    assert isinstance(attention, GptOssAttention)
    rotation = (torch.ones(1, length, 2, dtype=dtype), torch.zeros(1, length, 2, dtype=dtype))
    hidden = torch.ones(1, length, 32, dtype=dtype, requires_grad=True)
    mask = torch.zeros(1, 1, length, length, dtype=dtype)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        output, weights = attention(hidden, rotation, mask)
        del weights
        output.sum().backward()
    events = profile.profiler.kineto_results.events()
    allocated = list(itertools.accumulate(e.nbytes() for e in events if e.name() == "[memory]"))
    assert max(allocated) == pytest.approx(4 * 2 * heads * length**2, rel=0.05)


def test_layers_that_are_not_fused_take_what_they_take_without_kernels():
    settings = Settings(
        4, 2048, False, quantized=True, itemsize=2, optim="adamw_8bit", loss="tiled"
    )
    stock = dataclasses.replace(LLAMA_8B, is_fused=False)
    with_kernels = dataclasses.replace(settings, fused=True)
    assert estimate_memory(stock, with_kernels) == estimate_memory(LLAMA_8B, settings)


@pytest.mark.parametrize(
    ("changes", "chunk"),
    [
        ({}, 2048),
        # The forward of the reference has chunks of their usual size.
        ({"method": "dpo"}, 4096),
        ({"method": "kto"}, 4096),
        # Not without kernels, nor with ZeRO-2.
        ({"fused": False}, None),
        ({"num_ranks": 2}, None),
    ],
)
def test_tables_in_host_memory_are_copied_for_the_loss(changes, chunk):
    settings = Settings(
        1, 4096, True, quantized=True, itemsize=2, optim="adamw_8bit", fused=True
    )  # fmt: skip
    settings = dataclasses.replace(settings, **changes)
    on_device = estimate_memory(LLAMA_8B, settings)
    on_host = estimate_memory(LLAMA_8B, dataclasses.replace(settings, tables_on_host=True))
    table = 2 * 128256 * 4096 if chunk else 0
    assert movable_table_bytes(LLAMA_8B, settings) == 2 * table == on_host.tables
    assert on_device.weights - on_host.weights == 2 * table
    # Beside the copy the last layers' forward runs, which holds more than the loss: dequantised
    # weights of the MLP; gate, up and their product; four tensors of the size of the hidden states.
    tokens = 8192 if settings.method == "dpo" else 4096
    forward = 2 * (3 * 14336 * (4096 + (chunk or 0)) + 4 * tokens * 4096)
    assert forward > on_device.head
    assert on_host.head == (table + forward if chunk else on_device.head)
    assert (on_host.adapter, on_host.activations) == (on_device.adapter, on_device.activations)
    assert (on_host.total < on_device.total) == bool(chunk)


def test_tables_are_on_the_device_until_the_model_is_loaded():
    settings = Settings(
        1, 8, True, quantized=True, itemsize=2, optim="sgd", fused=True, tables_on_host=True
    )  # fmt: skip
    shape = dataclasses.replace(LLAMA_8B, num_adapter=0, mlp=1, num_copied=0)
    on_device = estimate_memory(shape, dataclasses.replace(settings, tables_on_host=False))
    assert estimate_memory(shape, settings).total == on_device.weights


FUSED_FAMILIES = [
    name for name, family in FAMILIES.items() if is_fused_family(family.stem.lower())
] + ["Qwen3-MoE"]


@pytest.mark.parametrize(
    ("name", "saved"),
    [
        *((name, ()) for name in FUSED_FAMILIES),
        ("Llama 3", ("lm_head",)),
        ("Mixtral", ("embed_tokens",)),
        ("Phi-3", ("embed_tokens", "lm_head")),
    ],
)
def test_the_tables_of_the_estimate_are_those_that_kernels_move(tmp_path, name, saved):
    model = new_model(FAMILIES[name], vocab_size=96).requires_grad_(False)
    tables = {
        "input embedding": model.get_input_embeddings().weight,
        "head": model.get_output_embeddings().weight,
    }
    model.save_pretrained(tmp_path)
    shapes = {
        "train": model_shape(tmp_path, LoraConfig(modules_to_save=saved)),
        "plan": model_facts(read_model(str(tmp_path))).shape(LoraConfig(modules_to_save=saved)),
    }
    for module in saved:
        table = tables[{"lm_head": "head", "embed_tokens": "input embedding"}[module]]
        table.requires_grad_(True)
    # Here nothing moves, but the reason is the last one: a table that could move is on a CPU.
    movable = [
        name
        for reason in move_to_host(model)
        for name in tables
        if reason == f"the {name} is on cpu, not on a GPU"
    ]
    num_tables = sum({id(tables[name]): tables[name].numel() for name in movable}.values())
    num_copied = tables["head"].numel() if "head" in movable else 0
    for shape in shapes.values():
        assert (shape.num_tables, shape.num_copied) == (num_tables, num_copied)
    embedding = type(model.get_input_embeddings())
    assert (embedding is not torch.nn.Embedding) == (model.config.model_type in SCALED_EMBEDDINGS)
    is_tied = tables["input embedding"] is tables["head"]
    assert is_tied or num_tables == (2 - len(saved)) * 96 * 64


@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], "all-linear"])
def test_parameters_are_counted_as_torch_does(tiny_model_dir, targets):
    import peft

    lora = LoraConfig.parse({"target_modules": targets, "r": 8})
    shape = model_shape(tiny_model_dir, lora)
    model = load_base(tiny_model_dir, dtype=torch.float32, device="cpu", quantized=True)
    # Of each layer, the tables of codes are 1 KiB, which the estimate leaves out.
    stored = sum(
        tensor.numel() * tensor.element_size()
        for name, tensor in model.state_dict().items()
        if not name.endswith(("code", "quant_map"))
    ) - (model.lm_head.weight.numel() * 4)  # tied: it is listed twice
    settings = Settings(1, 8, False, quantized=True, itemsize=4, optim="adamw_torch")
    assert estimate_memory(shape, settings).weights == pytest.approx(stored, rel=0.002)
    adapted = peft.get_peft_model(model, lora_config(lora, model))
    assert shape.num_adapter == adapted.get_nb_trainable_parameters()[0]


@pytest.mark.parametrize("length", [64, 512])
def test_kept_activations_are_what_autograd_saves(tiny_model_dir, length):
    import peft

    lora = LoraConfig()
    base = load_base(tiny_model_dir, dtype=torch.float32, device="cpu", quantized=True)
    peft.get_peft_model(base, lora_config(lora, base)).train()
    frozen = {tensor.data_ptr() for tensor in base.state_dict().values()}
    saved: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in frozen:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.arange(100, 100 + length)[None]
    # In float32: peft copies the input of each adapter where a CPU computes in bfloat16.
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = base.model(input_ids=ids, use_cache=False).last_hidden_state
    assert hidden.requires_grad
    settings = Settings(1, length, False, quantized=True, itemsize=4, optim="adamw_8bit")
    estimate = estimate_memory(model_shape(tiny_model_dir, lora), settings)
    assert sum(saved.values()) == pytest.approx(estimate.activations, rel=0.1)


def test_zero_2_divides_gradients_and_moments(tiny_model_dir):
    shape = model_shape(tiny_model_dir, LoraConfig())
    one = Settings(1, 64, False, quantized=True, itemsize=2, optim="adamw_torch")
    four = dataclasses.replace(one, num_ranks=4)
    # An fp32 weight, and of its gradient and two fp32 moments a quarter.
    assert estimate_memory(shape, one).adapter == 16 * shape.num_adapter
    assert estimate_memory(shape, four).adapter == 7 * shape.num_adapter
    assert estimate_memory(shape, four).activations == estimate_memory(shape, one).activations


@pytest.mark.parametrize("family", ["Mixtral", "DeepSeek V2", "gpt-oss"])
def test_experts_are_counted_as_torch_does(tmp_path, family):
    import peft

    base_dir = save_experts(family, tmp_path / "model")
    lora = LoraConfig(r=8, target_modules=("o_proj",), experts=True)
    shape = model_shape(base_dir, lora)
    model = load_base(base_dir, dtype=torch.float32, device="cpu", quantized=True)
    # Of each stack and layer, the codes are as many bytes as a tiny expert.
    stored = sum(
        tensor.numel() * tensor.element_size()
        for name, tensor in model.state_dict().items()
        if not name.endswith(("code", "quant_map"))
    )
    settings = Settings(1, 8, False, quantized=True, itemsize=4, optim="adamw_torch")
    assert estimate_memory(shape, settings).weights == pytest.approx(stored, rel=0.02)
    adapted = peft.get_peft_model(model, lora_config(lora, model))
    assert shape.num_adapter == adapted.get_nb_trainable_parameters()[0]
    dense = 1 if family == "DeepSeek V2" else 0
    assert (shape.experts.num_layers, shape.experts.num_experts) == (2 - dense, 4)


@pytest.mark.parametrize(
    ("family", "experts", "kernels"),
    [
        ("Mixtral", False, False),
        ("Qwen3-MoE", True, False),
        ("GLM-4-MoE", True, False),
        ("GLM-4-MoE", True, True),
    ],
)
def test_kept_activations_of_experts_are_what_autograd_saves(
    tmp_path, family, experts, kernels, monkeypatch
):
    import peft

    # A small rank: the estimate leaves out what adapters add, which is little in a real model.
    lora = LoraConfig(r=2, experts=experts)
    base_dir = save_experts(family, tmp_path / "model", hidden_size=128)
    base = load_base(base_dir, dtype=torch.float32, device="cpu", quantized=True)
    modules = adapted_modules(base, lora)
    model = peft.get_peft_model(base, lora_config(lora, base)).train()
    attach_to_the_rest(model, modules)
    if kernels:
        use_kernels(base)
        for name in [name for name in sys.modules if name.startswith("tuneline.kernels.")]:
            if hasattr(sys.modules[name], "use_kernel"):
                monkeypatch.setattr(sys.modules[name], "use_kernel", lambda x: False)
    frozen = {tensor.data_ptr() for tensor in base.state_dict().values()}
    saved: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in frozen:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.arange(512).remainder(250)[None]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = base.model(input_ids=ids, use_cache=False).last_hidden_state
    assert hidden.requires_grad
    settings = Settings(
        1, 512, False, quantized=True, itemsize=4, optim="adamw_8bit", fused=kernels
    )
    estimate = estimate_memory(model_shape(base_dir, lora), settings)
    assert sum(saved.values()) == pytest.approx(estimate.activations, rel=0.15)


def test_experts_that_are_no_stacks_have_no_estimate(tmp_path):
    from transformers import JetMoeConfig

    JetMoeConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=2,
    ).save_pretrained(tmp_path)
    assert model_shape(tmp_path, LoraConfig()) is None
