"""One table of figures feeds KFP's metrics, the artifact's metadata, the pages and the card."""

import pytest

from tuneline.artifacts import TrainingSummary
from tuneline.train.observe.metrics import artifact_metadata, comparable_metrics
from tuneline.training_figures import training_figures


def new_summary(**values: object) -> TrainingSummary:
    plain = {
        "method": "sft",
        "num_steps": 1200,
        "num_tokens": 3_000_000,
        "final_loss": 0.5,
        "num_trainable_parameters": 10,
        "num_parameters": 1000,
        "base_quantization": "nf4",
        "compute_dtype": "bfloat16",
        "device": "cuda",
        "tokens_per_second": 12_345.6,
        "peak_memory_bytes": 3 << 29,
        "history": [],
        "base_sha256": "1" * 64,
        "dataset_sha256": "2" * 64,
    }
    return TrainingSummary.model_validate(plain | values)


def test_each_figure_is_shown_with_its_unit() -> None:
    summary = new_summary(
        first_eval_loss=2.0,
        final_eval_loss=0.75,
        eval_gap=0.25,
        learning_rate=2e-4,
        best_step=1100,
        stopped_early=True,
        num_ranks=4,
        estimated_peak_bytes=1 << 31,
        fitted="per_device_train_batch_size 8 -> 4",
        device_hours=2.5,
        energy_kwh=1.75,
        cost=8.75,
        num_out_of_memory=1,
        num_skipped_steps=3,
        num_rollbacks=1,
        num_restarts=1,
        num_resumptions=2,
        seconds=181.7,
        settings={"lora": {"r": 16, "lora_alpha": 32}},
    )
    shown = {figure.label: figure.text for figure in training_figures(summary)}
    assert shown == {
        "Method": "sft",
        "Adapter": "LoRA, r=16, alpha=32",
        "Base weights": "nf4",
        "Computed in": "bfloat16",
        "Trainable parameters": "10 of 1 k (1.0 %)",
        "Highest learning rate": "0.0002",
        "Optimizer steps": "1,200",
        "Tokens": "3,000,000",
        "Last training loss": "0.5",
        "Evaluation loss before training, base in 4 bits": "2",
        "Evaluation loss of the adapter, base in 4 bits": "0.75",
        "Evaluation loss above training loss": "+0.2500",
        "Adapter kept": "from step 1,100, stopped early",
        "Device": "cuda",
        "Ranks": "4",
        "Tokens per second": "12,346",
        "Peak memory": "1.50 GiB",
        "Estimated peak memory": "2.00 GiB",
        "Changed to fit into memory": "per_device_train_batch_size 8 -> 4",
        "Time": "3 min 02 s",
        "GPU-hours": "2.5",
        "Energy of the GPUs": "1.75 kWh",
        "Cost (at price_per_hour)": "8.75",
        "Out of memory": "once",
        "Steps skipped: NaN or infinite": "3",
        "Rollbacks to a checkpoint": "1",
        "Restarted after a fault": "once",
        "Resumed from a checkpoint": "2 times",
    }


def test_the_names_in_kfp_stay() -> None:
    """Pages of KFP and people's queries go by them."""
    summary = new_summary(
        first_eval_loss=2.0,
        final_eval_loss=0.75,
        eval_gap=0.25,
        estimated_peak_bytes=1 << 31,
        device_hours=2.5,
        energy_kwh=1.75,
        cost=8.75,
    )
    assert comparable_metrics(summary) == {
        "final_loss": 0.5,
        "first_eval_loss": 2.0,
        "final_eval_loss": 0.75,
        "eval_gap": 0.25,
        "num_steps": 1200.0,
        "tokens_per_second": 12345.6,
        "peak_memory_gib": 1.5,
        "seconds": 0.0,
        "device_hours": 2.5,
        "energy_kwh": 1.75,
        "cost": 8.75,
    }
    assert artifact_metadata(summary) == {
        "peak_memory_gib": 1.5,
        "estimated_memory_gib": 2.0,
        "fitted": "",
        "method": "sft",
        "base_quantization": "nf4",
        "compute_dtype": "bfloat16",
        "device": "cuda",
        "num_trainable_parameters": 10,
        "base_sha256": "1" * 64,
        "dataset_sha256": "2" * 64,
    }


@pytest.mark.parametrize("name", ["energy_kwh", "cost", "eval_gap", "num_skipped_steps", "fitted"])
def test_what_was_not_measured_is_left_out(name: str) -> None:
    assert name not in {figure.name for figure in training_figures(new_summary())}


def test_an_unknown_number_of_parameters_has_no_percentage() -> None:
    shown = {
        figure.label: figure.text for figure in training_figures(new_summary(num_parameters=0))
    }
    assert shown["Trainable parameters"] == "10"
