"""A base model whose files hold bitsandbytes' 4-bit weights is trained on as it is, and merged."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from tuneline.artifacts import MergeProof, ModelOrigin, TrainingSummary
from tuneline.errors import ModelError, RecipeError
from tuneline.evaluate import model as evaluated
from tuneline.fetch import FetchConfig
from tuneline.fetch.run import run as fetch
from tuneline.merge import MergeConfig
from tuneline.merge.run import run as merge
from tuneline.models.checkpoint import Checkpoint
from tuneline.models.nf4 import empty_model, load_base, quantized_modules
from tuneline.train import TrainConfig
from tuneline.train.run import run as train

UP = "model.layers.0.mlp.up_proj"
LAYOUTS: dict[str, dict[str, Any]] = {
    "nf4": {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "not nested": {"bnb_4bit_quant_type": "nf4"},
    "fp4": {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
    "storage": {
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_quant_storage": torch.bfloat16,
        "bnb_4bit_compute_dtype": torch.bfloat16,
    },
    "skipped": {
        "bnb_4bit_quant_type": "nf4",
        "llm_int8_skip_modules": ["lm_head", "model.layers.0.self_attn", "1.mlp.up_proj"],
    },
}


def store(tiny_model_dir: Path, path: Path, *, dtype: torch.dtype, **layout: Any) -> Path:
    """Write the tiny model in 4 bits, as transformers saves it."""
    left_out = shutil.ignore_patterns("*.safetensors", "config.json", "origin.json")
    shutil.copytree(tiny_model_dir, path, ignore=left_out)
    config: Any = BitsAndBytesConfig
    model = AutoModelForCausalLM.from_pretrained(
        tiny_model_dir,
        dtype=dtype,
        device_map={"": "cpu"},
        quantization_config=config(load_in_4bit=True, **layout),
    )
    model.save_pretrained(path)
    return path


def in_16_bits(path: Path) -> dict[str, torch.Tensor]:
    """Return the weights as transformers itself dequantises them, to the stored dtype."""
    model = AutoModelForCausalLM.from_pretrained(path, device_map={"": "cpu"})
    weights = {}
    for name, parameter in model.named_parameters():
        if isinstance(parameter, bitsandbytes.nn.Params4bit):
            parameter = bitsandbytes.functional.dequantize_4bit(
                parameter.data, parameter.quant_state
            )
        weights[name] = parameter.detach()
    return weights


def train_and_merge(
    source: Path, dataset_dir: Path, out: Path, **settings: Any
) -> tuple[ModelOrigin, TrainingSummary, MergeProof]:
    origin = fetch(FetchConfig(), source=str(source), base_model_dir=str(out / "base"))
    config: dict[str, Any] = {
        "learning_rate": 2e-2,
        "max_steps": 4,
        "warmup_steps": 0,
        "global_batch_size": 2,
        "gradient_checkpointing": False,
        "dtype": "float32",
    }
    summary = train(
        TrainConfig(**config | settings),
        base_model_dir=out / "base",
        dataset_dir=dataset_dir,
        adapter_dir=out / "adapter",
        curves_path=out / "curves.html",
    )
    proof = merge(
        MergeConfig(base="auto", dtype="float32"),
        base_model_dir=out / "base",
        adapter_dir=out / "adapter",
        dataset_dir=dataset_dir,
        merged_dir=out / "merged",
    )
    return origin, summary, proof


@pytest.mark.parametrize(
    "layout",
    [name if name == "nf4" else pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS],
)
def test_its_own_weights_are_trained_on_and_merged(
    layout: str, tiny_model_dir: Path, small_dataset_dir: Path, tmp_path: Path
) -> None:
    dtype = torch.bfloat16 if layout == "storage" else torch.float32
    source = store(tiny_model_dir, tmp_path / "source", dtype=dtype, **LAYOUTS[layout])
    origin, summary, proof = train_and_merge(source, small_dataset_dir, tmp_path)

    kind = LAYOUTS[layout]["bnb_4bit_quant_type"]
    assert (origin.quantization, origin.dequantized) == (f"bitsandbytes {kind}", False)
    assert origin.num_parameters == ModelOrigin.read(tiny_model_dir).num_parameters
    assert summary.base_quantization == kind
    assert (proof.base, proof.base_asked) == ("dequantized", "auto")
    assert proof.mean_kl < 1e-6

    num_packed = {"skipped": 9}.get(layout, 14)
    checkpoint = Checkpoint(tmp_path / "base")
    assert len(checkpoint.packed) == num_packed
    assert len(quantized_modules(empty_model(tmp_path / "base"))) == num_packed
    merged = Checkpoint(tmp_path / "merged")
    assert merged.specs.keys() == Checkpoint(tiny_model_dir).specs.keys() and not merged.packed
    for name, theirs in in_16_bits(source).items():
        ours = checkpoint.read(name) if name in checkpoint.specs else theirs
        # transformers rounds to the dtype that the weights had.
        assert torch.equal(ours.to(theirs.dtype), theirs), name
    # The adapter is in the merged weights, and they are no longer quantised.
    assert not torch.equal(merged.read(f"{UP}.weight"), checkpoint.read(f"{UP}.weight"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not hasattr(model.config, "quantization_config")


def test_it_computes_in_the_dtype_that_is_asked_for(tiny_model_dir: Path, tmp_path: Path) -> None:
    source = store(tiny_model_dir, tmp_path / "source", dtype=torch.float32, **LAYOUTS["nf4"])
    for dtype in (torch.bfloat16, torch.float32):
        model: Any = load_base(source, dtype=dtype, device="cpu", quantized=True)
        layer = model.get_submodule(UP)
        assert layer.compute_dtype == layer.weight.quant_state.dtype == dtype
        assert model.dtype == dtype
        assert {p.dtype for p in model.parameters()} == {dtype, torch.uint8}
        assert model(torch.arange(9)[None]).logits.dtype == dtype


def test_the_base_is_evaluated_as_it_is(tiny_model_dir: Path, tmp_path: Path) -> None:
    source = store(tiny_model_dir, tmp_path / "source", dtype=torch.float32, **LAYOUTS["nf4"])
    model = evaluated.load(source, evaluated.load_tokenizer(source), batch_size=1)
    ids = torch.arange(100, 117)[None]
    dense = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    dense.load_state_dict(in_16_bits(source), strict=False)
    with torch.no_grad():
        ours, theirs = model.model(ids).logits, dense(ids).logits
    assert torch.allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"load_in_4bit": False}, r"load_in_4bit is false, but .* 4 bits \(nf4\): set it to true"),
        ({"lora": {"init_lora_weights": "loftq"}}, "loftq.*alone: set it to default"),
    ],
)
def test_what_only_16_bits_have_is_refused_before_training(
    settings: dict[str, Any],
    problem: str,
    tiny_model_dir: Path,
    small_dataset_dir: Path,
    tmp_path: Path,
) -> None:
    source = store(tiny_model_dir, tmp_path / "source", dtype=torch.float32, **LAYOUTS["nf4"])
    with pytest.raises(RecipeError, match=problem):
        train_and_merge(source, small_dataset_dir, tmp_path, **settings)


def damaged(source: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    from safetensors.torch import load_file, save_file

    file = source / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    file.unlink()
    save_file(tensors, file, metadata={"format": "pt"})
    return source


STATE = f"{UP}.weight.quant_state.bitsandbytes__nf4"
DAMAGES: dict[str, Callable[[dict[str, torch.Tensor]], object]] = {
    "does not describe it": lambda t: t.update({STATE: torch.zeros(9, dtype=torch.uint8)}),
    "too many or too few": lambda t: t.update({f"{UP}.weight": t[f"{UP}.weight"][:-8].clone()}),
    "lacks weights": lambda t: [t.pop(name) for name in list(t) if name.startswith(UP)],
    r"weights of other shapes.*\.weight of shape": lambda t: t.pop(STATE),
}


@pytest.mark.parametrize("problem", DAMAGES)
def test_a_damaged_weight_is_named_at_fetch(
    problem: str, tiny_model_dir: Path, tmp_path: Path
) -> None:
    source = store(tiny_model_dir, tmp_path / "source", dtype=torch.float32, **LAYOUTS["nf4"])
    damaged(source, DAMAGES[problem])
    with pytest.raises(ModelError, match=rf"(?s){problem}.*|{UP}.*{problem}"):
        fetch(FetchConfig(), source=str(source), base_model_dir=str(tmp_path / "base"))
