"""The merged model's loss on the rows of training's evaluation loss."""

import logging
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from small_records import new_merge, new_training
from transformers import AutoModelForCausalLM

from tuneline.artifacts import EVAL_FILE, TrainingSummary
from tuneline.merge import evaluation
from tuneline.merge.evaluation import EvaluationRows, evaluation_loss, read_evaluation_rows
from tuneline.records.exports import LOSS_ROUNDING


def test_the_merged_model_has_the_loss_that_training_ended_with(
    merge: Any, adapter_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """In 16 bits too. Twelve rows have 15 tokens each that count."""
    for dtype, close in (("float32", 1e-4), ("bfloat16", LOSS_ROUNDING)):
        proof, merged = merge(dtype=dtype)
        assert proof.num_eval_tokens == 12 * 15
        assert proof.trained_eval_loss == TrainingSummary.read(adapter_dir).final_eval_loss
        assert proof.eval_loss == pytest.approx(proof.trained_eval_loss, abs=close)
        assert proof.unexplained_loss() == ""
        merged.rename(merged.with_name(dtype))
    assert "training's evaluation rows" not in caplog.text


def test_other_weights_than_training_ended_with_are_named(
    merge: Any,
    adapter_dir: Path,
    tmp_path: Path,
    changed_adapter: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The merge itself is right, so its proof passes: it adds what the adapter's file holds."""
    weights = load_file(adapter_dir / "adapter_model.safetensors")
    halved = {name: tensor / 2 for name, tensor in weights.items() if "lora_B" in name}
    with caplog.at_level(logging.WARNING):
        proof, _ = merge(adapter=changed_adapter(adapter_dir, tmp_path / "old", tensors=halved))
    assert proof.mean_kl < 0.01
    words = proof.unexplained_loss()
    assert words in caplog.text
    assert words.startswith("the merged model's loss on training's evaluation rows is ")
    assert "Likely causes: training computed with other weights" in words


@pytest.mark.slow
def test_original_weights_are_compared_where_both_losses_are_known(
    merge: Any, tmp_path: Path
) -> None:
    proof, merged = merge(base="original")
    assert proof.eval_loss is None and proof.unexplained_loss() == ""
    merged.rename(tmp_path / "first")
    proof, _ = merge(base="auto")
    assert proof.eval_loss is not None and proof.unexplained_loss() == ""


@pytest.mark.parametrize("chunk", [3, 512])
def test_the_loss_by_hand(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(evaluation, "CHUNK_POSITIONS", chunk)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32).eval()
    rows = EvaluationRows([([5, 9, 7, 7, 3, 8], [1, 3, 4, 5]), ([4, 6, 2], [2])])
    nats = []
    with torch.inference_mode():
        for ids, positions in rows.rows:
            log_probs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
            nats += [-log_probs[position - 1, ids[position]].item() for position in positions]
    assert evaluation_loss(model, rows) == pytest.approx(sum(nats) / 5, rel=1e-5)


@pytest.mark.parametrize(
    ("values", "longest"),
    [
        ({"method": "dpo"}, 20),
        ({"final_eval_loss": None}, 20),
        ({"settings": {"kernels": "fp8"}}, 20),
        ({"fitted": "max_seq_length 8192 -> 4096"}, 20),
        ({}, 19),
    ],
)
def test_losses_that_cannot_be_equal_are_not_compared(
    small_dataset_dir: Path, values: dict[str, Any], longest: int
) -> None:
    training = new_training(**{"final_eval_loss": 1.0, **values})
    assert read_evaluation_rows(small_dataset_dir, training, max_seq_length=longest) is None


def test_rows_that_would_take_long_are_said(
    small_dataset_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    training = new_training(final_eval_loss=1.0)
    found = read_evaluation_rows(small_dataset_dir, training, max_seq_length=20)
    assert (
        found is not None
        and len(found.rows) == pq.read_table(small_dataset_dir / EVAL_FILE).num_rows
    )
    monkeypatch.setattr(evaluation, "MAX_TOKENS", 239)
    with caplog.at_level(logging.INFO):
        assert read_evaluation_rows(small_dataset_dir, training, max_seq_length=20) is None
    assert "the evaluation rows have 240 tokens, and more than 239 would take long" in caplog.text


BOTH = {"dequantized": 2.0, "original": 1.92}
MEASURED = {
    "base_losses": {"dequantized": 2.0509},
    "merged_loss": 2.0995,
    "trained_eval_loss": 2.1675,
    "num_eval_tokens": 269,
    "mean_kl": 0.00399,
}


@pytest.mark.parametrize(
    ("values", "warns"),
    [
        ({"eval_loss": 1.0}, False),
        ({"eval_loss": 1.01}, True),
        ({"eval_loss": 0.99}, True),
        # A larger KL divergence explains more, and fewer tokens do too.
        ({"eval_loss": 1.01, "mean_kl": 0.008}, False),
        ({"eval_loss": 1.01, "num_eval_tokens": 100}, False),
        # The loss moves as on the rows of the proof: there by rounding, or on other weights.
        ({"eval_loss": 0.9, "base": "original"}, True),
        ({"eval_loss": 0.9, "base": "original", "base_losses": BOTH, "merged_loss": 1.92}, False),
        ({"eval_loss": 1.1, "base": "original", "base_losses": BOTH, "merged_loss": 1.92}, True),
        # As measured on the demo after 6 steps, with 269 tokens.
        ({**MEASURED, "eval_loss": 2.2268}, False),
        ({**MEASURED, "eval_loss": 2.1}, True),
        ({**MEASURED, "eval_loss": 2.4}, True),
        ({"eval_loss": None}, False),
        ({"trained_eval_loss": None}, False),
    ],
)
def test_what_rounding_explains(values: dict[str, Any], warns: bool) -> None:
    plain = {"eval_loss": 1.0, "trained_eval_loss": 1.0, "num_eval_tokens": 100_000}
    record = new_merge(**{**plain, "mean_kl": 3e-4, **values})
    assert bool(record.unexplained_loss()) == warns
