"""The README's table of model families, and each of its rows with a tiny model of the family.

usage: PYTHONPATH=tests/support python tests/test_families.py
prints the table.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tiny_families import FAMILIES, Family, fetch_family, new_model

from tuneline.artifacts import MergeProof, TrainingSummary
from tuneline.errors import ModelError
from tuneline.kernels import patch
from tuneline.kinds import ExportKind
from tuneline.merge import MergeConfig
from tuneline.merge.run import run as merge
from tuneline.prepare import PrepareConfig
from tuneline.prepare.run import run as prepare
from tuneline.quantize import QuantizeConfig
from tuneline.quantize.awq.families import awq_problem
from tuneline.quantize.checkpoint.experts import check_experts
from tuneline.quantize.gguf.support import gguf_problem
from tuneline.quantize.run import run as quantize
from tuneline.train import TrainConfig
from tuneline.train.run import run as train

UNPACKED = ("gpt-oss", "Qwen3.5", "Qwen3.5-MoE", "Qwen3-Next")
"""Families whose rows are padded, because rows of a pack would see each other."""
GGUF = {
    *("Llama 3", "Yi", "Mistral", "Qwen2", "Qwen3", "Phi-3", "Gemma 2", "Gemma 3"),
    *("Mixtral", "Qwen2-MoE", "Qwen3-MoE", "DeepSeek V2", "DeepSeek V3", "GLM-4-MoE", "gpt-oss"),
}
"""Families whose GGUF files are proven, by the line or by tests/quantize/gguf, whose tokenizers and
settings are of the right kind. Others are not tried."""
GPTQ = {"Llama 3", "Yi"}
"""Families whose GPTQ exports are proven, by tests/quantize/gptq."""
AWQ = {
    *("Llama 3", "Yi", "Mistral", "Ministral 3", "Qwen2", "Qwen3", "Gemma 2", "SmolLM3", "Granite"),
    "OLMo 3",
}
"""Families whose AWQ exports are proven, by tests/quantize/awq. FP8 exports of all families without
experts are proven, by tests/quantize/fp8."""
BY_THE_LINE = {"Llama 3", "Yi", "Mistral", "Mixtral", "gpt-oss"}
"""Those of them that a byte-pair tokenizer suits."""

_PARTS = {
    "attention": ("self_attn", "linear_attn"),
    "shared experts": ("shared_expert",),
    "experts": (".experts.",),
    "MLP": (".mlp.",),
}
"""Parts of the names of weights, by what they belong to; the first one that fits counts."""


@dataclass(frozen=True)
class Line:
    """What came of the line of a family."""

    training: TrainingSummary
    proof: MergeProof
    adapted: frozenset[str]
    """What the adapter is on, in the words of the table."""
    base_dir: Path
    merged_dir: Path


def write_dataset(directory: Path, base_model_dir: Path) -> Path:
    """Prepare forty questions with the template of a base model; return the dataset's directory."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"How many Mi are {number}Gi?"},
                {"role": "assistant", "content": f"{number * 1024}Mi"},
            ]
        }
        for number in range(1, 41)
    ]
    source = directory / "rows.jsonl"
    directory.mkdir()
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare(
        PrepareConfig(max_seq_length=128, eval_share=0.1),
        source=str(source),
        base_model_dir=str(base_model_dir),
        dataset_dir=str(directory / "dataset"),
        statistics_path=str(directory / "statistics.html"),
    )
    return directory / "dataset"


def run_line(family: Family, work: Path, *, tokenizer_dir: Path, dataset_dir: Path) -> Line:
    """Train a tiny model of a family with the default recipe, experts included, and merge it."""
    lora: dict[str, Any] = {"experts": True} if family.has_experts else {}
    base = fetch_family(family, work / "base", tokenizer_dir=tokenizer_dir)
    training = train(
        TrainConfig.parse(
            {
                "lora": lora,
                **{"max_steps": 4, "global_batch_size": 2, "learning_rate": 5e-3},
                **{"dtype": "float32", "sample_tokens": 4},
            }
        ),
        base_model_dir=base,
        dataset_dir=dataset_dir,
        adapter_dir=work / "adapter",
        curves_path=work / "curves.html",
    )
    with safe_open(work / "adapter" / "adapter_model.safetensors", framework="pt") as tensors:
        adapted = frozenset(map(_part, tensors.keys()))
    proof = merge(
        MergeConfig(dtype="float32"),
        base_model_dir=base,
        adapter_dir=work / "adapter",
        dataset_dir=dataset_dir,
        merged_dir=work / "merged",
    )
    return Line(training, proof, adapted, base, work / "merged")


def make_gguf(line: Line, work: Path, dataset_dir: Path) -> float:
    """Make a GGUF file in 8 bits; return its KL divergence from the merged model."""
    record = quantize(
        QuantizeConfig(num_benchmark_rows=0),
        format="q8_0",
        merged_dir=str(line.merged_dir),
        dataset_dir=str(dataset_dir),
        quantized_dir=str(work / "q8_0"),
    )
    assert record.mean_kl is not None
    return record.mean_kl


def reach(family: Family) -> frozenset[str]:
    """Return what the table says that the adapter of a family is on."""
    model = _empty(family)
    names = [f"{name}.weight" for name, module in model.named_modules() if _is_linear(module)]
    return frozenset({_part(name) for name in names if ".layers." in name}) | (
        {"experts"} if family.has_experts else set()
    )


def can_be_checkpoint(base_dir: Path, kind: ExportKind) -> bool:
    """Return whether a quantised checkpoint is tried; if not, it is refused before training."""
    try:
        check_experts(base_dir, kind)
    except ModelError:
        return False
    return True


def table() -> str:
    """Return the table of families, in Markdown."""
    lines = [
        "| family | default recipe | adapter on | 4-bit base | merge | GGUF | GPTQ | AWQ | FP8 "
        "| kernels |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for family in FAMILIES.values():
        found = reach(family)
        parts = [part for part in _PARTS if part in found]
        words = ", ".join(part if part != "experts" else "experts*" for part in parts)
        trains = "unpacked" if family.name in UNPACKED else "packed"
        checkpoints = " | ".join(_checkpoints(family))
        gguf = "proven" if family.name in GGUF else "not tried"
        # llama.cpp recognises DeepSeek V2 Lite by its 27 layers.
        if gguf_problem(_empty(family).config.to_dict() | {"num_hidden_layers": 27}):
            gguf = "refused before training"
        kernels = _kernels(family)
        lines.append(
            f"| {family.name} | {trains} | {words} | yes | proven | {gguf} | {checkpoints} "
            f"| {kernels} |"
        )
    return "\n".join(lines) + "\n"


def _checkpoints(family: Family) -> list[str]:
    """Return what is known of a family's GPTQ, AWQ and FP8 checkpoints."""
    refused = "refused before training"
    if family.has_experts:
        return [refused] * 3
    states = ["proven" if family.name in made else "not tried" for made in (GPTQ, AWQ)]
    if awq_problem(_empty(family).config.to_dict()):
        states[1] = refused
    return [*states, "proven"]


def _kernels(family: Family) -> str:
    """Return which parts of a family run in the project's kernels."""
    report = patch(new_model(family, vocab_size=128).bfloat16().requires_grad_(False))
    waits_for_nf4 = {"experts: the experts are not in NF4"}
    are_fused = set(report.unfused.values()) <= waits_for_nf4
    parts = {"layers": are_fused, "experts": family.has_experts}
    parts["loss"] = report.loss == "fused"
    return ", ".join(part for part, runs in parts.items() if runs) or "none"


def _empty(family: Family) -> Any:
    with torch.device("meta"):
        return new_model(family, vocab_size=128)


def _is_linear(module: torch.nn.Module) -> bool:
    return type(module) is torch.nn.Linear


def _part(name: str) -> str:
    """Return what a weight belongs to, in the words of the table."""
    return next(part for part, marks in _PARTS.items() if any(mark in name for mark in marks))


README = Path(__file__).parents[1] / "README.md"

KINDS = ("Qwen3.5", "DeepSeek V2", "gpt-oss")
"""One family of each kind that no other test trains: layers with a state, shared and routed
experts, experts that the files store as stacks."""


@pytest.fixture(scope="session")
def dataset_dir(smollm2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("families") / "data", smollm2_dir)


@pytest.mark.parametrize(
    "name", [name if name in KINDS else pytest.param(name, marks=pytest.mark.slow)
             for name in FAMILIES],
)  # fmt: skip
def test_the_default_recipe_trains_and_its_merge_is_proven(
    name: str, smollm2_dir: Path, dataset_dir: Path, tmp_path: Path, caplog, request
) -> None:
    family = FAMILIES[name]
    with caplog.at_level("WARNING"):
        line = run_line(family, tmp_path, tokenizer_dir=smollm2_dir, dataset_dir=dataset_dir)
    losses = [point.loss for point in line.training.history if point.loss is not None]
    assert losses[-1] < losses[0]
    assert ("train.packing is off" in caplog.text) == (name in UNPACKED)
    assert line.adapted == reach(family)
    assert line.training.base_quantization == "nf4"
    assert line.proof.mean_kl < 1e-5
    kinds: tuple[ExportKind, ...] = ("gptq", "awq", "fp8")
    assert {can_be_checkpoint(line.base_dir, kind) for kind in kinds} == {not family.has_experts}
    if request.node.get_closest_marker("slow") and name in BY_THE_LINE:
        assert make_gguf(line, tmp_path, dataset_dir) < 1e-2


def test_the_readme_has_the_table() -> None:
    text = README.read_text(encoding="utf-8")
    if "| family | default recipe |" in text:
        assert table() in text, "run this file, and paste what it prints"


if __name__ == "__main__":
    print(table(), end="")
