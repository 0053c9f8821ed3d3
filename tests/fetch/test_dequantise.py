"""Quantised base models are converted to bfloat16 as transformers dequantises them, or refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_families import FAMILIES, write_checkpoint
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from tuneline.artifacts import ModelOrigin
from tuneline.errors import ModelError
from tuneline.fetch import FetchConfig, dequantise
from tuneline.fetch.quantised import quantisation_of
from tuneline.fetch.run import run as fetch

LINEAR = "_proj.weight"
UP = "model.layers.0.mlp.up_proj.weight"


def fetched(source: Path) -> tuple[ModelOrigin, dict[str, torch.Tensor]]:
    target = source.parent / "base"
    origin = fetch(FetchConfig(), source=str(source), base_model_dir=str(target))
    weights = {}
    for file in sorted(target.glob("*.safetensors")):
        weights.update(load_file(file))
    settings = json.loads((target / "config.json").read_text())
    assert "quantization_config" not in settings
    assert settings.get("dtype", settings.get("torch_dtype")) == "bfloat16"
    return origin, weights


def describe(source: Path, quantization: dict[str, Any]) -> None:
    file = source / "config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({**settings, "quantization_config": quantization}))


def rewrite(source: Path, tensors: dict[str, torch.Tensor]) -> None:
    (source / "model.safetensors").unlink()
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})


def by_blocks(weight: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weights in FP8 and their scales, [rows / block, columns / block]."""
    num_rows, num_columns = (-(-n // size) for n, size in zip(weight.shape, block, strict=True))
    scales = torch.empty(num_rows, num_columns)
    stored = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    for i in range(num_rows):
        for j in range(num_columns):
            rows = slice(i * block[0], (i + 1) * block[0])
            columns = slice(j * block[1], (j + 1) * block[1])
            part = weight[rows, columns].float()
            scales[i, j] = part.abs().max() / 448
            stored[rows, columns] = (part / scales[i, j]).to(torch.float8_e4m3fn)
    return stored, scales


def write_fp8(
    source: Path, quantization: dict[str, Any], block: tuple[int, int], scale: str
) -> dict[str, torch.Tensor]:
    """Quantise the linear layers of a checkpoint; return the stored tensors."""
    tensors = {}
    for name, weight in load_file(source / "model.safetensors").items():
        if name.endswith(LINEAR):
            sizes = [n if size == 0 else size for n, size in zip(weight.shape, block, strict=True)]
            tensors[name], scales = by_blocks(weight, (sizes[0], sizes[1]))
            tensors[name.removesuffix("weight") + scale] = scales
        else:
            tensors[name] = weight
    rewrite(source, tensors)
    describe(source, quantization)
    return tensors


COMPRESSED = {"type": "float", "num_bits": 8, "symmetric": True, "strategy": "channel"}
FP8: dict[str, tuple[dict[str, Any], tuple[int, int], str]] = {
    "blocks": (
        {"quant_method": "fp8", "weight_block_size": [32, 32], "activation_scheme": "dynamic"},
        (32, 32),
        "weight_scale_inv",
    ),
    "tensors": ({"quant_method": "fp8", "activation_scheme": "static"}, (0, 0), "weight_scale_inv"),
    "rows": ({"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, (1, 0), "weight_scale"),
    "compressed": (
        {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": COMPRESSED}},
        },
        (1, 0),
        "weight_scale",
    ),
    "modelopt": ({"quant_method": "modelopt", "quant_algo": "FP8"}, (0, 0), "weight_scale"),
}


@pytest.mark.parametrize("layout", FP8)
@pytest.mark.parametrize("family", [pytest.param("Qwen3", marks=pytest.mark.slow), "DeepSeek V3"])
def test_fp8(family: str, layout: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    write_checkpoint(FAMILIES[family], source, tokenizer_dir=tiny_model_dir)
    plain = load_file(source / "model.safetensors")
    quantization, block, scale = FP8[layout]
    stored = write_fp8(source, quantization, block, scale)
    origin, weights = fetched(source)
    assert (origin.quantization, origin.dequantized) == (
        "compressed-tensors fp8" if layout == "compressed" else
        "modelopt FP8" if layout == "modelopt" else quantization["quant_method"],
        True,
    )  # fmt: skip
    assert origin.num_parameters == sum(weight.numel() for weight in plain.values())
    assert weights.keys() == plain.keys()
    reference = Fp8Dequantize(None)
    for name, weight in weights.items():
        if not name.endswith(LINEAR):
            assert torch.equal(weight, plain[name]), name
            continue
        scales = stored[name.removesuffix("weight") + scale]
        expected = reference._dequantize_one(stored[name], scales, torch.bfloat16)
        assert weight.dtype == torch.bfloat16 and torch.equal(weight, expected), name


def test_blocks_that_do_not_divide_a_weight(tiny_model_dir: Path, tmp_path: Path) -> None:
    """As kv_a_proj of DeepSeek V3: 576 rows in blocks of 128."""
    source = tmp_path / "source"
    write_checkpoint(FAMILIES["Qwen3"], source, tokenizer_dir=tiny_model_dir)
    plain = load_file(source / "model.safetensors")[UP].float()
    stored = write_fp8(
        source, {"quant_method": "fp8", "weight_block_size": [48, 48]}, (48, 48), "weight_scale_inv"
    )
    _, weights = fetched(source)
    scales = stored["model.layers.0.mlp.up_proj.weight_scale_inv"]
    assert scales.shape == (3, 2) and plain.shape == (128, 64)
    for i, rows in enumerate((slice(0, 48), slice(48, 96), slice(96, 128))):
        for j, columns in enumerate((slice(0, 48), slice(48, 64))):
            expected = stored[UP][rows, columns].float() * scales[i, j]
            assert torch.equal(weights[UP][rows, columns], expected.bfloat16())
    assert torch.allclose(weights[UP].float(), plain, rtol=0.07, atol=1e-3)


def test_powers_of_two_as_scales(tiny_model_dir: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    write_checkpoint(FAMILIES["Qwen3"], source, tokenizer_dir=tiny_model_dir)
    stored = write_fp8(
        source, {"quant_method": "fp8", "weight_block_size": [32, 32]}, (32, 32), "weight_scale_inv"
    )
    name = "model.layers.0.mlp.up_proj.weight_scale_inv"
    stored[name] = stored[name].log2().ceil().exp2().to(torch.float8_e8m0fnu)
    other = "model.layers.0.mlp.down_proj.weight_scale_inv"
    stored[other] = (stored[other].log2().ceil() + 127).to(torch.uint8)
    rewrite(source, stored)
    _, weights = fetched(source)
    for weight, scale in ((UP, name), (UP.replace("up", "down"), other)):
        expected = Fp8Dequantize(None)._dequantize_one(stored[weight], stored[scale])
        assert torch.equal(weights[weight], expected.bfloat16())


def test_mxfp4(tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each weight is as transformers dequantises it; experts are in memory one at a time."""
    sizes = []
    write = dequantise.write_sharded

    def watched(target: Path, specs: Any, make: Any, **settings: Any) -> int:
        def parts(name: str) -> Any:
            for part in make(name):
                sizes.append((name, part.numel()))
                yield part

        return write(target, specs, parts, **settings)

    monkeypatch.setattr(dequantise, "write_sharded", watched)
    source = tmp_path / "source"
    write_checkpoint(FAMILIES["gpt-oss"], source, tokenizer_dir=tiny_model_dir)
    plain = load_file(source / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    tensors, expected = {}, dict(plain)
    for name, weight in plain.items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            tensors[name] = weight
            continue
        num_experts, num_in, num_out = weight.shape
        shape = (num_experts, num_out, num_in // 32)
        blocks = torch.randint(256, (*shape, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(110, 130, shape, generator=generator, dtype=torch.uint8)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        expected[name] = convert_moe_packed_tensors(blocks, scales)
    rewrite(source, tensors)
    describe(source, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    origin, weights = fetched(source)
    assert (origin.quantization, origin.dequantized) == ("mxfp4", True)
    assert origin.num_parameters == sum(weight.numel() for weight in plain.values())
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, expected[name]), name
    experts = [size for name, size in sizes if name.endswith("experts.gate_up_proj")]
    assert experts == [64 * 128] * 8  # four experts in each of two layers


@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes(bits: int, tiny_model_dir: Path, tmp_path: Path) -> None:
    """8 bits; and 4 bits where experts have them, which transformers cannot stack."""
    source, family = tmp_path / "source", FAMILIES["Qwen3" if bits == 8 else "Qwen3-MoE"]
    write_checkpoint(family, source, tokenizer_dir=tiny_model_dir)
    config: Any = BitsAndBytesConfig
    quantized = config(load_in_4bit=bits == 4, load_in_8bit=bits == 8, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(
        source, device_map={"": "cpu"}, quantization_config=quantized
    )
    shutil.rmtree(tmp_path / "source")
    write_checkpoint(family, source, tokenizer_dir=tiny_model_dir)
    (source / "model.safetensors").unlink()
    model.save_pretrained(source)
    origin, weights = fetched(source)
    kind = "int8" if bits == 8 else "nf4"
    assert (origin.quantization, origin.dequantized) == (f"bitsandbytes {kind}", True)
    expected = model.dequantize(dtype=torch.bfloat16).state_dict()
    for name in (
        UP if bits == 8 else "model.layers.0.self_attn.q_proj.weight",
        "model.norm.weight",
    ):
        assert torch.equal(weights[name], expected[name].bfloat16()), name


def refused(quantization: dict[str, Any], **arguments: Any) -> str:
    with pytest.raises(ModelError) as caught:
        quantisation_of({"quantization_config": quantization}, source="X/Y", **arguments)
    return str(caught.value)


@pytest.mark.parametrize(
    ("quantization", "name"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq", "bits": 4}, "awq"),
        ({"quant_method": "hqq"}, "hqq"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "modelopt NVFP4"),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "pack-quantized",
                "config_groups": {"group_0": {"weights": {"type": "int", "num_bits": 4}}},
            },
            "compressed-tensors pack-quantized",
        ),
        ({"quant_method": "compressed-tensors", "config_groups": None}, "compressed-tensors None"),
        ({"bits": 4}, "unknown"),
    ],
)
def test_other_formats_are_refused_with_a_way_out(quantization: dict[str, Any], name: str) -> None:
    message = refused(quantization)
    assert f"({name}) that tuneline neither" in message and "the model in 16 bits" in message
    message = refused(quantization, original="Qwen/Qwen3-8B")
    assert "name Qwen/Qwen3-8B, from which it was made, as base_model" in message


def test_a_vision_model_has_it_in_its_text_part() -> None:
    settings = {"text_config": {"quantization_config": {"quant_method": "gptq"}}}
    with pytest.raises(ModelError, match="gptq"):
        quantisation_of(settings, source="X/Y")
    assert quantisation_of({"text_config": {}}, source="X/Y") is None


@pytest.mark.parametrize("lost", ["scale", "shape"])
def test_a_broken_source_is_named(lost: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    write_checkpoint(FAMILIES["Qwen3"], source, tokenizer_dir=tiny_model_dir)
    stored = write_fp8(source, *FP8["blocks"])
    name = "model.layers.0.mlp.up_proj.weight_scale_inv"
    if lost == "scale":
        del stored[name]
    else:
        stored[name] = torch.ones(7, 5)
    rewrite(source, stored)
    with pytest.raises(ModelError, match=rf"{UP} (is quantised, but there is no|has shape .*7, 5)"):
        fetch(FetchConfig(), source=str(source), base_model_dir=str(tmp_path / "base"))
    assert not (tmp_path / "base").exists()
