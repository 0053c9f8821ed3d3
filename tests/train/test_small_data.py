"""Runs of a few rows, and runs that cannot learn."""

import logging

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file

from tuneline.artifacts import EVAL_FILE
from tuneline.errors import TrainingError
from tuneline.train import TrainConfig
from tuneline.train.run import run


def train(path, base_dir, dataset, **settings):
    return run(
        TrainConfig(**{"dtype": "float32", "sample_tokens": 0, **settings}),
        base_model_dir=base_dir,
        dataset_dir=dataset,
        adapter_dir=path / "adapter",
        curves_path=path / "curves.html",
    )


def largest_b(path):
    weights = load_file(path / "adapter" / "adapter_model.safetensors")
    return max(float(w.abs().max()) for name, w in weights.items() if "lora_B" in name)


def rates(summary):
    return [p.learning_rate for p in summary.history if p.learning_rate is not None]


@pytest.mark.parametrize("optim", ["adamw_8bit", "adamw_torch"])
def test_all_defaults_on_rows_that_fill_one_pack(
    tmp_path, tiny_model_dir, dataset_dir, answer_rows, caplog, optim
):
    dataset = dataset_dir(answer_rows, max_seq_length=512)
    with caplog.at_level(logging.INFO):
        summary = train(tmp_path, tiny_model_dir, dataset, optim=optim)
    assert summary.num_steps == 1 and rates(summary) == [2e-4]
    assert summary.final_eval_loss < summary.first_eval_loss
    # The first step of AdamW changes each weight by about the learning rate.
    assert largest_b(tmp_path) == pytest.approx(2e-4, rel=0.05)
    assert "packs in global batches of 8: 1 optimizer steps" in caplog.text
    assert "warmup_steps asks for 5 steps of warm-up, but the run has 1 in all" in caplog.text
    assert "lower train.global_batch_size (it is 8), raise train.num_train_epochs" in caplog.text
    assert "or set train.packing to false" in caplog.text


@pytest.mark.parametrize("method", ["sft", "dpo", "kto", "cpt"])
@pytest.mark.parametrize("writes_empty_file", [True, False])
def test_no_evaluation_rows(tmp_path, tiny_model_dir, dataset_dir, method, writes_empty_file):
    row = {
        "sft": {"input_ids": [100, 101, 102], "loss_mask": [0, 1, 1]},
        "cpt": {"input_ids": [100, 101, 102], "loss_mask": [1, 1, 1]},
        "dpo": {"prompt_ids": [100], "chosen_ids": [101, 2], "rejected_ids": [102, 2]},
        "kto": {"prompt_ids": [100], "completion_ids": [101, 2], "label": True},
    }[method]
    dataset = dataset_dir([row], method=method, eval_rows=[])
    if writes_empty_file:
        schema = pa.Table.from_pylist([row]).schema
        pq.write_table(schema.empty_table(), dataset / EVAL_FILE)
    summary = train(
        tmp_path, tiny_model_dir, dataset, num_train_epochs=2, early_stopping_patience=1
    )
    assert summary.num_steps == 2 and summary.final_eval_loss is None and summary.best_step is None
    assert largest_b(tmp_path) > 0


@pytest.mark.slow
def test_more_ranks_than_rows_learn_the_same(tmp_path, tiny_model_dir, dataset_dir, answer_rows):
    found = []
    for num_ranks in (1, 2):
        summary = train(
            tmp_path / str(num_ranks),
            tiny_model_dir,
            dataset_dir(answer_rows[:1], name=f"data{num_ranks}"),
            num_ranks=num_ranks,
            max_steps=2,
            optim="adamw_torch",
        )
        found.append([(p.step, p.loss or p.eval_loss) for p in summary.history])
    assert found[1] == [pytest.approx(point, rel=1e-4) for point in found[0]]


@pytest.mark.parametrize("schedule", ["cosine", "constant_with_warmup", "inverse_sqrt"])
def test_a_warm_up_longer_than_the_run(
    tmp_path, tiny_model_dir, dataset_dir, answer_rows, schedule
):
    summary = train(
        tmp_path,
        tiny_model_dir,
        dataset_dir(answer_rows),
        max_steps=3,
        warmup_steps=10,
        lr_scheduler_type=schedule,
    )
    assert rates(summary)[:2] == pytest.approx([1e-4, 2e-4]) and min(rates(summary)) > 0


def test_a_run_that_changes_nothing_is_an_error(tmp_path, tiny_model_dir, dataset_dir):
    # The only token that counts is a row's first one, which nothing predicts.
    dataset = dataset_dir([{"input_ids": [100, 101, 102], "loss_mask": [1, 0, 0]}] * 3)
    with pytest.raises(TrainingError, match=r"changed none of the 14 matrices B"):
        train(tmp_path, tiny_model_dir, dataset, max_steps=2)
    assert not (tmp_path / "adapter").exists()
