"""Rows learned by heart: the best adapter is kept, and training ends when patience does."""

import os
import signal

import pytest
import torch
from peft import PeftModel

from tuneline.artifacts import TrainingPoint, TrainingSummary
from tuneline.errors import StoppedError
from tuneline.models.nf4 import load_base
from tuneline.train import TrainConfig
from tuneline.train.observe.metrics import eval_gap
from tuneline.train.run import run

# A high rate on one set of rows, evaluated on others: the loss on those soon rises.
SETTINGS = {
    "dtype": "float32",
    "learning_rate": 2e-2,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "max_grad_norm": 1.0,
    "max_steps": 40,
    "eval_steps": 2,
    "global_batch_size": 1,
    "micro_batch_size": 1,
    "gradient_checkpointing": False,
}


def row(start: int, stride: int) -> dict:
    ids = [start + (stride * place) % 11 for place in range(12)]
    return {"input_ids": ids, "loss_mask": [0] * 4 + [1] * 8}


@pytest.fixture
def dataset(dataset_dir):
    return dataset_dir([row(100, 3), row(100, 5)], eval_rows=[row(300, 4)])


def train(where, base_dir, dataset, **settings) -> TrainingSummary:
    return run(
        TrainConfig.parse({**SETTINGS, **settings}),
        base_model_dir=base_dir,
        dataset_dir=dataset,
        adapter_dir=where / "adapter",
        curves_path=where / "curves.html",
    )


def eval_loss(base_dir, adapter) -> float:
    base = load_base(base_dir, dtype=torch.float32, device="cpu", quantized=True)
    model = PeftModel.from_pretrained(base, str(adapter)).eval()
    held = row(300, 4)
    ids = torch.tensor([held["input_ids"]])
    with torch.no_grad():
        log_probs = model(input_ids=ids).logits[0, 3:-1].log_softmax(-1)
    return -log_probs.gather(1, ids[0, 4:, None]).mean().item()


def test_the_best_adapter_is_kept_and_training_ends_early(tmp_path, tiny_model_dir, dataset):
    summary = train(tmp_path, tiny_model_dir, dataset)
    losses = {p.step: p.eval_loss for p in summary.history if p.eval_loss is not None and p.step}
    best = min(losses, key=losses.get)
    assert summary.stopped_early and summary.best_step == best < summary.num_steps
    assert summary.num_steps == best + 3 * 2 == max(losses)
    assert summary.final_eval_loss == losses[best]
    assert eval_loss(tiny_model_dir, tmp_path / "adapter") == pytest.approx(losses[best], rel=1e-4)
    assert summary.eval_gap > 0
    page = (tmp_path / "curves.html").read_text()
    assert f"from step {best}, stopped early" in page
    assert f"{summary.eval_gap:+.4f}" in page


def test_without_patience_the_best_is_kept_all_the_same(tmp_path, tiny_model_dir, dataset):
    summary = train(tmp_path, tiny_model_dir, dataset, early_stopping_patience=None)
    assert summary.num_steps == 40 and not summary.stopped_early
    assert summary.best_step < 40
    loss = eval_loss(tiny_model_dir, tmp_path / "adapter")
    assert loss == pytest.approx(summary.final_eval_loss, rel=1e-4)


def test_patience_and_the_best_adapter_survive_an_interruption(
    tmp_path, tiny_model_dir, dataset, monkeypatch
):
    whole = train(tmp_path / "whole", tiny_model_dir, dataset)
    stop_at = whole.best_step + 1
    forwards = []

    def load(*args, **kwargs):
        model = load_base(*args, **kwargs)

        def forward(module, *_):
            forwards.append(module.training)
            if sum(forwards) == stop_at and module.training:
                os.kill(os.getpid(), signal.SIGTERM)

        model.register_forward_hook(forward)
        return model

    with monkeypatch.context() as patched, pytest.raises(StoppedError):
        patched.setattr("tuneline.models.nf4.load_base", load)
        train(tmp_path / "stopped", tiny_model_dir, dataset)
    again = train(tmp_path / "stopped", tiny_model_dir, dataset)
    assert again.history == whole.history
    assert (again.best_step, again.stopped_early) == (whole.best_step, True)
    files = [tmp_path / n / "adapter" / "adapter_model.safetensors" for n in ("whole", "stopped")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_the_gap_is_to_the_steps_since_the_last_evaluation():
    points = [
        TrainingPoint(step=0, eval_loss=3.0),
        TrainingPoint(step=1, loss=9.0),
        TrainingPoint(step=2, loss=9.0, eval_loss=2.5),
        TrainingPoint(step=3, loss=2.0),
        TrainingPoint(step=4, loss=1.0, eval_loss=2.25),
    ]
    assert eval_gap(points) == pytest.approx(0.75)
    assert eval_gap(points[:1]) is None
