"""A random Llama with two layers and SmolLM2's tokenizer."""

import json
from pathlib import Path


def write_tiny_llama(path: Path, *, vocab_size: int | None = None) -> Path:
    """Write the model as the fetch step does.

    The tokenizer is read from the header of SmolLM2's file: fetching the whole model takes 25 s.
    tests/fetch/test_gguf_tokenizer.py holds its files against those of a fetch.

    Args:
        path: Directory to make.
        vocab_size: Keep the tokens below this ID, and the merges that make them. Loading and
            training are faster so; llama.cpp does not know the result, because it recognises a
            tokenizer by how it splits a text.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from tuneline.artifacts import ModelOrigin, sha256_of
    from tuneline.fetch import FetchConfig, builtin
    from tuneline.fetch.gguf.tokenizer import read_tokenizer, save_tokenizer

    path.mkdir(parents=True)
    tokenizer, context = read_tokenizer(builtin.locate("smollm2-135m"))
    save_tokenizer(tokenizer, context, path)
    if vocab_size is not None:
        _cut(path / "tokenizer.json", vocab_size)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size or len(tokenizer),
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    model.save_pretrained(path)
    weights = path / "model.safetensors"
    ModelOrigin(
        source="tiny",
        licence="apache-2.0",
        architecture="LlamaForCausalLM",
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        num_bytes=weights.stat().st_size,
        sha256=sha256_of([weights]),
    ).write(path, FetchConfig())
    return path


def _cut(tokenizer_json: Path, vocab_size: int) -> None:
    tokenizer = json.loads(tokenizer_json.read_text())
    model = tokenizer["model"]
    vocab = {token: number for token, number in model["vocab"].items() if number < vocab_size}
    pairs = (merge if isinstance(merge, list) else merge.split(" ") for merge in model["merges"])
    model["merges"] = [[a, b] for a, b in pairs if {a, b, a + b} <= vocab.keys()]
    model["vocab"] = vocab
    tokenizer_json.write_text(json.dumps(tokenizer, ensure_ascii=False))
