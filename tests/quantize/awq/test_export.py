"""AWQ checkpoints: what the files hold, and what the proof finds."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_families import FAMILIES, new_model
from transformers import LlamaConfig

from tuneline.artifacts import QuantizedModel
from tuneline.errors import DataError, ModelError, ProofError
from tuneline.models.whole import load_whole
from tuneline.quantize import QuantizeConfig
from tuneline.quantize.awq.export import check
from tuneline.quantize.checkpoint.proof import prove
from tuneline.quantize.proof.reference import for_export
from tuneline.quantize.run import run

BITS, GROUP_SIZE = 4, 64
CONFIG = QuantizeConfig(
    num_calibration_rows=8,
    group_size=GROUP_SIZE,
    num_check_tokens=4,
    # Many of a random model's most likely tokens are near ties.
    min_top1_agreement={"awq": 0.3},
)
FAMILIES_MADE = (
    *("Llama 3", "Yi", "Mistral", "Ministral 3", "Qwen2", "Qwen3", "Gemma 2", "SmolLM3", "Granite"),
    "OLMo 3",
)
"""Families of which gptqmodel makes AWQ checkpoints that transformers reads."""
ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Place in a word, in units of 4 bits from the lowest, of each of eight neighbouring outputs."""


@pytest.fixture(scope="module")
def export_dir(
    uneven_dir: Path, dataset_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    target = tmp_path_factory.mktemp("awq") / "export"
    run(
        CONFIG,
        format="awq",
        merged_dir=str(uneven_dir),
        dataset_dir=str(dataset_dir),
        quantized_dir=str(target),
    )
    return target


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in directory.glob("*.safetensors"):
        found |= load_file(file)
    return found


def test_the_record_and_the_files(uneven_dir: Path, export_dir: Path) -> None:
    record = QuantizedModel.read(export_dir)
    assert (record.kind, record.file, record.group_size) == ("awq", ".", GROUP_SIZE)
    assert record.vllm_has_kernel and record.notes == []
    assert 0 < record.mean_kl < record.max_mean_kl
    assert record.tokens_per_second > 0 and record.num_threads >= 1
    own, merged = (
        json.loads((path / "config.json").read_text()) for path in (export_dir, uneven_dir)
    )
    settings = own.pop("quantization_config")
    assert own == merged, "the model's settings as the merged model has them"
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (export_dir / name).read_bytes() == (uneven_dir / name).read_bytes()
    # What vLLM and transformers read: the layout, and which kernels fit.
    assert (settings["quant_method"], settings["version"]) == ("awq", "gemm")
    assert (settings["bits"], settings["group_size"]) == (BITS, GROUP_SIZE)
    assert (settings["zero_point"], settings["lm_head"]) == (True, False)
    assert json.loads((export_dir / "quantize_config.json").read_text()) == settings
    # It would differ from one run to the next.
    assert not (export_dir / "quant_log.csv").exists()
    for path in export_dir.glob("*.json"):
        assert str(uneven_dir.parent) not in path.read_text()
        assert '"offload_to_disk_path"' not in path.read_text()


def test_the_weights_are_the_merged_model_s(uneven_dir: Path, export_dir: Path) -> None:
    """Hold the tensors against AutoAWQ's GEMM layout: W = s (q - z), packed along the outputs."""
    original, found = tensors(uneven_dir), tensors(export_dir)
    modules = [name.removesuffix(".qweight") for name in found if name.endswith(".qweight")]
    assert len(modules) == 14
    assert torch.equal(found["model.embed_tokens.weight"], original["model.embed_tokens.weight"])
    errors = []
    for module in modules:
        weight_OI = original[f"{module}.weight"].float().numpy()
        num_out, num_in = weight_OI.shape
        packed, zeros = found[f"{module}.qweight"], found[f"{module}.qzeros"]
        scales = found[f"{module}.scales"]
        assert packed.shape == (num_in, num_out * BITS // 32)
        assert zeros.shape == (num_in // GROUP_SIZE, num_out * BITS // 32)
        assert scales.shape == (num_in // GROUP_SIZE, num_out)
        assert (packed.dtype, zeros.dtype, scales.dtype) == (
            torch.int32, torch.int32, torch.bfloat16
        )  # fmt: skip
        group_I = numpy.arange(num_in) // GROUP_SIZE
        levels_IO = unpack(packed.numpy()) - unpack(zeros.numpy())[group_I]
        stored_IO = scales.float().numpy()[group_I] * levels_IO
        before_I, after_O = factors(module, original, found)
        restored_OI = stored_IO.T * before_I * after_O[:, None]
        errors.append(numpy.linalg.norm(restored_OI - weight_OI) / numpy.linalg.norm(weight_OI))
    # Rounding to 16 values over some 6 standard deviations, in rows of other sizes.
    assert max(errors) < 0.25


def factors(
    module: str, original: dict[str, torch.Tensor], found: dict[str, torch.Tensor]
) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Return what AWQ divided the inputs of a layer by, and what it multiplied the outputs by.

    Of layers behind a norm, the norm tells. What up_proj and down_proj exchange is not stored
    anywhere: their tensors are not compared by size but up to a factor per channel.
    """
    layer, _, name = module.rpartition(".self_attn.")
    norm = f"{layer}.input_layernorm.weight"
    if not layer:
        layer, _, name = module.rpartition(".mlp.")
        norm = f"{layer}.post_attention_layernorm.weight"
    num_out, num_in = original[f"{module}.weight"].shape
    before_I, after_O = numpy.ones(num_in), numpy.ones(num_out)
    if name in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"):
        before_I = (found[norm].float() / original[norm].float()).numpy()
    if name in ("up_proj", "down_proj"):
        weight_OI = original[f"{module}.weight"].float().numpy()
        stored_OI = dequantised(module, found) * before_I
        axis = 1 if name == "up_proj" else 0
        ratio = (stored_OI * weight_OI).sum(axis) / (stored_OI**2).sum(axis)
        return (before_I, ratio) if name == "up_proj" else (ratio, after_O)
    return before_I, after_O


def dequantised(module: str, found: dict[str, torch.Tensor]) -> numpy.ndarray:
    levels_IO = unpack(found[f"{module}.qweight"].numpy())
    zeros_GO = unpack(found[f"{module}.qzeros"].numpy())
    group_I = numpy.arange(len(levels_IO)) // GROUP_SIZE
    scales_GO = found[f"{module}.scales"].float().numpy()
    stored_OI: numpy.ndarray = (scales_GO[group_I] * (levels_IO - zeros_GO[group_I])).T
    return stored_OI


def unpack(words: numpy.ndarray) -> numpy.ndarray:
    """Return the numbers in rows of 32-bit words."""
    unsigned = numpy.ascontiguousarray(words).view(numpy.uint32)
    digits = [(unsigned >> (BITS * place)) & 15 for place in ORDER]
    return numpy.stack(digits, axis=-1).reshape(len(words), -1).astype(numpy.int64)


def test_the_proof_finds_scales_that_are_shifted_by_a_row(
    uneven_dir: Path, dataset_dir: Path, export_dir: Path, tmp_path: Path
) -> None:
    shutil.copytree(export_dir, tmp_path / "broken")
    weights = tensors(export_dir)
    for name in [name for name in weights if name.endswith(".scales")]:
        weights[name] = weights[name].roll(1, dims=1).clone()
    save_file(weights, tmp_path / "broken" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ProofError, match=r"the export awq has a mean KL divergence of"):
        prove(
            CONFIG,
            uneven_dir,
            tmp_path / "broken",
            format="awq",
            reference=for_export(CONFIG, uneven_dir, dataset_dir),
            dtype=torch.bfloat16,
            device="cpu",
        )


def test_no_training_rows(merged_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="AWQ calibrates on training rows"):
        run(
            QuantizeConfig(),
            format="awq",
            merged_dir=str(merged_dir),
            dataset_dir=str(tmp_path),
            quantized_dir=str(tmp_path / "out"),
        )


@pytest.mark.parametrize(
    ("sizes", "wanted", "found"),
    [
        ({"hidden_size": 128, "intermediate_size": 192}, 128, 64),
        ({"hidden_size": 256, "intermediate_size": 512}, 1024, 128),
        (
            {"hidden_size": 128, "intermediate_size": 200},
            128,
            "gate_proj has 200 outputs, .* of 64",
        ),
        ({"hidden_size": 128, "head_dim": 32}, 128, "v_proj has 32 outputs, .* of 64"),
        ({"hidden_size": 128, "head_dim": 18}, 128, "q_proj has 36 outputs, .* of 8:"),
    ],
)
def test_layers_that_awq_can_store(
    sizes: dict[str, int], wanted: int, found: int | str, tmp_path: Path
) -> None:
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1} if "head_dim" in sizes else {}
    heads = heads or {"num_attention_heads": 2, "num_key_value_heads": 2}
    LlamaConfig(vocab_size=64, num_hidden_layers=1, **sizes, **heads).save_pretrained(tmp_path)
    config = QuantizeConfig(group_size=wanted)
    if isinstance(found, str):
        with pytest.raises(ModelError, match=rf"AWQ cannot .*{found}.*set quantize.awq to \[\]"):
            check(config, tmp_path)
    else:
        size, note = check(config, tmp_path)
        assert size == found and note is not None


@pytest.mark.parametrize(
    ("name", "type"),
    [("Phi-3", "phi3"), ("Gemma 3", "gemma3_text"), ("GLM-4", "glm4"), ("Cohere 2", "cohere2")],
)
def test_a_family_with_which_gptqmodel_fails(name: str, type: str, tmp_path: Path) -> None:
    new_model(FAMILIES[name], vocab_size=64, num_key_value_heads=2).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=rf"in the family {type}: set quantize.awq to \[\]"):
        check(QuantizeConfig(), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES_MADE)
def test_families(name: str, smollm2_dir: Path, tmp_path: Path) -> None:
    """Make a checkpoint without the line, read it again, and compare it with its model."""
    family = FAMILIES[name]
    # With the one head of the tiny models, values have too few channels for AWQ.
    model = new_model(family, vocab_size=49152, num_key_value_heads=2).eval()
    model.save_pretrained(tmp_path / "model")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(smollm2_dir / file, tmp_path / "model")
    group_size, _ = check(QuantizeConfig(), tmp_path / "model")
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(3, 49152, (8, 40), generator=generator)
    job = {
        **{"method": "awq", "bits": BITS, "group_size": group_size, "desc_act": False},
        **{"dtype": "bfloat16", "rows": rows.tolist()},
        **{"model_dir": str(tmp_path / "model"), "target": str(tmp_path / "export")},
        **{"started_at": 0.0, "times_file": "times.json"},
    }
    (tmp_path / "job.json").write_text(json.dumps(job))
    module = "tuneline.quantize.checkpoint.run_gptqmodel"
    done = subprocess.run(
        [sys.executable, "-m", module, "job.json"], cwd=tmp_path, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, env=os.environ | {"GPTQMODEL_CPU_WORKERS": "2"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    export = load_whole(tmp_path / "export", dtype=torch.bfloat16, device_map={"": "cpu"})
    with torch.inference_mode():
        p_RTV, q_RTV = (
            each(input_ids=rows[:2]).logits.float().log_softmax(-1) for each in (model, export)
        )
    mean_kl = (p_RTV.exp() * (p_RTV - q_RTV)).sum(-1).mean().item()
    # Rounded to bfloat16 alone it is 1e-5.
    assert 1e-4 < mean_kl < 2e-2
    assert len(list((tmp_path / "export").glob("*.safetensors"))) == 1
