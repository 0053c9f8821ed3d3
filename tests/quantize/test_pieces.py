"""Families with a sentencepiece vocabulary: the whole proof of an f16 file, their real layouts.

A random model of two layers, its vocabulary trained here; files, special tokens, templates and stop
tokens are laid out as in the published models.
"""

from pathlib import Path

import pytest
import torch

from tuneline.artifacts import MergeProof
from tuneline.errors import ProofError
from tuneline.models.tokenizer.files import copy_tokenizer
from tuneline.quantize.proof import probes
from tuneline.quantize.run import convert

SIZES = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": 2048,
}


@pytest.mark.parametrize(
    ("family", "lay_out", "num_rendered", "ends"),
    [
        ("Phi3", "phi3", 7, ["<|endoftext|>", "<|assistant|>", "<|end|>"]),
        ("Gemma2", "gemma2", 5, ["<eos>", "<end_of_turn>"]),
        pytest.param("Mistral", "mistral", 5, ["</s>"], marks=pytest.mark.slow),
    ],
)
def test_the_whole_proof(family, lay_out, num_rendered, ends, tmp_path: Path, layouts) -> None:
    merged = save_merged(tmp_path, family, layouts[lay_out])
    record = convert(merged_dir=str(merged), gguf_dir=str(tmp_path / "f16"))
    assert record.mean_kl < 1e-5
    assert record.num_tokenizer_texts == 1 + len(probes.texts()) + num_rendered
    assert record.num_conversations == num_rendered
    assert record.stop_tokens == ends
    assert not any("Ollama" in note for note in record.notes)


def test_special_tokens_that_transformers_forgets_are_missed(tmp_path: Path, layouts) -> None:
    """A tokenizer saved by transformers 5 is whole for it alone: why files are copied."""
    from transformers import AutoTokenizer

    merged = save_merged(tmp_path, "Gemma2", layouts["gemma2"])
    AutoTokenizer.from_pretrained(merged).save_pretrained(merged)
    MergeProof.read(merged).write(merged)
    with pytest.raises(ProofError, match="splits 5 of .* '<bos><start_of_turn>user"):
        convert(merged_dir=str(merged), gguf_dir=str(tmp_path / "f16"))
    assert not (tmp_path / "f16").exists()


def save_merged(tmp_path: Path, family: str, lay_out) -> Path:
    """Return a directory as merge would leave it."""
    import transformers

    base, merged = tmp_path / "base", tmp_path / "merged"
    base.mkdir()
    settings = lay_out(base)
    stops = settings.pop("stops")
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **settings})
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    model.generation_config.eos_token_id = stops
    model.save_pretrained(merged)
    copy_tokenizer(base, merged)
    proof = {"base": "original", "dtype": "float32", "num_bytes": 1, "num_shards": 1}
    proof |= {"num_merged_modules": 1, "num_prompts": 1, "max_logit_difference": 0.0}
    MergeProof(**proof, mean_kl=0.0, top1_agreement=1.0, max_mean_kl=0.01).write(merged)
    return merged
