"""Mixtures of experts as GGUF: llama.cpp computes what transformers computes, with the whole proof.

One family by default; all with pytest -m slow.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from small_records import new_merge
from tiny_families import FAMILIES, new_model, write_checkpoint
from transformers import AutoTokenizer

from tuneline.errors import ToolError
from tuneline.quantize import QuantizeConfig
from tuneline.quantize.gguf import converter
from tuneline.quantize.gguf.support import gguf_problem
from tuneline.quantize.run import convert, run

# What the published models of a family have, and llama.cpp takes for granted.
SETTINGS: dict[str, dict[str, Any]] = {
    "Mixtral": {},
    "Qwen2-MoE": {},
    "Qwen3-MoE": {},
    "DeepSeek V2": {"q_lora_rank": 32},
    "DeepSeek V3": {},
    "GLM-4-MoE": {"use_qk_norm": True, "attention_bias": True, "routed_scaling_factor": 2.5},
    "gpt-oss": {},
}
# llama.cpp knows DeepSeek V2 Lite, whose queries have one matrix, by its 27 layers.
LITE = {"num_hidden_layers": 27}


TOKENS = {"GLM-4-MoE": ["[gMASK]", "<|user|>", "<|observation|>"]}
"""Special tokens that the converter looks for in the tokenizer of a family."""


def as_merged(family: str, path: Path, tokenizer_dir: Path, **settings: Any) -> Path:
    if family in TOKENS:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
        tokenizer.add_tokens(TOKENS[family], special_tokens=True)
        tokenizer_dir = path.with_name("tokenizer")
        tokenizer.save_pretrained(tokenizer_dir)
    write_checkpoint(FAMILIES[family], path, tokenizer_dir=tokenizer_dir, **settings)
    new_merge().write(path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "settings"), [*((f, s) for f, s in SETTINGS.items()), ("DeepSeek V2", LITE)]
)
def test_every_family(
    family: str, settings: dict[str, Any], tiny_model_dir: Path, tmp_path: Path
) -> None:
    merged = as_merged(family, tmp_path / "merged", tiny_model_dir, **settings)
    record = convert(merged_dir=str(merged), gguf_dir=str(tmp_path / "f16"))
    assert record.mean_kl is not None and record.mean_kl < 1e-4
    # A random model may have two tokens that are as likely at one of the 276 positions.
    assert record.top1_agreement is not None and record.top1_agreement > 0.99


@pytest.mark.parametrize(
    ("family", "settings", "problem"),
    [
        (
            "Qwen3-MoE",
            {"norm_topk_prob": False},
            "norm_topk_prob false, but llama.cpp always normalises",
        ),
        ("Qwen2-MoE", {"norm_topk_prob": True}, "norm_topk_prob true, but .* never normalises"),
        ("Phi-3.5-MoE", {}, "SparseMixer"),
        ("DeepSeek V2", {}, "2 layers and no q_lora_rank, but .* by its 27 layers"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused_before_the_conversion(
    family: str, settings: dict[str, Any], problem: str, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """Measured: 29 % of the first one's tokens differ, and the last one does not load."""
    path = tmp_path / "model"
    write_checkpoint(FAMILIES[family], path, tokenizer_dir=tiny_model_dir, **settings)
    with pytest.raises(ToolError, match=f"does not compute this model as transf.*{problem}"):
        converter.convert(path, tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()


@pytest.mark.parametrize("family", [*SETTINGS, "Llama 3"])
def test_no_other_family_is_refused(family: str, tmp_path: Path) -> None:
    new_model(FAMILIES[family], vocab_size=8, **SETTINGS.get(family, {})).config.save_pretrained(
        tmp_path
    )
    assert gguf_problem(json.loads((tmp_path / "config.json").read_text())) is None


@pytest.mark.slow
def test_experts_in_8_bits(tiny_model_dir: Path, dataset_dir: Path, tmp_path: Path) -> None:
    merged = as_merged("Mixtral", tmp_path / "merged", tiny_model_dir)
    record = run(
        QuantizeConfig(),
        format="q8_0",
        merged_dir=str(merged),
        dataset_dir=str(dataset_dir),
        quantized_dir=str(tmp_path / "q8_0"),
    )
    # Of each of two layers: four matrices of attention, and three stacks of experts. Besides them
    # embeddings and head.
    assert record.tensor_types["q8_0"] == 2 * (4 + 3) + 2
    assert record.mean_kl is not None and record.mean_kl < 0.01
