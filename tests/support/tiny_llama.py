"""A random Llama with two layers and SmolLM2's tokenizer."""

import json
import shutil
from pathlib import Path


def write_tiny_llama(path: Path, smollm2_dir: Path, *, vocab_size: int | None = None) -> Path:
    """Write the model as the fetch step does.

    Args:
        path: Directory to make.
        smollm2_dir: Directory of SmolLM2, for its tokenizer.
        vocab_size: Keep the tokens below this ID, and the merges that make them. Loading and
            training are faster so; llama.cpp does not know the result, because it recognises a
            tokenizer by how it splits a text.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from tuneline.record import hash_files
    from tuneline.seals import sealed_json

    shutil.copytree(smollm2_dir, path, ignore=shutil.ignore_patterns("*.safetensors*"))
    settings = json.loads((smollm2_dir / "config.json").read_text())
    if vocab_size is not None:
        _cut(path / "tokenizer.json", vocab_size)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size or settings["vocab_size"],
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            bos_token_id=settings.get("bos_token_id"),
            eos_token_id=settings.get("eos_token_id"),
            pad_token_id=settings.get("pad_token_id"),
        )
    )
    model.save_pretrained(path)
    origin = json.loads((path / "origin.json").read_text())
    origin.update(
        source="tiny",
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        num_bytes=(path / "model.safetensors").stat().st_size,
        files=hash_files(path, leave_out={"origin.json"}),
    )
    (path / "origin.json").write_text(sealed_json(origin))
    return path


def _cut(tokenizer_json: Path, vocab_size: int) -> None:
    tokenizer = json.loads(tokenizer_json.read_text())
    model = tokenizer["model"]
    vocab = {token: number for token, number in model["vocab"].items() if number < vocab_size}
    pairs = (merge if isinstance(merge, list) else merge.split(" ") for merge in model["merges"])
    model["merges"] = [[a, b] for a, b in pairs if {a, b, a + b} <= vocab.keys()]
    model["vocab"] = vocab
    tokenizer_json.write_text(json.dumps(tokenizer, ensure_ascii=False))
