"""NaN in losses and gradients: skipped, counted, rolled back, and blamed on the right rows."""

import math

import pytest
import torch

from tuneline.errors import TrainingError
from tuneline.models.nf4 import load_base
from tuneline.train import TrainConfig
from tuneline.train.run import run

RATE = 4e-3
SETTINGS = {
    "dtype": "float32",
    "learning_rate": RATE,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "max_steps": 10,
    "eval_steps": 10,
    "global_batch_size": 2,
    "micro_batch_size": 1,
    "gradient_checkpointing": False,
    "checkpoint_minutes": 0,
    "packing": False,
}
NAN = float("nan")


@pytest.fixture
def rows(answer_rows) -> list[dict]:
    """Six rows; each has a token of its own, 1000 and its number."""
    for number, row in enumerate(answer_rows):
        row["input_ids"][1] = 1000 + number
    return answer_rows[:6]


@pytest.fixture
def poison(monkeypatch):
    """Spoil the training forwards that `when(number from 0, token ids)` names."""

    def install(when, *, gradient_only=False):
        seen = []

        def forward(module, args, kwargs, output):
            if not module.training:
                return
            ids = set(kwargs["input_ids"].flatten().tolist())
            adapter = [p.detach().clone() for n, p in module.named_parameters() if "lora" in n]
            seen.append((ids, adapter))
            if when(len(seen) - 1, ids):
                if gradient_only:
                    output.logits.register_hook(lambda gradient: gradient * NAN)
                else:
                    output.logits = output.logits * NAN

        def load(*args, **kwargs):
            model = load_base(*args, **kwargs)
            model.register_forward_hook(forward, with_kwargs=True)
            return model

        monkeypatch.setattr("tuneline.models.nf4.load_base", load)
        return seen

    return install


def train(tmp_path, base_dir, dataset, **settings):
    return run(
        TrainConfig.parse({**SETTINGS, **settings}),
        base_model_dir=base_dir,
        dataset_dir=dataset,
        adapter_dir=tmp_path / "adapter",
        curves_path=tmp_path / "curves.html",
    )


@pytest.mark.parametrize("gradient_only", [False, True])
def test_a_bad_step_changes_nothing_and_is_counted(
    tmp_path, tiny_model_dir, dataset_dir, rows, poison, gradient_only
):
    # The second micro-batch of step 3, and the first of step 5.
    seen = poison(lambda number, _: number in (5, 8), gradient_only=gradient_only)
    summary = train(tmp_path, tiny_model_dir, dataset_dir(rows))
    assert summary.num_skipped_steps == 2 and summary.num_rollbacks == 0
    assert [p.step for p in summary.history if p.loss is not None] == [1, 2, 4, 6, 7, 8, 9, 10]
    assert all(math.isfinite(p.loss) for p in summary.history if p.loss is not None)
    weights = [adapter for _, adapter in seen]

    def same(one, other):
        return all(torch.equal(a, b) for a, b in zip(weights[one], weights[other], strict=True))

    assert same(4, 6) and same(8, 10)
    assert not same(6, 8) and not same(2, 4)
    assert all(tensor.isfinite().all() for tensor in weights[-1])
    assert summary.final_eval_loss < summary.first_eval_loss


def test_several_in_a_row_go_back_to_a_lower_rate(
    tmp_path, tiny_model_dir, dataset_dir, rows, poison, caplog
):
    # Steps 5, 6 and 7, and after the first return step 6 to 8.
    seen = poison(lambda number, _: number in (8, 10, 12) or number in (17, 19, 21))
    summary = train(tmp_path, tiny_model_dir, dataset_dir(rows))
    assert (summary.num_rollbacks, summary.num_skipped_steps) == (2, 6)
    assert "steps in a row were skipped: returning to " in caplog.text
    assert "checkpoint-4, with 0.3 of the learning" in caplog.text
    assert "checkpoint-5, with 0.09 of the learning" in caplog.text
    rates = {p.step: p.learning_rate for p in summary.history if p.learning_rate is not None}
    expected = [RATE] * 4 + [0.3 * RATE] + [0.09 * RATE] * 5
    assert [rates[step] for step in range(1, 11)] == pytest.approx(expected)
    # The same weights and rows as when these steps were first tried.
    for first, again in ((8, 14), (16, 22)):
        assert seen[first][0] == seen[again][0]
        for one, other in zip(seen[first][1], seen[again][1], strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("packing", [False, True])
def test_rows_that_never_work_are_named(
    tmp_path, tiny_model_dir, dataset_dir, rows, poison, packing
):
    seen = poison(lambda number, ids: number >= 2 and 1003 in ids)
    with pytest.raises(TrainingError) as caught:
        train(
            tmp_path,
            tiny_model_dir,
            dataset_dir(rows, max_seq_length=32),
            packing=packing,
            max_skipped_in_a_row=1,
        )
    bad = next(ids for ids, _ in reversed(seen) if 1003 in ids)
    named = sorted(token - 1000 for token in bad if token >= 1000)
    assert (len(named) > 1) == packing
    message = str(caught.value)
    assert f"the batch was rows {', '.join(map(str, named))} of train.parquet" in message
    assert "after 2 returns to a checkpoint" in message
    assert "it is 0.004, and 0.00036 did not help" in message
    assert not (tmp_path / "adapter").exists()
