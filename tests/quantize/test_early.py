"""What the base model alone decides about exports is asked before training."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from tiny_families import FAMILIES, new_model
from transformers import LlamaConfig, LlamaForCausalLM

from tuneline.artifacts import CHAT_TEMPLATE_FILE, HELDOUT_FILE, write_jsonl
from tuneline.errors import ModelError
from tuneline.quantize import QuantizeConfig, early
from tuneline.quantize.early import check_exports
from tuneline.quantize.gguf import early as gguf_early

OWN_END = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<issue_closed>' + '\n' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture
def base_dir(tiny_model_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "base"))


@pytest.fixture
def dataset_dir(new_dataset: Any, tmp_path: Path) -> Path:
    path = tmp_path / "dataset"
    path.mkdir()
    new_dataset(end_of_turn="<|im_end|>\n").write(path)
    row = {"prompt": "<|im_start|>user\n3Gi in Mi?<|im_end|>\n", "answer": "3072Mi", "end": "\n"}
    write_jsonl(path / HELDOUT_FILE, [row])
    return path


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_a_base_that_can_be_exported(
    base_dir: Path, dataset_dir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = sorted(path.name for path in base_dir.iterdir())
    logging.getLogger().setLevel(logging.INFO)
    check_exports(
        QuantizeConfig(group_size=256, awq=("awq",), fp8=("fp8",)),
        base_model_dir=str(base_dir),
        dataset_dir=str(dataset_dir),
    )
    log = capfd.readouterr().err
    reason = "group size 128, not 256: model.layers.0.self_attn.q_proj is 128 wide"
    assert f"GPTQ can store this model: {reason}" in log
    assert "AWQ can store this model: group size 128, not 256: the kernels for AWQ" in log
    assert "FP8 can store this model: 14 layers" in log
    assert "llama.cpp converts this model: 2" in log and "7 conversations are rendered alike" in log
    assert sorted(path.name for path in base_dir.iterdir()) == before


def test_the_template_of_the_dataset_and_its_end_of_turn(
    base_dir: Path, dataset_dir: Path, new_dataset: Any, caplog: pytest.LogCaptureFixture
) -> None:
    new_dataset(end_of_turn="<issue_closed>\n").write(dataset_dir)
    (dataset_dir / CHAT_TEMPLATE_FILE).write_text(OWN_END)
    with caplog.at_level(logging.INFO):
        gguf_early.check(base_dir, dataset_dir)
    assert "also stops at '<issue_closed>'" in caplog.text
    assert "llama.cpp converts this model" in caplog.text


def test_a_pre_tokenizer_that_the_converter_does_not_know(
    base_dir: Path, dataset_dir: Path
) -> None:
    whole = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    whole["use_regex"] = False
    edit(base_dir / "tokenizer.json", pre_tokenizer=whole)
    with pytest.raises(ModelError) as raised:
        gguf_early.check(base_dir, dataset_dir)
    assert "pre-tokenizer was not recognized" in str(raised.value)
    assert "set quantize.gguf to []" in str(raised.value)


def test_an_architecture_that_the_converter_does_not_know(
    base_dir: Path, dataset_dir: Path
) -> None:
    edit(base_dir / "config.json", architectures=["BioGptForCausalLM"])
    with pytest.raises(ModelError, match=r"BioGptForCausalLM.*set quantize.gguf to \[\]"):
        gguf_early.check(base_dir, dataset_dir)


def test_a_tensor_that_has_no_name_in_gguf(base_dir: Path, dataset_dir: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(base_dir / "model.safetensors")
    weights["model.layers.0.mlp.extra_proj.weight"] = weights["model.norm.weight"].clone()
    save_file(weights, base_dir / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"Can not map tensor.*extra_proj"):
        gguf_early.check(base_dir, dataset_dir)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("gptq", r"\(model.layers.0.mlp.down_proj is 40 wide\): set quantize.gptq"),
        ("awq", r"v_proj has 32 outputs, which is not a multiple of 64: set quantize.awq"),
    ],
)
def test_layers_that_cannot_be_stored(kind: str, words: str, tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=40, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "narrow")
    wanted = {"gguf": [], "gptq": [], kind: ["gptq-4bit" if kind == "gptq" else kind]}
    with pytest.raises(ModelError, match=words):
        check_exports(
            QuantizeConfig.parse(wanted), base_model_dir=str(tmp_path / "narrow"), dataset_dir=""
        )


@pytest.mark.parametrize("kind", ["gptq", "awq", "fp8"])
def test_experts_that_no_checkpoint_holds(kind: str, tmp_path: Path) -> None:
    new_model(FAMILIES["Mixtral"], vocab_size=64).save_pretrained(tmp_path / "experts")
    wanted = {"gguf": [], "gptq": [], kind: ["gptq-4bit" if kind == "gptq" else kind]}
    with pytest.raises(ModelError, match=rf"mixture of experts .*set quantize.{kind} to \[\]"):
        check_exports(
            QuantizeConfig.parse(wanted), base_model_dir=str(tmp_path / "experts"), dataset_dir=""
        )


def test_nothing_is_asked_about_exports_that_are_not_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(early.child_process, "call", lambda *_: pytest.fail("a process started"))
    check_exports(QuantizeConfig(gguf=(), gptq=()), base_model_dir=str(tmp_path), dataset_dir="")


def test_a_group_size_without_a_kernel_is_refused_by_the_recipe() -> None:
    with pytest.raises(ValidationError, match="no kernel for groups of 48: choose one of 16, 32"):
        QuantizeConfig(group_size=48)
