"""Every family that is trained goes through merge and GGUF: tiny random models, logits compared.

Run by hand: pytest -m slow tests/quantize/gguf/test_families.py
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from small_records import new_training

from tuneline.artifacts import (
    HELDOUT_FILE,
    DatasetManifest,
    ModelOrigin,
    write_jsonl,
)
from tuneline.errors import ProofError
from tuneline.merge import MergeConfig
from tuneline.merge.run import run as merge
from tuneline.quantize.gguf import converter
from tuneline.quantize.gguf.llama_model import LlamaFile
from tuneline.quantize.proof.transformers_model import TransformersModel
from tuneline.quantize.run import convert

pytestmark = pytest.mark.slow

SIZES = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 2048,
}
GEMMA = {"query_pre_attn_scalar": 32, "sliding_window": 64}
BYTE_PAIRS = {
    "Llama": {},
    "Mistral": {},
    "Qwen3": {"tie_word_embeddings": True},
}
# Of Qwen2 transformers replaces the pre-tokenizer by name, which llama.cpp then does not know.
# From 4B on, whose text model is trained and exported.
SEES = "Gemma3 with a vision tower"
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
VISION |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
PIECES = {"Qwen2": {}, "Phi3": {"num_key_value_heads": 4}, "Gemma2": GEMMA, "Gemma3": GEMMA}
PIECES |= {SEES: GEMMA}
LINEAR = r"(?!.*vision).*\.(q|k|v|o|qkv|gate|up|down|gate_up)_proj"


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def save_model(path: Path, family: str, vocab_size: int, ends: dict, **changes) -> None:
    import transformers

    if family == SEES:
        torch.manual_seed(0)
        config = transformers.Gemma3Config(
            text_config={**SIZES, "vocab_size": vocab_size, **ends, **changes},
            vision_config=VISION,
            **ends,
        )
        model = transformers.Gemma3ForConditionalGeneration(config)
        model.generation_config.update(**ends)
        model.save_pretrained(path)
        return
    kind = "Gemma3Text" if family == "Gemma3" else family
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        **{**SIZES, "vocab_size": vocab_size, **ends, **changes}
    )
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    model.generation_config.update(**ends)
    model.save_pretrained(path)


@pytest.fixture
def merged(tmp_path: Path, tiny_model_dir: Path, new_dataset, train_pieces):
    """Make a family's base, a random adapter on it and the merged model of both."""

    def make(family: str) -> tuple[Path, float]:
        base = tmp_path / "base"
        left_out = shutil.ignore_patterns("*.safetensors", "config.json")
        shutil.copytree(tiny_model_dir, base, ignore=left_out)
        # By name transformers would give some families a tokenizer that is not this one.
        plain = base / "tokenizer_config.json"
        settings = json.loads(plain.read_text())
        plain.write_text(json.dumps({**settings, "tokenizer_class": "PreTrainedTokenizerFast"}))
        if family in PIECES:
            # Its converter reads the pieces, which are not the tokenizer's tokens: for these
            # families only logits are compared.
            train_pieces(base)
        settings = json.loads((tiny_model_dir / "config.json").read_text())
        ends = {name: settings[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        changes = (BYTE_PAIRS | PIECES)[family]
        save_model(base, family, settings["vocab_size"], ends, **changes)
        ModelOrigin(
            source=family,
            architecture=f"{family}ForCausalLM",
            num_parameters=1,
            num_bytes=1,
            sha256="b" * 64,
        ).write(base)
        save_adapter(base, tmp_path / "adapter")
        save_dataset(tmp_path / "dataset", new_dataset(num_train_rows=0, num_heldout_rows=4))
        proof = merge(
            MergeConfig(dtype="float32"),
            base_model_dir=base,
            adapter_dir=tmp_path / "adapter",
            dataset_dir=tmp_path / "dataset",
            merged_dir=tmp_path / "merged",
        )
        return tmp_path / "merged", proof.mean_kl

    return make


def save_adapter(base: Path, path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=LINEAR, task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    adapted.save_pretrained(path)
    new_training().write(path)


def save_dataset(path: Path, manifest: DatasetManifest) -> None:
    path.mkdir()
    rows = [{"prompt": f"How much is {n} Ki?", "answer": f" {n * 1024}"} for n in range(4)]
    write_jsonl(path / HELDOUT_FILE, [{**row, "end": "", "question": ""} for row in rows])
    manifest.write(path)


def kl_of(file: Path, merged_dir: Path) -> float:
    """Return the mean KL a token, transformers against llama.cpp, over 40 tokens."""
    model = TransformersModel(merged_dir)
    ids = [(7 * n * n + 3 * n) % 900 + 5 for n in range(40)]
    p_TV = model.logits(ids).log_softmax(-1)
    with LlamaFile(file, num_context=64) as loaded:
        q_TV = torch.from_numpy(loaded.logits(ids)).log_softmax(-1)
    return (p_TV.exp() * (p_TV - q_TV)).sum(-1).mean().item()


@pytest.mark.parametrize("family", [*BYTE_PAIRS, *PIECES])
def test_merged_and_converted_say_what_transformers_says(merged, tmp_path: Path, family) -> None:
    merged_dir, mean_kl = merged(family)
    assert mean_kl < 1e-6
    if family in BYTE_PAIRS:
        # With the whole proof: tokenizer, template, stop tokens, KL.
        record = convert(merged_dir=str(merged_dir), gguf_dir=str(tmp_path / "f16"))
        file = tmp_path / "f16" / record.file
    else:
        file = tmp_path / "model.gguf"
        converter.convert(merged_dir, file)
    found = kl_of(file, merged_dir)
    print(f"{family}: merge {mean_kl:.1e}, f16 {found:.1e} nats per token")
    assert found < 1e-4


def test_a_weight_that_was_spoilt_after_the_merge_is_caught(merged, tmp_path: Path) -> None:
    """The f16 file is made from one model and held against another: no file is kept."""
    from safetensors.torch import load_file, save_file

    merged_dir, _ = merged("Llama")
    file = merged_dir / "model.safetensors"
    weights = load_file(file)
    spoilt = {name: weight.clone() for name, weight in weights.items()}
    spoilt["model.layers.1.mlp.down_proj.weight"].mul_(-1)
    right = converter.convert

    def convert_another(model_dir: Path, target: Path) -> None:
        save_file(spoilt, file, metadata={"format": "pt"})
        right(model_dir, target)
        save_file(weights, file, metadata={"format": "pt"})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(converter, "convert", convert_another)
        with pytest.raises(ProofError, match="export f16 is .* nats per token"):
            convert(merged_dir=str(merged_dir), gguf_dir=str(tmp_path / "f16"))
    assert not (tmp_path / "f16").exists()
