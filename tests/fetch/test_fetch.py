"""Fetch: what lands in the directory, what is recorded, and what is refused."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import get_args

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from tuneline.artifacts import ModelOrigin
from tuneline.errors import ModelError, OutputExistsError
from tuneline.fetch import FetchConfig
from tuneline.fetch.kinds import KINDS, KindName, kind_of
from tuneline.fetch.model_card import licence_of
from tuneline.fetch.run import run


@pytest.fixture
def model_dir(tiny_model_dir: Path, tmp_path: Path) -> Path:
    path = tmp_path / "source"
    shutil.copytree(tiny_model_dir, path)
    return path


def fetch(source: object, tmp_path: Path, **config: object) -> ModelOrigin:
    return run(FetchConfig(**config), source=str(source), base_model_dir=str(tmp_path / "out"))


def set_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_builtin_is_the_instruct_model(smollm2_dir: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    # Single digits, as SmolLM2 was trained: the GGUF reader alone makes "123" one token.
    assert tokenizer.tokenize("12345 cats") == ["1", "2", "3", "4", "5", "\u0120cats"]
    assert tokenizer.model_max_length == 8192
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|im_end|>")
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert prompt == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nWhat is the capital of France?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    model = AutoModelForCausalLM.from_pretrained(smollm2_dir)
    assert model.dtype == torch.bfloat16
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    out = model.generate(**ids, max_new_tokens=12, do_sample=False)
    text = tokenizer.decode(out[0][ids["input_ids"].shape[1] :])
    assert text == "The capital of France is Paris.<|im_end|>"


def test_builtin_origin(smollm2_dir: Path) -> None:
    origin = ModelOrigin.read(smollm2_dir)
    assert origin.source == "builtin:smollm2-135m"
    assert origin.licence == "apache-2.0"
    assert origin.architecture == "LlamaForCausalLM"
    # 49152 * 576 + 30 * (576 * (576 * 2 + 192 * 2) + 3 * 576 * 1536 + 2 * 576) + 576
    assert origin.num_parameters == 134_515_008
    config = json.loads((smollm2_dir / "tokenizer_config.json").read_text())
    assert not {"is_local", "local_files_only", "name_or_path"} & set(config)


def test_directory_is_taken_over_bit_by_bit(model_dir: Path, tmp_path: Path) -> None:
    (model_dir / "README.md").write_text("---\nlicense: mit\n---\n# A card\n")
    (model_dir / "pytorch_model.bin").write_bytes(b"pickle")
    # A model that tuneline made is a base as any other.
    for record in ("merge.json", "tuneline.json"):
        (model_dir / record).write_text("{}")
    origin = fetch(model_dir, tmp_path)
    out = tmp_path / "out"
    assert not {"merge.json", "tuneline.json"} & {file.name for file in out.iterdir()}
    ours, theirs = load_file(out / "model.safetensors"), load_file(model_dir / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert origin.num_parameters == sum(tensor.numel() for tensor in theirs.values())
    weights = (model_dir / "model.safetensors").read_bytes()
    assert origin.sha256 == hashlib.sha256(b"model.safetensors" + weights).hexdigest()
    assert origin.licence == "mit"
    assert origin.revision is None
    assert not (out / "pytorch_model.bin").exists()
    assert ModelOrigin.read(out).sha256 == origin.sha256


def test_shards_are_those_of_the_index(model_dir: Path, tmp_path: Path) -> None:
    tensors = load_file(model_dir / "model.safetensors")
    (model_dir / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, model_dir / file)
    save_file(tensors, model_dir / "consolidated.safetensors")
    index = {
        "metadata": {},
        "weight_map": {name: file for file, part in shards.items() for name in part},
    }
    (model_dir / "model.safetensors.index.json").write_text(json.dumps(index))
    origin = fetch(model_dir, tmp_path)
    found = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert found == ["a.safetensors", "b.safetensors"]
    assert origin.num_parameters == sum(tensor.numel() for tensor in tensors.values())
    shutil.rmtree(tmp_path / "out")
    (model_dir / "b.safetensors").unlink()
    with pytest.raises(ModelError, match=r"lacks 1 of the 2 weight files .*b\.safetensors"):
        fetch(model_dir, tmp_path)


def test_no_tokenizer(model_dir: Path, tmp_path: Path) -> None:
    (model_dir / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="has no tokenizer .* copy the tokenizer files"):
        fetch(model_dir, tmp_path)
    assert not (tmp_path / "out").exists()


def test_pickle_only(model_dir: Path, tmp_path: Path) -> None:
    (model_dir / "model.safetensors").rename(model_dir / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"only as pickle \(pytorch_model\.bin\)"):
        fetch(model_dir, tmp_path)


def test_gguf_only_directory(model_dir: Path, tmp_path: Path) -> None:
    (model_dir / "model.safetensors").rename(model_dir / "model.gguf")
    with pytest.raises(ModelError, match="only as GGUF"):
        fetch(model_dir, tmp_path)


def test_cut_off_weights(model_dir: Path, tmp_path: Path) -> None:
    weights = model_dir / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelError, match="was cut off"):
        fetch(model_dir, tmp_path)


def test_quantised_already(model_dir: Path, tmp_path: Path) -> None:
    set_json(model_dir / "config.json", quantization_config={"quant_method": "gptq"})
    with pytest.raises(
        ModelError, match=r"format \(gptq\) that tuneline neither.*name the model in 16"
    ):
        fetch(model_dir, tmp_path)


def test_a_multimodal_family_without_a_causal_language_model(
    model_dir: Path, tmp_path: Path
) -> None:
    set_json(model_dir / "config.json", model_type="mistral3", text_config={"model_type": "llama"})
    with pytest.raises(ModelError, match=r"multimodal model of a family \(mistral3\) that"):
        fetch(model_dir, tmp_path)


def test_adapter_instead_of_model(tmp_path: Path) -> None:
    path = tmp_path / "adapter"
    path.mkdir()
    (path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="is a LoRA adapter"):
        fetch(path, tmp_path)
    with pytest.raises(ModelError, match=r"holds only LoRA adapters \(adapter\)"):
        fetch(tmp_path, tmp_path)


def test_a_model_with_an_adapter_beside_it(model_dir: Path, tmp_path: Path) -> None:
    """As transformers reads it, this directory is the adapter's base model, whatever it holds."""
    LoraConfig(base_model_name_or_path="org/another").save_pretrained(model_dir)
    with pytest.raises(ModelError, match="a complete model and a LoRA adapter .*own: either"):
        fetch(model_dir, tmp_path)


def test_a_directory_of_checkpoints(model_dir: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for number in (500, 1000):
        shutil.copytree(model_dir, run / f"checkpoint-{number}")
    with pytest.raises(ModelError, match="holds 2 of them: name one, e.g. .*/run/checkpoint-1000"):
        fetch(run, tmp_path)


def test_own_code_is_refused_unless_trusted_by_name(model_dir: Path, tmp_path: Path) -> None:
    set_json(
        model_dir / "config.json", model_type="ours", auto_map={"AutoConfig": "modeling.Config"}
    )
    (model_dir / "modeling.py").write_text("raise SystemExit('this must not run')\n")
    with pytest.raises(ModelError, match="needs Python code of its own .*trust_remote_code"):
        fetch(model_dir, tmp_path)
    with pytest.raises(ModelError, match="trust_remote_code names 'another/model'"):
        fetch(model_dir, tmp_path, trust_remote_code="another/model")
    origin = fetch(model_dir, tmp_path, trust_remote_code=str(model_dir))
    assert origin.runs_own_code
    assert (tmp_path / "out" / "modeling.py").is_file()


def test_own_code_that_is_not_needed_is_left(model_dir: Path, tmp_path: Path) -> None:
    set_json(model_dir / "config.json", auto_map={"AutoConfig": "modeling.Config"})
    (model_dir / "modeling.py").write_text("raise SystemExit('this must not run')\n")
    origin = fetch(model_dir, tmp_path)
    assert not origin.runs_own_code
    assert not (tmp_path / "out" / "modeling.py").exists()
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_output_is_not_overwritten(model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    with pytest.raises(OutputExistsError, match="exists and is not empty"):
        fetch(model_dir, tmp_path)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_kinds(tmp_path: Path) -> None:
    assert set(get_args(KindName)) == set(KINDS)
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    (tmp_path / "m.bin").write_bytes(b"x")
    assert kind_of("builtin:smollm2-135m") == "builtin"
    assert kind_of(str(tmp_path)) == "directory"
    assert kind_of(str(tmp_path / "m.gguf")) == "gguf"
    assert kind_of("HuggingFaceTB/SmolLM2-135M-Instruct") == "hub"
    assert kind_of("gpt2") == "hub"
    for wrong in ("./nowhere", "nowhere.gguf", "a/b/c", "two words"):
        with pytest.raises(ModelError, match="no directory or file"):
            kind_of(wrong)
    with pytest.raises(ModelError, match="file of another kind"):
        kind_of(str(tmp_path / "m.bin"))


def test_unknown_builtin(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no built-in model 'llama'.*builtin:smollm2-135m"):
        fetch("builtin:llama", tmp_path)


def test_broken_gguf(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"PK\x03\x04")
    with pytest.raises(ModelError, match="not a GGUF file"):
        fetch(tmp_path / "m.gguf", tmp_path)
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(ModelError, match="cannot be read as a causal language model"):
        fetch(tmp_path / "m.gguf", tmp_path)


def test_ignored_settings_are_named(
    model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fetch(model_dir, tmp_path, revision="v1")
    assert "revision 'v1' is ignored" in caplog.text


@pytest.mark.parametrize(
    ("licence", "recorded"),
    [
        ("[apache-2.0, mit]", "apache-2.0 and mit"),
        ("[mit]", "mit"),
        ("[]", None),
        ("2.0", "2.0"),
        ("{a: b}", None),
        ("other\nlicense_name: llama3.1", "llama3.1"),
        ("[other]\nlicense_name: [a, b]", "a and b"),
        ("other", "other"),
    ],
)
def test_licences_of_a_card(tmp_path: Path, licence: str, recorded: str | None) -> None:
    (tmp_path / "README.md").write_text(f"---\nlicense: {licence}\n---\n# A card\n")
    assert licence_of(tmp_path) == recorded


def test_a_tokenizer_that_ends_every_text(
    model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    set_json(model_dir / "tokenizer_config.json", add_eos_token=True)
    fetch(model_dir, tmp_path)
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert settings["add_eos_token"] is False
    assert "appends an end-of-text token to each text" in caplog.text
