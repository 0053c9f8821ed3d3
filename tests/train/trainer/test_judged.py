"""KTO: the losses are those of stock TRL, and do not depend on how a step is divided."""

import logging

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer
from trl import KTOConfig as StockConfig
from trl import KTOTrainer

from tuneline.models.nf4 import load_base
from tuneline.train.config import KtoConfig, TrainConfig
from tuneline.train.model.targets import lora_config
from tuneline.train.run import run
from tuneline.train.trainer.judged import log_balance

SETTINGS = {
    "dtype": "float32",
    "learning_rate": 5e-3,
    "optim": "adamw_torch",
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "max_steps": 3,
    "eval_steps": 3,
    "early_stopping_patience": None,
    "global_batch_size": 8,
    "micro_batch_size": 8,
    "sample_tokens": 0,
    "weight_decay": 0.0,
}


def judged_rows(count=8):
    """Return rows whose answers are good if they begin with an even ID; none has equal lengths."""
    return [
        {
            "prompt_ids": list(range(100 + n, 104 + 2 * n)),
            "completion_ids": [200 + n % 2, 210 + n, 220][: 2 + n % 2],
            "label": n % 2 == 0,
        }
        for n in range(count)
    ]


def train(path, base_dir, dataset, **settings):
    return run(
        TrainConfig(**{**SETTINGS, **settings}),
        base_model_dir=base_dir,
        dataset_dir=dataset,
        adapter_dir=path / "adapter",
        curves_path=path / "curves.html",
    )


def losses(summary):
    return [point.loss for point in summary.history if point.loss is not None]


def shuffled(rows, epoch):
    """Return the rows in the order in which tuneline sees them in an epoch."""
    generator = torch.Generator().manual_seed(3407 + epoch)
    return [rows[i] for i in torch.randperm(len(rows), generator=generator).tolist()]


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_losses_are_those_of_trl(tmp_path, tiny_model_dir, dataset_dir, loss_type):
    rows = judged_rows()
    weights = {"desirable_weight": 1.2, "undesirable_weight": 0.7, "beta": 0.3}
    ours = train(
        tmp_path,
        tiny_model_dir,
        dataset_dir(rows, method="kto"),
        kto=KtoConfig(loss_type=loss_type, **weights),
    )

    class Tokens(KTOTrainer):
        def _prepare_dataset(self, dataset, *args):
            return dataset

    epochs = []
    for epoch in range(3):
        step = shuffled(rows, epoch)
        if loss_type == "kto":
            answers = [row["completion_ids"] for row in step]
            others = [answers[-1], *answers[:-1]]
            pairs = zip(step, others, strict=True)
            step = [row | {"KL_completion_ids": other} for row, other in pairs]
        epochs += step
    arguments = StockConfig(
        str(tmp_path / "stock"),
        loss_type=loss_type,
        **weights,
        learning_rate=5e-3,
        lr_scheduler_type="constant",
        optim="adamw_torch",
        weight_decay=0.0,
        max_steps=3,
        per_device_train_batch_size=8,
        max_grad_norm=0.3,
        logging_steps=1,
        bf16=False,
        use_cpu=True,
        seed=3407,
        report_to="none",
        train_sampling_strategy="sequential",
        max_length=64,
    )
    base = load_base(tiny_model_dir, dtype=torch.float32, device="cpu", quantized=True)
    stock = Tokens(
        model=base,
        args=arguments,
        train_dataset=Dataset.from_list(epochs),
        processing_class=AutoTokenizer.from_pretrained(tiny_model_dir),
        peft_config=lora_config(TrainConfig().lora, base),
    )
    for parameter in stock.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    stock.train()
    theirs = [entry["loss"] for entry in stock.state.log_history if "loss" in entry]
    assert losses(ours) == pytest.approx(theirs, rel=1e-4)
    margins = [e["rewards/margins"] for e in stock.state.log_history if "rewards/margins" in e]
    found = [point.reward_margin for point in ours.history if point.reward_margin is not None]
    assert margins[-1] > 0.01
    assert found == pytest.approx(margins, abs=1e-4)


def test_the_margin_widens(tmp_path, tiny_model_dir, dataset_dir, caplog):
    rows = judged_rows(9)
    with caplog.at_level(logging.INFO):
        summary = train(
            tmp_path, tiny_model_dir, dataset_dir(rows, method="kto"), max_steps=12, eval_steps=6
        )
    margins = [p.reward_margin for p in summary.history if p.reward_margin is not None]
    assert margins[0] == pytest.approx(0, abs=1e-5) and margins[-1] > 0.2
    # The reference is the base itself: each loss is 1 - sigmoid(0) before training.
    assert summary.first_eval_loss == pytest.approx(0.5, abs=1e-5)
    assert summary.final_eval_loss < 0.48
    assert "5 desirable and 4 undesirable answers" in caplog.text
    assert "train.packing has no effect on method kto" in caplog.text
    assert "Reward margin" in (tmp_path / "curves.html").read_text()


def test_the_division_of_a_step_does_not_matter(tmp_path, tiny_model_dir, dataset_dir):
    dataset = dataset_dir(judged_rows(7), method="kto")
    found = []
    # The last step of an epoch has 3 rows, or 3 micro-batches of one row.
    for size in (4, 2, 1):
        summary = train(
            tmp_path / str(size),
            tiny_model_dir,
            dataset,
            global_batch_size=4,
            micro_batch_size=size,
            max_steps=4,
            eval_steps=2,
        )
        found.append([(p.step, p.loss or p.eval_loss) for p in summary.history])
    for one in found[1:]:
        assert one == [pytest.approx(point, abs=1e-5) for point in found[0]]


def test_balance_of_answers(caplog):
    with caplog.at_level(logging.WARNING):
        log_balance([True] * 10 + [False] * 10, KtoConfig())
        log_balance([True] * 30 + [False] * 10, KtoConfig(undesirable_weight=2.5))
    assert caplog.text == ""
    with caplog.at_level(logging.WARNING):
        log_balance([True] * 30 + [False] * 10, KtoConfig())
    # 30 x 1 against 10 x 3, or 30 x 1 against 10 x 3 / 1.33.
    assert "desirable_weight to 0.33 to 0.44, or undesirable_weight to 2.26 to 3.00" in caplog.text


def test_a_step_of_one_example_has_no_mismatched_answer(tmp_path, tiny_model_dir, dataset_dir):
    dataset = dataset_dir(judged_rows(2), method="kto")
    with pytest.raises(ValueError, match="global batch is 1 example: set train.global_batch_size"):
        train(tmp_path, tiny_model_dir, dataset, global_batch_size=1)
    summary = train(
        tmp_path,
        tiny_model_dir,
        dataset,
        global_batch_size=1,
        kto=KtoConfig(loss_type="apo_zero_unpaired"),
    )
    assert summary.num_steps == 3
