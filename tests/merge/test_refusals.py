"""What merge refuses, and what it leaves behind when it fails."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from tuneline.errors import ModelError, OutputExistsError, WorldError


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        ({"use_dora": True}, None, "use_dora=True"),
        ({"peft_type": "IA3"}, None, "only LORA"),
        (None, {"base_model.model.model.embed_tokens.lora_embedding_A": 1}, "lora_embedding_A"),
        (None, {"base_model.model.model.embed_tokens.weight": 1}, "one matrix"),
        (
            None,
            {
                "base_model.model.model.layers.9.mlp.up_proj.lora_A.weight": 1,
                "base_model.model.model.layers.9.mlp.up_proj.lora_B.weight": 1,
            },
            r"1 updates of model\.layers\.9\.mlp\.up_proj, but the base model has 0",
        ),
        (None, {"base_model.model.model.layers.0.x.lora_A.weight": 1}, "only one of lora_A"),
    ],
)
def test_adapters_that_would_add_up_otherwise_are_refused(
    merge, tmp_path, adapter_dir, config, tensors, message, changed_adapter
):
    tensors = {name: torch.ones(4, 4) for name in tensors or ()}
    adapter = changed_adapter(adapter_dir, tmp_path / "adapter", config=config, tensors=tensors)
    with pytest.raises(ModelError, match=message):
        merge(adapter=adapter)
    assert not (tmp_path / "out" / "merged").exists()


def test_another_base_than_the_adapters(merge, tmp_path, tiny_model_dir):
    other = tmp_path / "other"
    shutil.copytree(tiny_model_dir, other)
    origin = json.loads((other / "origin.json").read_text())
    (other / "origin.json").write_text(json.dumps({**origin, "sha256": "f" * 64}))
    with pytest.raises(ModelError, match=r"trained on a base model with sha256 .* ffffffffffff"):
        merge(base_model_dir=other)


@pytest.mark.parametrize("cut", ["base/model.safetensors", "adapter/adapter_model.safetensors"])
def test_a_file_that_was_cut_is_named_before_anything_is_read(
    merge, cut, tmp_path, tiny_model_dir, adapter_dir
):
    shutil.copytree(tiny_model_dir, tmp_path / "base")
    shutil.copytree(adapter_dir, tmp_path / "adapter")
    os.truncate(tmp_path / cut, 1000)
    with pytest.raises(WorldError, match=rf"{cut} was changed after it was made: its SHA-256"):
        merge(base_model_dir=tmp_path / "base", adapter=tmp_path / "adapter", as_recorded=True)
    (tmp_path / cut).unlink()
    with pytest.raises(WorldError, match=rf"{cut} is missing\. Run the step"):
        merge(base_model_dir=tmp_path / "base", adapter=tmp_path / "adapter", as_recorded=True)


def test_an_adapter_with_another_vocabulary(merge, tmp_path, adapter_dir, changed_adapter):
    adapter = changed_adapter(adapter_dir, tmp_path / "adapter")
    file = adapter / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["<|one|>"], vocab["<|other|>"] = 49152, 49153
    file.write_text(json.dumps(tokenizer))
    with pytest.raises(ModelError, match=r"and 2 differ, first .*trained with another tokenizer"):
        merge(adapter=adapter)


@pytest.mark.parametrize("added", [True, False])
def test_a_tokenizer_with_more_tokens_than_the_model(
    merge, added, tmp_path, tiny_model_dir, adapter_dir, caplog, changed_adapter
):
    """An added token is only warned of: Gemma-3 of 1B has one, for images."""
    base = tmp_path / "base"
    shutil.copytree(tiny_model_dir, base)
    adapter = changed_adapter(adapter_dir, tmp_path / "adapter")
    for path in (base, adapter):
        tokenizer = json.loads((path / "tokenizer.json").read_text())
        if added:
            flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            token = {"id": 49152, "content": "<|more|>", "special": True, **flags}
            tokenizer["added_tokens"].append(token)
        else:
            tokenizer["model"]["vocab"]["<|more|>"] = 49152
        (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    if added:
        merge(base_model_dir=base, adapter=adapter)
        assert r"no embedding for the tokens ['<|more|>']" in caplog.text
        return
    with pytest.raises(
        ModelError, match=r"has 1 tokens, first '<\|more\|>', with IDs from 49152 on"
    ):
        merge(base_model_dir=base, adapter=adapter)


def test_an_adapter_without_its_record(merge, tmp_path):
    with pytest.raises(WorldError, match=r"no training\.json"):
        merge(adapter=tmp_path)


def test_output_that_is_not_empty(merge, tmp_path):
    kept = tmp_path / "out" / "merged" / "kept"
    kept.parent.mkdir(parents=True)
    kept.write_text("mine")
    with pytest.raises(OutputExistsError, match="not empty"):
        merge()
    assert kept.read_text() == "mine"


def test_a_full_disk_is_one_sentence_and_leaves_the_rest_whole(
    small_disk, tiny_model_dir, adapter_dir, small_dataset_dir
):
    earlier = small_disk / "earlier"
    earlier.mkdir()
    (earlier / "data").write_bytes(b"whole" * 1000)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "tuneline.merge", "--base-model", str(tiny_model_dir)),
            *("--adapter", str(adapter_dir), "--dataset", str(small_dataset_dir)),
            *("--merged", str(small_disk / "merged")),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("merge: StorageError: the disk is full")
    assert [path.name for path in small_disk.iterdir()] == ["earlier"]
    assert (earlier / "data").read_bytes() == b"whole" * 1000
