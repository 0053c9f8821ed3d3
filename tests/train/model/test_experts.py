"""Training a model of experts, with and without an adapter on the experts."""

import json
import logging
import os
import signal
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from tiny_families import EXPERT_FAMILIES

from tuneline.artifacts import TrainingSummary
from tuneline.errors import ModelError, StoppedError
from tuneline.models.experts import quantized_experts
from tuneline.models.experts.adapter import adapt_experts_in_nf4
from tuneline.models.nf4 import empty_model, load_base
from tuneline.train import TrainConfig
from tuneline.train.config import LoraConfig
from tuneline.train.model.packing import reason_not_to_pack
from tuneline.train.model.targets import check_targets
from tuneline.train.run import run
from tuneline.train.trainer.trainers import SupervisedTrainer

QUICK: dict[str, Any] = {
    "dtype": "float32",
    "learning_rate": 5e-3,
    "max_steps": 8,
    "eval_steps": 4,
    "global_batch_size": 2,
    "max_grad_norm": 1.0,
    "warmup_steps": 2,
    "sample_tokens": 3,
}


def train(out: Path, base_dir: Path, dataset: Path, *, experts: bool, **settings: Any) -> Any:
    lora = LoraConfig(r=4, experts=experts)
    return run(
        TrainConfig(**{**QUICK, "lora": lora, **settings}),
        base_model_dir=base_dir,
        dataset_dir=dataset,
        adapter_dir=out / "adapter",
        curves_path=out / "curves.html",
    )


def mean_loss(model: Any, rows: list[dict[str, Any]]) -> float:
    total, count = 0.0, 0
    with torch.no_grad():
        for row in rows:
            ids = torch.tensor([row["input_ids"]])
            mask = torch.tensor(row["loss_mask"][1:], dtype=torch.bool)
            log_probs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
            picked = log_probs.gather(1, ids[0, 1:, None])[:, 0][mask]
            total -= picked.sum().item()
            count += len(picked)
    return total / count


@pytest.mark.parametrize(
    "family",
    [
        *("Mixtral", "gpt-oss"),
        *(
            pytest.param(family, marks=pytest.mark.slow)
            for family in EXPERT_FAMILIES
            if family not in ("Mixtral", "gpt-oss")
        ),
    ],
)
def test_it_learns_and_the_record_says_what_was_quantised(
    family: str, tmp_path: Path, expert_model_dir: Any, dataset_dir: Any, answer_rows: Any
) -> None:
    base_dir = expert_model_dir(family)
    summary = train(tmp_path, base_dir, dataset_dir(answer_rows), experts=True)
    adapter = tmp_path / "adapter"
    assert summary.final_eval_loss < summary.first_eval_loss - 0.2
    weights = load_file(adapter / "adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in weights.values()) == summary.num_trainable_parameters
    on_experts = {name: tensor for name, tensor in weights.items() if ".experts." in name}
    assert len(on_experts) == 2 * len(quantized_experts(empty_model(base_dir)))
    assert all(tensor.any() for tensor in on_experts.values())
    assert not any("gate.lora" in name or "router" in name for name in weights)

    base = load_base(base_dir, dtype=torch.float32, device="cpu", quantized=True).eval()
    assert mean_loss(base, answer_rows) == pytest.approx(summary.first_eval_loss, rel=1e-4)
    config = peft.PeftConfig.from_pretrained(str(adapter))
    adapt_experts_in_nf4(config, base)
    tuned = peft.PeftModel.from_pretrained(base, str(adapter), config=config).eval()
    assert mean_loss(tuned, answer_rows) == pytest.approx(summary.final_eval_loss, rel=1e-4)

    read = TrainingSummary.read(adapter)
    in_full = sum(p.numel() for p in empty_model(base_dir).parameters() if p.dim() == 3)
    assert read.quantized_fraction is not None
    assert read.experts_quantized
    assert in_full / read.num_parameters < read.quantized_fraction < 1
    assert "<h2>Answers" in (tmp_path / "curves.html").read_text()


def test_without_the_key_experts_get_no_adapter(
    tmp_path: Path, expert_model_dir: Any, dataset_dir: Any, answer_rows: Any
) -> None:
    train(tmp_path, expert_model_dir("Qwen3-MoE"), dataset_dir(answer_rows), experts=False)
    names = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert names and all("self_attn" in name for name in names)
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert not settings.get("target_parameters")


@pytest.mark.parametrize("family", EXPERT_FAMILIES)
def test_rows_of_a_pack_are_kept_apart(family: str, expert_model_dir: Any) -> None:
    options: Any = {"dtype": torch.float32, "device": "cpu", "quantized": True}
    reason = reason_not_to_pack(load_base(expert_model_dir(family), **options))
    # transformers' masks of gpt-oss do not depend on positions.
    assert bool(reason) == (family == "gpt-oss")


def test_a_stopped_run_continues_bit_for_bit(
    tmp_path: Path,
    expert_model_dir: Any,
    dataset_dir: Any,
    answer_rows: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base_dir, dataset = expert_model_dir("Qwen3-MoE"), dataset_dir(answer_rows)
    train(tmp_path / "whole", base_dir, dataset, experts=True)
    compute = SupervisedTrainer.compute_loss

    def stopped(trainer: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        if model.training and trainer.state.global_step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return compute(trainer, model, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(SupervisedTrainer, "compute_loss", stopped)
        with pytest.raises(StoppedError, match="after step 6 of 8"):
            train(tmp_path / "two", base_dir, dataset, experts=True)
    summary = train(tmp_path / "two", base_dir, dataset, experts=True)
    assert summary.num_resumptions == 1
    files = [tmp_path / name / "adapter" / "adapter_model.safetensors" for name in ("two", "whole")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_an_adapter_of_experts_is_refused_where_there_are_none(tiny_model_dir: Path) -> None:
    with pytest.raises(ModelError, match="LlamaForCausalLM has no routed experts"):
        check_targets(LoraConfig(experts=True), tiny_model_dir)
    with pytest.raises(ValueError, match="lora_dropout to 0, or experts to false"):
        TrainConfig(lora=LoraConfig(experts=True, lora_dropout=0.1))
    with pytest.raises(ValueError, match="loftq has no method for experts"):
        TrainConfig(lora=LoraConfig(experts=True, init_lora_weights="loftq"))


def test_answers_that_fail_do_not_end_a_finished_run(
    tmp_path: Path,
    expert_model_dir: Any,
    dataset_dir: Any,
    answer_rows: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no cache for this layer")

    base_dir = expert_model_dir("Mixtral")
    monkeypatch.setattr("transformers.MixtralForCausalLM.generate", broken)
    with caplog.at_level(logging.WARNING):
        summary = train(tmp_path, base_dir, dataset_dir(answer_rows), experts=False, max_steps=2)
    assert summary.num_steps == 2 and (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert "no sample answers on the page: RuntimeError: no cache for this layer" in caplog.text
