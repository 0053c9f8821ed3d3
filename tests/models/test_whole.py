"""A model whose files and architecture differ is refused by the names of the tensors."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_families import FAMILIES, write_checkpoint
from transformers import GPT2Config, GPT2LMHeadModel

from tuneline.errors import ModelError
from tuneline.evaluate import model as evaluated
from tuneline.fetch import FetchConfig
from tuneline.fetch.run import run as fetch
from tuneline.models.nf4 import load_base
from tuneline.models.whole import check_names, load_whole
from tuneline.quantize.proof.transformers_model import TransformersModel

NORM = "model.layers.1.input_layernorm.weight"


@pytest.fixture
def model_dir(tiny_model_dir: Path, tmp_path: Path) -> Path:
    path = tmp_path / "model"
    shutil.copytree(tiny_model_dir, path)
    return path


def change(model_dir: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    file = model_dir / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    file.unlink()
    save_file(tensors, file, metadata={"format": "pt"})


LOADERS: list[Callable[[Path], object]] = [
    lambda path: load_base(path, dtype=torch.float32, device="cpu", quantized=False),
    lambda path: load_base(path, dtype=torch.float32, device="cpu", quantized=True),
    lambda path: TransformersModel(path),
    lambda path: evaluated.load(path, evaluated.load_tokenizer(path), batch_size=1),
    lambda path: fetch(
        FetchConfig(), source=str(path), base_model_dir=str(path.parent / "fetched")
    ),
]


@pytest.mark.parametrize("load", LOADERS)
def test_a_missing_weight_is_never_random(model_dir: Path, load: Callable[[Path], object]) -> None:
    change(model_dir, lambda tensors: tensors.pop(NORM))
    with pytest.raises(ModelError, match=rf"lacks weights of its architecture.*: {NORM}\. Take"):
        load(model_dir)


def test_a_16_bit_file_that_stays_mapped(model_dir: Path) -> None:
    def narrow(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({name: tensor.bfloat16() for name, tensor in tensors.items()})
        del tensors[NORM]

    change(model_dir, narrow)
    with pytest.raises(ModelError, match=f"would be random: {NORM}"):
        TransformersModel(model_dir)


def test_a_tensor_without_a_place(model_dir: Path) -> None:
    names = [f"model.layers.{number}.extra.weight" for number in range(5)]
    change(model_dir, lambda tensors: tensors.update({n: torch.zeros(2) for n in names}))
    with pytest.raises(ModelError, match=rf"does not use: {names[0]}, .* and 2 more\. Take"):
        check_names(model_dir, called="org/name")


def test_a_tensor_of_another_shape(model_dir: Path) -> None:
    change(model_dir, lambda tensors: tensors.update({NORM: torch.ones(64)}))
    for load in (load_whole, lambda path: check_names(path, called="org/name")):
        with pytest.raises(ModelError, match=rf"{NORM} of shape \(64,\) for \(128,\)"):
            load(model_dir)


def test_an_unknown_architecture(model_dir: Path) -> None:
    settings = json.loads((model_dir / "config.json").read_text()) | {"model_type": "unheard-of"}
    (model_dir / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match="does not support the model org/name .*unheard-of"):
        check_names(model_dir, called="org/name")


def test_tied_embeddings_are_whole(model_dir: Path) -> None:
    check_names(model_dir, called="org/name")
    assert load_whole(model_dir).lm_head.weight.shape == (49152, 128)


def test_what_files_may_have_beside_the_weights(model_dir: Path) -> None:
    """A copy of tied embeddings, and the frequencies that old versions of transformers stored."""

    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(16)

    change(model_dir, add)
    check_names(model_dir, called="org/name")
    load_whole(model_dir)


def test_generation_is_greedy_whatever_the_base_samples(model_dir: Path) -> None:
    prompt = torch.tensor([[100, 200, 100, 200, 100]])
    plain = load_whole(model_dir).generate(prompt, max_new_tokens=12)
    sampling = {"do_sample": True, "temperature": 5.0, "repetition_penalty": 3.0}
    settings = sampling | {"eos_token_id": [0, 2], "pad_token_id": 2}
    (model_dir / "generation_config.json").write_text(json.dumps(settings))
    model = load_whole(model_dir)
    assert model.generation_config.eos_token_id == [0, 2]
    assert torch.equal(model.generate(prompt, max_new_tokens=12), plain)


def test_layers_for_multi_token_prediction_are_left_out(
    smollm2_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "model"
    settings = {"num_nextn_predict_layers": 1}
    write_checkpoint(FAMILIES["DeepSeek V3"], path, tokenizer_dir=smollm2_dir, **settings)
    extra = "model.layers.2.eh_proj.weight"
    change(path, lambda tensors: tensors.update({extra: torch.zeros(64, 128)}))
    with caplog.at_level("INFO"):
        check_names(path, called="org/name")
    assert (
        "org/name has layers for multi-token prediction, which transformers does not" in caplog.text
    )
    change(path, lambda tensors: tensors.update({extra.replace("2", "3"): torch.zeros(2)}))
    with pytest.raises(ModelError, match=r"does not use: model\.layers\.3\.eh_proj\.weight"):
        check_names(path, called="org/name")


def test_old_buffers_and_second_copies_of_a_matrix_are_no_fault(
    smollm2_dir: Path, tmp_path: Path
) -> None:
    """Files of Llama 2 and Yi hold inv_freq; some files hold both of two tied matrices."""
    for family in ("Yi", "Qwen2", "Mixtral"):
        path = write_checkpoint(FAMILIES[family], tmp_path / family, tokenizer_dir=smollm2_dir)
        old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(16)}
        if family == "Qwen2":
            matrix = load_file(path / "model.safetensors")["model.embed_tokens.weight"]
            old["lm_head.weight"] = matrix.clone()
        change(path, lambda tensors, old=old: tensors.update(old))
        check_names(path, called=family)


@pytest.mark.parametrize(
    ("family", "weight"),
    [
        ("Mixtral", "model.layers.1.block_sparse_moe.experts.2.w1.weight"),
        ("Qwen3-MoE", "model.layers.1.mlp.experts.3.down_proj.weight"),
    ],
)
def test_a_missing_expert_is_named(
    smollm2_dir: Path, tmp_path: Path, family: str, weight: str
) -> None:
    path = write_checkpoint(FAMILIES[family], tmp_path / "model", tokenizer_dir=smollm2_dir)
    change(path, lambda tensors: tensors.pop(weight))
    with pytest.raises(ModelError, match=f"lacks weights of experts: {weight}. Download"):
        check_names(path, called="org/name")


def test_a_model_without_linear_layers_is_refused(smollm2_dir: Path, tmp_path: Path) -> None:
    gpt2 = GPT2Config(vocab_size=49152, n_embd=32, n_layer=1, n_head=2)
    path = tmp_path / "gpt2"
    GPT2LMHeadModel(gpt2).save_pretrained(path)
    shutil.copy(smollm2_dir / "tokenizer.json", path)
    with pytest.raises(ModelError, match=r"gpt2 \(GPT2LMHeadModel\) has no linear layers that can"):
        fetch(FetchConfig(), source=str(path), base_model_dir=str(tmp_path / "fetched"))
