"""FP8 checkpoints: what the files hold, who reads them, and what the proof finds."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_families import FAMILIES, Family, new_model

from tuneline.artifacts import MergeProof, QuantizedModel
from tuneline.errors import ModelError, ProofError
from tuneline.fetch.dequantise import write_dequantised
from tuneline.fetch.quantised import quantisation_of
from tuneline.models.whole import load_whole
from tuneline.quantize import QuantizeConfig
from tuneline.quantize.checkpoint.proof import prove
from tuneline.quantize.fp8 import export as fp8
from tuneline.quantize.proof.compressed import keep_compressed
from tuneline.quantize.proof.reference import Reference, for_export
from tuneline.quantize.run import run
from tuneline.record import hash_files

# Many of a random model's most likely tokens are near ties.
CONFIG = QuantizeConfig(num_check_tokens=4, min_top1_agreement={"fp8": 0.6})
DENSE = [family for family in FAMILIES.values() if not family.has_experts]
E4M3_MAX, HALF_STEP = 448, 2**-4
"""Largest number of E4M3, and its largest rounding error relative to a number (3 bits)."""


@pytest.fixture(scope="module")
def export_dir(
    uneven_dir: Path, dataset_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    target = tmp_path_factory.mktemp("fp8") / "export"
    run(
        CONFIG,
        format="fp8",
        merged_dir=str(uneven_dir),
        dataset_dir=str(dataset_dir),
        quantized_dir=str(target),
    )
    return target


@pytest.fixture(scope="module")
def reference(uneven_dir: Path, dataset_dir: Path) -> Reference:
    return for_export(CONFIG, uneven_dir, dataset_dir)


def write(model_dir: Path, target: Path) -> Path:
    """Write a checkpoint without its proof."""
    target.mkdir()
    fp8.write_fp8(model_dir, target, fp8.check(model_dir))
    fp8.write_config(model_dir, target)
    return target


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in directory.glob("*.safetensors"):
        found |= load_file(file)
    return found


def test_the_record_and_the_files(uneven_dir: Path, export_dir: Path) -> None:
    record = QuantizedModel.read(export_dir)
    assert (record.kind, record.file, record.vllm_has_kernel) == ("fp8", ".", True)
    assert record.tensor_types == {"bf16": 20, "f8_e4m3": 14}
    assert record.group_size is None and record.tokens_per_second is None
    assert 0 < record.mean_kl < record.max_mean_kl and record.top1_agreement > 0.6
    assert record.generated and record.reference
    own, merged = (
        json.loads((path / "config.json").read_text()) for path in (export_dir, uneven_dir)
    )
    settings = own.pop("quantization_config")
    assert own == merged, "the model's settings as the merged model has them"
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (export_dir / name).read_bytes() == (uneven_dir / name).read_bytes()
    # What vLLM reads: the method, the layers, and how weights and activations are rounded.
    assert (settings["quant_method"], settings["format"]) == (
        "compressed-tensors", "float-quantized"
    )  # fmt: skip
    assert settings["ignore"] == ["lm_head"]
    (group,) = settings["config_groups"].values()
    assert group["targets"] == ["Linear"]
    plain = {"num_bits": 8, "type": "float", "symmetric": True, "group_size": None}
    assert group["weights"] == {**plain, "strategy": "channel", "dynamic": False}
    assert group["input_activations"] == {**plain, "strategy": "token", "dynamic": True}
    for path in export_dir.glob("*.json"):
        assert str(uneven_dir.parent) not in path.read_text()


def test_the_weights_are_the_merged_model_s(uneven_dir: Path, export_dir: Path) -> None:
    original, found = tensors(uneven_dir), tensors(export_dir)
    layers = {name.removesuffix("_scale") for name in found if name.endswith("_scale")}
    assert len(layers) == 14 and set(found) - set(original) == {f"{name}_scale" for name in layers}
    for name, weight in original.items():
        if name not in layers:
            assert torch.equal(found[name], weight), name
            continue
        scale_O1, codes_OI = found[f"{name}_scale"].float(), found[name]
        assert codes_OI.dtype == torch.float8_e4m3fn and scale_O1.shape == (len(weight), 1)
        largest_O1 = weight.float().abs().amax(1, keepdim=True)
        # The scale is rounded to bfloat16.
        torch.testing.assert_close(scale_O1, largest_O1 / E4M3_MAX, rtol=2**-8, atol=0)
        error = (codes_OI.float() * scale_O1 - weight.float()).abs()
        # Numbers below 2^-6 have a fixed step of 2^-9.
        bound = torch.maximum(HALF_STEP * weight.float().abs(), 2**-10 * scale_O1)
        assert (error <= bound * 1.05).all(), name


def test_another_reader_of_the_format_finds_the_same_weights(
    export_dir: Path, tmp_path: Path
) -> None:
    settings = json.loads((export_dir / "config.json").read_text())
    quantisation = quantisation_of(settings, source="export")
    assert quantisation is not None and quantisation.name == "compressed-tensors fp8"
    assert write_dequantised(export_dir, tmp_path, quantisation) == 14
    found, expected = tensors(tmp_path), tensors(export_dir)
    for name, weight in found.items():
        if f"{name}_scale" in expected:
            wide = expected[name].float() * expected[f"{name}_scale"].float()
            assert torch.equal(weight, wide.bfloat16()), name


def shift_scales(weights: dict[str, torch.Tensor]) -> None:
    for name in [name for name in weights if name.endswith("_scale")]:
        weights[name] = weights[name].roll(1, dims=0).clone()


def shift_rows_of_one_layer(weights: dict[str, torch.Tensor]) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    codes = weights[name].view(torch.uint8).roll(1, dims=0)
    weights[name] = codes.clone().view(torch.float8_e4m3fn)


def forget_the_scales(weights: dict[str, torch.Tensor]) -> None:
    for name in [name for name in weights if name.endswith("_scale")]:
        weights[name] = torch.ones_like(weights[name])


def drop_a_scale(weights: dict[str, torch.Tensor]) -> None:
    del weights["model.layers.1.mlp.up_proj.weight_scale"]


@pytest.mark.parametrize(
    ("mutate", "words"),
    [
        (shift_scales, "mean KL divergence of"),
        (shift_rows_of_one_layer, "mean KL divergence of"),
        (forget_the_scales, "mean KL divergence of|not finite"),
        (drop_a_scale, "does not load again: .*lacks weights"),
    ],
)
def test_the_proof_finds_a_wrong_file(
    mutate: Callable[[dict[str, torch.Tensor]], None],
    words: str,
    uneven_dir: Path,
    export_dir: Path,
    reference: Reference,
    tmp_path: Path,
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(export_dir, broken)
    weights = tensors(broken)
    mutate(weights)
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ProofError, match=words):
        prove(
            CONFIG,
            uneven_dir,
            broken,
            format="fp8",
            reference=reference,
            dtype=torch.float32,
            device="cpu",
            has_speed=False,
        )


def test_layers_compute_in_fp8_and_stay_compressed(export_dir: Path) -> None:
    model = load_whole(export_dir, dtype=torch.float32, device_map={"": "cpu"})
    keep_compressed(model)
    stored = tensors(export_dir)
    name = "model.layers.0.mlp.down_proj"
    layer = model.get_submodule(name)
    x_TI = torch.randn(5, 256, generator=torch.Generator().manual_seed(1)) * torch.tensor(
        [1e-3, 0.1, 1.0, 10.0, 1e3]
    ).unsqueeze(1)
    with torch.inference_mode():
        y_TO = layer(x_TI[None])[0]
    # What a server does: each token has its own scale.
    scale_T1 = x_TI.abs().amax(1, keepdim=True) / E4M3_MAX
    rounded_TI = (x_TI / scale_T1).to(torch.float8_e4m3fn).float() * scale_T1
    weight_OI = stored[f"{name}.weight"].float() * stored[f"{name}.weight_scale"].float()
    # Each token has its own tolerance too. Half a step of FP8 would be 2^-4.
    error_TO = (y_TO - rounded_TI @ weight_OI.T).abs()
    assert (error_TO <= 1e-5 * y_TO.abs().amax(1, keepdim=True)).all()
    assert layer.weight.dtype == torch.float8_e4m3fn
    assert model.lm_head.weight.dtype == torch.float32


def test_equal_models_make_equal_files(uneven_dir: Path, tmp_path: Path) -> None:
    first, second = (write(uneven_dir, tmp_path / name) for name in ("first", "second"))
    assert hash_files(first, leave_out=set()) == hash_files(second, leave_out=set())


def test_a_checkpoint_of_several_files(
    uneven_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = write(uneven_dir, tmp_path / "whole")
    monkeypatch.setattr(fp8, "MAX_SHARD_BYTES", 1 << 17)
    parts = write(uneven_dir, tmp_path / "parts")
    assert len(list(parts.glob("*.safetensors"))) > 2
    expected, found = tensors(whole), tensors(parts)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name].float(), expected[name].float()) for name in expected)
    load_whole(parts, dtype=torch.float32, device_map={"": "cpu"})


def test_a_merged_model_with_nan_is_refused(
    uneven_dir: Path, dataset_dir: Path, tmp_path: Path
) -> None:
    shutil.copytree(uneven_dir, tmp_path / "merged")
    weights = load_file(tmp_path / "merged" / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(weights, tmp_path / "merged" / "model.safetensors", metadata={"format": "pt"})
    MergeProof.read(tmp_path / "merged").write(tmp_path / "merged")
    with pytest.raises(ProofError, match=r"not finite: the training diverged"):
        run(
            CONFIG,
            format="fp8",
            merged_dir=str(tmp_path / "merged"),
            dataset_dir=str(dataset_dir),
            quantized_dir=str(tmp_path / "out"),
        )
    assert not (tmp_path / "out").exists()


def test_layers_that_the_files_name_otherwise(uneven_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(uneven_dir, tmp_path / "merged")
    weights = load_file(tmp_path / "merged" / "model.safetensors")
    weights["model.layers.0.mlp.other.weight"] = weights.pop("model.layers.0.mlp.up_proj.weight")
    save_file(weights, tmp_path / "merged" / "model.safetensors", metadata={"format": "pt"})
    words = r"have no matrix model.layers.0.mlp.up_proj.weight.*take gptq-8bit in quantize.gptq"
    with pytest.raises(ModelError, match=words):
        fp8.check(tmp_path / "merged")


@pytest.mark.parametrize("family", DENSE, ids=lambda family: family.name)
def test_families(family: Family, tmp_path: Path) -> None:
    model = new_model(family, vocab_size=128).eval()
    model.save_pretrained(tmp_path / "model")
    export = write(tmp_path / "model", tmp_path / "export")
    loaded = load_whole(export, dtype=torch.float32, device_map={"": "cpu"})
    keep_compressed(loaded)
    ids = torch.arange(3, 60)[None]
    with torch.inference_mode():
        p_TV, q_TV = (each(input_ids=ids).logits[0].log_softmax(-1) for each in (model, loaded))
    mean_kl = (p_TV.exp() * (p_TV - q_TV)).sum(-1).mean().item()
    assert 0 < mean_kl < 1e-2
    stored = tensors(export)
    # Embeddings and head stay as they are, tied or not.
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert name not in stored or stored[name].dtype == torch.float32
    assert ("lm_head.weight" in stored) is not model.config.tie_word_embeddings
