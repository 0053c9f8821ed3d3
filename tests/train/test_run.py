import inspect
import json
import logging
import re
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from small_records import record_again
from trl import DPOTrainer

from tuneline.artifacts import TrainingSummary
from tuneline.errors import (
    ModelError,
    OutputExistsError,
    RecipeError,
    TrainingError,
    WorldError,
)
from tuneline.models.nf4 import load_base
from tuneline.train import TrainConfig
from tuneline.train.config import DpoConfig
from tuneline.train.observe.metrics import comparable_metrics
from tuneline.train.run import run
from tuneline.train.trainer.arguments import DPO_LOSSES

QUICK = {
    # Losses are compared with a model in fp32; some CPUs would take bfloat16.
    "dtype": "float32",
    "learning_rate": 5e-3,
    "max_steps": 12,
    "eval_steps": 6,
    "global_batch_size": 2,
    "max_grad_norm": 1.0,
    "warmup_steps": 2,
}


def train(tmp_path, base_dir, dataset, **settings):
    return run(
        TrainConfig(**{**QUICK, **settings}),
        base_model_dir=base_dir,
        dataset_dir=dataset,
        adapter_dir=tmp_path / "out" / "adapter",
        curves_path=tmp_path / "curves.html",
    )


def mean_loss(model, rows):
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


def test_loss_falls_and_the_adapter_reloads_in_plain_peft(
    tmp_path, tiny_model_dir, dataset_dir, answer_rows, monkeypatch
):
    events = tmp_path / "events.jsonl"
    monkeypatch.setenv("TUNELINE_EVENTS", str(events))
    dataset = dataset_dir(answer_rows)
    (dataset / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    summary = train(tmp_path, tiny_model_dir, dataset)

    adapter = tmp_path / "out" / "adapter"
    assert TrainingSummary.read(adapter).history == summary.history
    assert [p.name for p in adapter.parent.iterdir()] == ["adapter"]
    assert {p.name for p in adapter.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "progress.jsonl",
        "tokenizer.json",
        "tokenizer_config.json",
        "training.json",
    }
    assert (adapter / "chat_template.jinja").read_text() == "{{ messages[0].content }}!"
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny"
    weights = load_file(adapter / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert sum(t.numel() for t in weights.values()) == summary.num_trainable_parameters

    measured = [(p.step, p.eval_loss) for p in summary.history if p.eval_loss is not None]
    assert [step for step, _ in measured] == [0, 6, 12]
    assert summary.final_eval_loss < summary.first_eval_loss - 0.5
    base = load_base(tiny_model_dir, dtype=torch.float32, device="cpu", quantized=True).eval()
    assert mean_loss(base, answer_rows) == pytest.approx(summary.first_eval_loss, rel=1e-5)
    tuned = PeftModel.from_pretrained(base, str(adapter)).eval()
    assert mean_loss(tuned, answer_rows) == pytest.approx(summary.final_eval_loss, rel=1e-4)

    assert summary.num_steps == 12 and summary.base_quantization == "nf4"
    rates = [p.learning_rate for p in summary.history if p.learning_rate is not None]
    assert max(rates) == pytest.approx(5e-3) and rates[-1] < 1e-3
    last = [json.loads(line) for line in events.read_text().splitlines()][-1]
    assert (last["event"], last["done"], last["total"]) == ("progress", 12, 12)
    assert last["note"].startswith("loss ")
    assert "<svg" in (tmp_path / "curves.html").read_text()
    assert comparable_metrics(summary)["final_eval_loss"] == round(summary.final_eval_loss, 6)


def test_raw_text_is_learned_whole(tmp_path, tiny_model_dir, dataset_dir):
    ids = [300 + n % 17 for n in range(150)]
    rows = [{"input_ids": ids, "loss_mask": [1] * len(ids)}]
    summary = train(tmp_path, tiny_model_dir, dataset_dir(rows, method="cpt"), max_steps=6)
    assert summary.method == "cpt" and summary.final_eval_loss < summary.first_eval_loss
    assert summary.num_tokens >= 6 * 22  # the shortest piece of 150 tokens in packs of 64


def test_preferences_widen_the_margin(tmp_path, tiny_model_dir, dataset_dir, caplog):
    rows = [
        {
            "prompt_ids": list(range(100, 104 + n)),
            "chosen_ids": [200, 201, 202],
            "rejected_ids": [210, 211],
        }
        for n in range(6)
    ]
    with caplog.at_level(logging.WARNING):
        summary = train(tmp_path, tiny_model_dir, dataset_dir(rows, method="dpo"))
    margins = [p.reward_margin for p in summary.history if p.reward_margin is not None]
    # The reference is the base itself, so a new adapter starts at no margin and a loss of log 2.
    assert margins[0] == pytest.approx(0.0, abs=1e-5)
    assert summary.first_eval_loss == pytest.approx(0.693147, abs=1e-5)
    assert margins[-1] > 0.1 and summary.final_loss < 0.65
    assert "train.packing has no effect on method dpo" in caplog.text
    assert not (tmp_path / "out" / "adapter" / "ref").exists()


def test_a_cached_reference_gives_the_same_losses(
    tmp_path, tiny_model_dir, dataset_dir, monkeypatch
):
    from tuneline.train.trainer import trainers

    calls = []
    score = trainers.DPOTrainer.compute_ref_log_probs

    def counted(trainer, model, inputs):
        calls.append(len(inputs["input_ids"]))
        return score(trainer, model, inputs)

    monkeypatch.setattr(trainers.DPOTrainer, "compute_ref_log_probs", counted)
    rows = [
        {"prompt_ids": [*range(100, 104 + n)], "chosen_ids": [200, 201 + n], "rejected_ids": [210]}
        for n in range(6)
    ]
    dataset = dataset_dir(rows, method="dpo")
    found = []
    for name, cached, num_scored in (("not", False, 0), ("auto", None, 24), ("once", True, 24)):
        summary = train(
            tmp_path / name,
            tiny_model_dir,
            dataset,
            max_steps=4,
            eval_steps=2,
            dpo=DpoConfig(cache_reference=cached),
        )
        found.append([(p.step, p.loss or p.eval_loss, p.reward_margin) for p in summary.history])
        # Each pair once, in train and in eval: chosen and rejected.
        assert sum(calls) == num_scored, name
        calls.clear()
    for one in found[1:]:
        assert one == [pytest.approx(point, abs=1e-5) for point in found[0]]


def test_same_seed_same_adapter(tmp_path, tiny_model_dir, dataset_dir, answer_rows):
    dataset = dataset_dir(answer_rows)
    files = []
    for name in ("one", "two"):
        train(tmp_path / name, tiny_model_dir, dataset, max_steps=3)
        path = tmp_path / name / "out" / "adapter" / "adapter_model.safetensors"
        files.append(path.read_bytes())
    assert files[0] == files[1]


def test_a_loss_that_is_not_finite_ends_the_step(tmp_path, dataset_dir, answer_rows, broken_dir):
    with pytest.raises(
        TrainingError, match=r"not a finite number at step 3.*rate is not the cause"
    ):
        train(tmp_path, broken_dir, dataset_dir(answer_rows, eval_rows=[]))
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".checkpoints"]


@pytest.fixture
def broken_dir(tmp_path, tiny_model_dir):
    """The tiny model with a weight that is not a number."""
    from safetensors.torch import save_file

    path = tmp_path / "broken"
    shutil.copytree(tiny_model_dir, path)
    weights = load_file(path / "model.safetensors")
    weights["model.norm.weight"] = torch.full_like(weights["model.norm.weight"], float("nan"))
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    record_again(path)
    return path


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"lora": {"target_modules": ["q_prj"]}}, ModelError, r"'q_prj'.*did you mean q_proj"),
        (
            {"lora": {"target_modules": ["xyz"]}},
            ModelError,
            r"'xyz'.*to auto, or name some of down_proj",
        ),
        ({"lora": {"target_modules": ["lm_head"]}}, ModelError, "output layer"),
    ],
)
def test_unknown_names_are_refused_with_near_ones(
    tmp_path, tiny_model_dir, dataset_dir, answer_rows, settings, error, message
):
    config = TrainConfig.parse(settings)
    with pytest.raises(error, match=message):
        run(
            config,
            base_model_dir=tiny_model_dir,
            dataset_dir=dataset_dir(answer_rows),
            adapter_dir=tmp_path / "adapter",
            curves_path=tmp_path / "curves.html",
        )
    assert not (tmp_path / "adapter").exists()


def test_losses_of_preferences_are_those_that_trl_has(tmp_path, tiny_model_dir, dataset_dir):
    source = inspect.getsource(DPOTrainer)
    assert set(re.findall(r'loss_type == "(\w+)"', source)) == set(DPO_LOSSES)
    rows = [{"prompt_ids": [100, 101], "chosen_ids": [200, 201], "rejected_ids": [210]}] * 2
    with pytest.raises(RecipeError, match="no 'sigmod'; did you mean sigmoid"):
        dataset = dataset_dir(rows, method="dpo")
        train(tmp_path, tiny_model_dir, dataset, dpo=DpoConfig(loss_type="sigmod"))


@pytest.mark.slow
@pytest.mark.parametrize("loss", DPO_LOSSES)
def test_every_loss_of_preferences_trains(tmp_path, tiny_model_dir, dataset_dir, loss):
    rows = [
        {"prompt_ids": [100, n], "chosen_ids": [200, 201, 202], "rejected_ids": [210, 211]}
        for n in range(4)
    ]
    dataset = dataset_dir(rows, method="dpo")
    settings = DpoConfig(loss_type=loss, label_smoothing=1e-3 if loss == "exo_pair" else 0)
    summary = train(tmp_path, tiny_model_dir, dataset, dpo=settings)
    losses = [point.loss for point in summary.history if point.loss is not None]
    assert summary.num_skipped_steps == 0 and losses[-1] < losses[0]


def test_a_loss_that_needs_smoothing_says_so():
    with pytest.raises(RecipeError, match="exo_pair needs a label_smoothing above 0"):
        TrainConfig.parse({"dpo": {"loss_type": "exo_pair"}})


def test_output_that_is_not_empty(tmp_path, tiny_model_dir, dataset_dir, answer_rows):
    kept = tmp_path / "out" / "adapter" / "kept"
    kept.parent.mkdir(parents=True)
    kept.write_text("mine")
    with pytest.raises(OutputExistsError, match="not empty"):
        train(tmp_path, tiny_model_dir, dataset_dir(answer_rows))
    assert kept.read_text() == "mine"


def test_directories_without_their_record(tmp_path, tiny_model_dir, dataset_dir, answer_rows):
    dataset = dataset_dir(answer_rows)
    with pytest.raises(WorldError, match=r"no dataset\.json"):
        train(tmp_path, tiny_model_dir, tmp_path)
    with pytest.raises(WorldError, match=r"no origin\.json"):
        train(tmp_path, tmp_path, dataset)


def test_a_model_without_tokenizer(tmp_path, tiny_model_dir, dataset_dir, answer_rows):
    base = tmp_path / "base"
    shutil.copytree(tiny_model_dir, base, ignore=shutil.ignore_patterns("tokenizer*"))
    record_again(base)
    with pytest.raises(ModelError, match="no tokenizer"):
        train(tmp_path, base, dataset_dir(answer_rows))


def test_a_file_that_was_changed_is_not_trained_on(
    tmp_path, tiny_model_dir, dataset_dir, answer_rows
):
    dataset = dataset_dir(answer_rows)
    base = Path(shutil.copytree(tiny_model_dir, tmp_path / "base"))
    for file, what in ((dataset / "train.parquet", "parquet"), (base / "config.json", "json")):
        before = file.read_bytes()
        file.write_bytes(before + b"\n")
        with pytest.raises(WorldError, match=rf"\.{what} was changed after it was made"):
            train(tmp_path, base, dataset)
        file.write_bytes(before)
