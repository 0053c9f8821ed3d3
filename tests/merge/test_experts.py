"""Experts are merged one by one, into the files' own names, as training saw them."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from small_records import new_training
from tiny_families import FAMILIES, fetch_family
from transformers import AutoModelForCausalLM

from tuneline.artifacts import MergeProof, ModelOrigin
from tuneline.errors import ProofError
from tuneline.merge import MergeConfig
from tuneline.merge.expert_parts import Part
from tuneline.merge.pieces import Piece, Pieces
from tuneline.merge.run import run
from tuneline.models import nf4
from tuneline.models.checkpoint import Checkpoint
from tuneline.models.experts import (
    expert_modules,
    projections,
    quantized_experts,
    round_trip_experts,
)
from tuneline.models.experts.adapter import adapt_experts_in_nf4

FEW = ["Mixtral", "DeepSeek V2", "gpt-oss"]
ALL = [name for name, family in FAMILIES.items() if family.has_experts]
RANK = 4


def families() -> list[Any]:
    return [pytest.param(n, marks=[] if n in FEW else [pytest.mark.slow]) for n in ALL]


def adapt(base_dir: Path, adapter_dir: Path, *, quantized: bool, **settings: Any) -> Any:
    """Save a random adapter on attention and experts; return the model with it."""
    model = nf4.load_base(base_dir, dtype=torch.float32, device="cpu", quantized=quantized)
    parameters = [
        f"{name}.{projection}"
        for name, module in expert_modules(model).items()
        for projection in projections(module)
    ]
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=RANK,
        lora_alpha=8,
        target_modules=["o_proj"],
        target_parameters=parameters,
        **settings,
    )
    if quantized:
        adapt_experts_in_nf4(config, model)
    adapted = peft.get_peft_model(model, config)
    torch.manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    adapted.save_pretrained(adapter_dir)
    origin = ModelOrigin.read(base_dir)
    new_training(base_quantization="nf4" if quantized else "none", base_sha256=origin.sha256).write(
        adapter_dir, parents=(origin,)
    )
    return adapted


def merge(base: Path, adapter: Path, dataset: Path, out: Path, **settings: Any) -> MergeProof:
    return run(
        MergeConfig(num_proof_prompts=2, dtype="float32", **settings),
        base_model_dir=base,
        adapter_dir=adapter,
        dataset_dir=dataset,
        merged_dir=out,
    )


def trained_stacks(base_dir: Path, adapter_dir: Path, *, quantized: bool) -> dict[str, Any]:
    """Return the stacks with their updates, as plain peft merges them."""
    model: Any = nf4.load_base(base_dir, dtype=torch.float32, device="cpu", quantized=False)
    for name in quantized_experts(model) if quantized else ():
        weight = model.get_parameter(name)
        weight.data = round_trip_experts(weight.data, dtype=torch.float32, device="cpu")
    merged = peft.PeftModel.from_pretrained(model, str(adapter_dir)).merge_and_unload()
    return {name: merged.get_parameter(name).data for name in quantized_experts(merged)}


@pytest.mark.parametrize("family", families())
@pytest.mark.parametrize("quantized", [True, False])
def test_each_expert_gets_its_own_update(
    family: str, quantized: bool, tiny_model_dir: Path, small_dataset_dir: Path, tmp_path: Path
) -> None:
    base = fetch_family(FAMILIES[family], tmp_path / "base", tokenizer_dir=tiny_model_dir)
    adapt(base, tmp_path / "adapter", quantized=quantized)
    proof = merge(base, tmp_path / "adapter", small_dataset_dir, tmp_path / "merged")
    assert proof.mean_kl < 1e-6 and proof.top1_agreement == 1

    # The files have the base's names; transformers joins them to what peft makes of the adapter.
    assert Checkpoint(tmp_path / "merged").specs.keys() == Checkpoint(base).specs.keys()
    merged: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    stacks = trained_stacks(base, tmp_path / "adapter", quantized=quantized)
    plain = nf4.load_base(base, dtype=torch.float32, device="cpu", quantized=False)
    assert stacks
    for name, expected in stacks.items():
        found = merged.get_parameter(name)
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6), name
        moved = (found - plain.get_parameter(name)).abs().amax(dim=(1, 2))
        assert (moved > 0.05).all(), f"{name}: an expert has no update"


@pytest.mark.parametrize("family", ["Qwen3-MoE"])
def test_ranks_and_scales_of_their_own(
    family: str, tiny_model_dir: Path, small_dataset_dir: Path, tmp_path: Path
) -> None:
    """As peft itself sets them where it rewrites the targets of a mixture of experts."""
    base = fetch_family(FAMILIES[family], tmp_path / "base", tokenizer_dir=tiny_model_dir)
    patterns = {
        "rank_pattern": {r".*\.mlp\.experts\.gate_up_proj": 2 * RANK, "0.self_attn.o_proj": 3},
        "alpha_pattern": {r".*\.mlp\.experts\.gate_up_proj": 20, "0.self_attn.o_proj": 5},
    }
    adapt(base, tmp_path / "adapter", quantized=True, **patterns)
    proof = merge(base, tmp_path / "adapter", small_dataset_dir, tmp_path / "merged")
    assert proof.mean_kl < 1e-6
    merged: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    for name, expected in trained_stacks(base, tmp_path / "adapter", quantized=True).items():
        assert torch.allclose(merged.get_parameter(name), expected, rtol=1e-5, atol=1e-6), name


@pytest.mark.parametrize("family", ["Mixtral", "gpt-oss"])
def test_an_expert_left_out_is_caught(
    family: str,
    tiny_model_dir: Path,
    small_dataset_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = fetch_family(FAMILIES[family], tmp_path / "base", tokenizer_dir=tiny_model_dir)
    adapt(base, tmp_path / "adapter", quantized=True)
    right, add = Pieces._of_expert, Piece.merged
    seen: list[Piece] = []

    def recorded(self: Pieces, part: Part, expert: int) -> Piece:
        seen.append(right(self, part, expert))
        return seen[-1]

    def forgets_one(self: Piece) -> torch.Tensor:
        return self.base if len(seen) > 2 and self is seen[2] else add(self)

    monkeypatch.setattr(Pieces, "_of_expert", recorded)
    monkeypatch.setattr(Piece, "merged", forgets_one)
    with pytest.raises(ProofError, match=r"merged tensor .*experts.* is not base plus adapter"):
        merge(base, tmp_path / "adapter", small_dataset_dir, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
