"""A merged model and an adapter are loaded by transformers 4 and peft 0.13, with equal logits.

The older packages are installed into a directory of their own, which stands before the packages of
this environment. Run by hand: pytest -m slow tests/merge/test_older_readers.py
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tuneline.artifacts import ModelOrigin
from tuneline.merge.weights import copy_companions, write_config
from tuneline.models.sampling import set_sampling
from tuneline.models.tokenizer.files import copy_tokenizer
from tuneline.train.model.adapter import save_adapter

pytestmark = pytest.mark.slow

OLDER = ("transformers==4.57.6", "tokenizers==0.22.1", "huggingface-hub==0.36.0", "peft==0.13.2")
ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 5e5,
}
EXTRA = ["<|user|>", "<|tool|>"]
TEXT = "How many Mi are 3Gi?<|tool|> " * 8
READ = """
import json, sys, torch, transformers, peft
from safetensors.torch import save_file
merged, adapter, out, text = sys.argv[1:]
tokenizer = transformers.AutoTokenizer.from_pretrained(merged)
ids = tokenizer(text, return_tensors="pt")["input_ids"]
model = transformers.AutoModelForCausalLM.from_pretrained(merged, torch_dtype=torch.float32)
with torch.no_grad():
    plain = model(ids).logits
    adapted = peft.PeftModel.from_pretrained(model, adapter)(ids).logits
save_file({"ids": ids, "plain": plain, "adapted": adapted}, out)
print(json.dumps({
    "versions": [transformers.__version__, peft.__version__],
    "special": sorted(tokenizer.all_special_tokens),
    "of_adapter": transformers.AutoTokenizer.from_pretrained(adapter)(text)["input_ids"],
    "greedy": model.generation_config.top_k,
}))
"""


def read(merged: Path, adapter: Path, out: Path, packages: Path | None) -> dict[str, Any]:
    path = [str(packages)] if packages else []
    done = subprocess.run(
        [sys.executable, "-P", "-c", READ, str(merged), str(adapter), str(out), TEXT],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    said: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return said


def test_older_readers_compute_the_same(tiny_model_dir: Path, tmp_path: Path) -> None:
    base, merged, adapter, older = (
        tmp_path / name for name in ("base", "merged", "adapter", "older")
    )
    # Saved by transformers 5, as new models on the Hub are.
    shutil.copytree(tiny_model_dir, base)
    settings = json.loads((base / "config.json").read_text())
    settings["rope_parameters"] = ROPE
    (base / "config.json").write_text(json.dumps(settings))
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"additional_special_tokens": EXTRA})
    tokenizer.save_pretrained(base)
    assert json.loads((base / "tokenizer_config.json").read_text())["extra_special_tokens"] == EXTRA
    weights = load_file(base / "model.safetensors")
    tokens = weights["model.embed_tokens.weight"]
    weights["model.embed_tokens.weight"] = torch.cat([tokens, torch.randn(2, tokens.shape[1])])
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    settings["vocab_size"] += 2
    (base / "config.json").write_text(json.dumps(settings))

    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    tuned = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    save_adapter(tuned, adapter, ModelOrigin.read(base))
    copy_tokenizer(base, adapter)
    merged.mkdir()
    copy_companions(base_model_dir=base, adapter_dir=adapter, directory=merged)
    write_config(base_model_dir=base, dtype="float32", directory=merged)
    set_sampling(merged, "greedy")
    shutil.copyfile(base / "model.safetensors", merged / "model.safetensors")

    install = ["-m", "pip", "install", "--quiet", "--no-deps", "--target", str(older), *OLDER]
    subprocess.run([sys.executable, *install], check=True)
    said, files = [], []
    for number, packages in enumerate((None, older)):
        out = tmp_path / f"{number}.safetensors"
        said.append(read(merged, adapter, out, packages))
        files.append(load_file(out))
    assert said[1].pop("versions") == ["4.57.6", "0.13.2"] != said[0].pop("versions")
    assert said[0] == said[1]
    assert set(EXTRA) <= set(said[1]["special"]) and said[1]["greedy"] == 1
    ours, theirs = files
    assert torch.equal(ours["ids"], theirs["ids"])
    for name in ("plain", "adapted"):
        assert torch.allclose(ours[name], theirs[name], atol=1e-4, rtol=1e-4), name
    assert not torch.allclose(ours["plain"], ours["adapted"], atol=1e-2)
