"""The loss is the same however rows lie in batches and packs, and equals one made by hand."""

import pytest
import torch
from train_setups import cpu_setup
from transformers import AutoTokenizer, Trainer

from tuneline.artifacts import DatasetManifest
from tuneline.models.nf4 import load_base
from tuneline.train import TrainConfig
from tuneline.train.batch_size import num_total_steps
from tuneline.train.model.targets import lora_config
from tuneline.train.rows.load import load_rows
from tuneline.train.trainer.arguments import training_arguments
from tuneline.train.trainer.trainers import SupervisedTrainer


def trainer_for(config, path, base_dir, work):
    manifest = DatasetManifest.read(path)
    rows, held = load_rows(path, manifest, packing=config.packing, cache_dir=work / "cache")
    model = load_base(base_dir, dtype=torch.float32, device="cpu", quantized=True)
    trainer = SupervisedTrainer(
        model=model,
        args=training_arguments(
            config,
            cpu_setup(config, max_seq_length=manifest.max_seq_length),
            method="sft",
            num_steps=num_total_steps(config, len(rows), config.global_batch_size),
            evaluates=True,
            packing=config.packing,
            work_dir=work,
        ),
        train_dataset=rows,
        eval_dataset=held,
        processing_class=AutoTokenizer.from_pretrained(str(base_dir)),
        peft_config=lora_config(config.lora, model),
    )
    # A new adapter adds nothing (B = 0): give it weight, so that its gradients count too.
    generator = torch.Generator().manual_seed(1)
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data = noise * (0.3 if "lora_B" in name else 0.1)
    return trainer


def loss_by_hand(model, rows):
    total, count = 0.0, 0
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        log_probs = model(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
        for place in range(1, len(row["input_ids"])):
            if row["loss_mask"][place]:
                total = total - log_probs[place - 1, row["input_ids"][place]]
                count += 1
    return total / count


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_loss_and_gradient_equal_those_made_by_hand(
    packing, batch_size, dataset_dir, answer_rows, tiny_model_dir, tmp_path
):
    path = dataset_dir(answer_rows, max_seq_length=64)
    config = TrainConfig(
        packing=packing,
        global_batch_size=4 * batch_size,
        micro_batch_size=batch_size,
        gradient_checkpointing=False,
    )
    trainer = trainer_for(config, path, tiny_model_dir, tmp_path)
    by_hand = loss_by_hand(trainer.model.eval(), answer_rows)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(by_hand.item(), rel=1e-5)

    parameters = [p for p in trainer.model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(by_hand, parameters)
    trainer.model.train()
    total = sum(sum(row["loss_mask"]) for row in answer_rows)
    for batch in trainer.get_train_dataloader():
        trainer.compute_loss(
            trainer.model, batch, num_items_in_batch=torch.tensor(total)
        ).backward()
    for parameter, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-6)


def test_trls_own_loss_agrees(dataset_dir, answer_rows, tiny_model_dir, tmp_path):
    trainer = trainer_for(
        TrainConfig(gradient_checkpointing=False),
        dataset_dir(answer_rows),
        tiny_model_dir,
        tmp_path,
    )
    ours = trainer.evaluate()["eval_loss"]
    trainer._selects_logits = False
    assert trainer.evaluate()["eval_loss"] == pytest.approx(ours, rel=1e-5)


def test_the_auxiliary_loss_of_routers_is_part_of_training_alone(
    dataset_dir, answer_rows, expert_model_dir, tmp_path
):
    config = TrainConfig(
        gradient_checkpointing=False,
        packing=False,
        global_batch_size=4,
        micro_batch_size=2,
        lora={"target_modules": ["q_proj", "o_proj"]},
    )
    trainer = trainer_for(config, dataset_dir(answer_rows), expert_model_dir("Qwen3-MoE"), tmp_path)
    by_hand = loss_by_hand(trainer.model.eval(), answer_rows)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(by_hand.item(), rel=1e-5)

    trainer.model.train()
    batch = next(iter(trainer.get_train_dataloader()))
    output = trainer.model(**batch, output_router_logits=True)
    coefficient = trainer.model.config.router_aux_loss_coef
    plain = output.loss - coefficient * output.aux_loss
    num_items = (batch["labels"][:, 1:] != -100).sum()
    trainer.current_gradient_accumulation_steps = 2
    expected = plain + coefficient / 2 * output.aux_loss
    losses = {}
    for name in ("ours", "TRL", "model"):
        trainer._selects_logits = name == "ours"
        trainer.takes_model_loss = name == "model"
        losses[name] = trainer.compute_loss(
            trainer.model, dict(batch), num_items_in_batch=num_items
        )
    assert coefficient * float(output.aux_loss) > 1e-3
    for loss in losses.values():
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    assert not trainer.model.config.output_router_logits


@pytest.mark.parametrize(
    ("num_rows", "settings", "expected"),
    [
        (10, {}, 2),  # 8 examples per step
        (10, {"num_train_epochs": 3.0}, 6),
        (10, {"num_train_epochs": 0.5}, 1),
        (1, {"max_steps": 7}, 7),
    ],
)
def test_number_of_steps(num_rows, settings, expected):
    assert num_total_steps(TrainConfig(**settings), num_rows, 8) == expected


class Wrapper(torch.nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, **inputs):
        return self.module(**inputs)


def test_what_a_step_asks_of_the_model_is_what_transformers_asks(
    dataset_dir, answer_rows, tiny_model_dir, tmp_path
):
    data = dataset_dir(answer_rows)
    trainer = trainer_for(TrainConfig(max_steps=1), data, tiny_model_dir, tmp_path)
    short, long = ({"input_ids": torch.zeros(1, n, dtype=torch.long)} for n in (8, 50))
    for batch in (short, long, short):
        assert trainer.floating_point_ops(batch) == Trainer.floating_point_ops(trainer, batch)
    trainer.create_optimizer_and_scheduler(1)
    trainer.get_train_dataloader()
    (batch,), labels = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, "cpu")
    counted = batch["labels"][:, 1:] != -100
    assert batch["num_labels"] == counted.sum() == labels
    # An evaluation leaves every module in its other mode, but for a wrapper such as DDP's.
    trainer._tr_loss = torch.zeros(())
    for model in (trainer.model, Wrapper(trainer.model)):
        trainer.model.eval()
        trainer.training_step(model, dict(batch), labels)
        assert model.training and all(module.training for module in trainer.model.modules())
        assert "train" not in vars(model)


def test_gradients_are_dropped_without_a_visit_to_every_parameter(
    dataset_dir, answer_rows, tiny_model_dir, tmp_path, monkeypatch
):
    config = TrainConfig(max_steps=2, packing=False, global_batch_size=4, micro_batch_size=2)
    trainer = trainer_for(config, dataset_dir(answer_rows[:8]), tiny_model_dir, tmp_path)
    at_start, visits = [], []
    step, visit = type(trainer).training_step, torch.nn.Module.zero_grad

    def noted(self, model, *args, **kwargs):
        trained = [p for p in model.parameters() if p.requires_grad]
        at_start.append(sum(p.grad is not None for p in trained) / len(trained))
        return step(self, model, *args, **kwargs)

    monkeypatch.setattr(type(trainer), "training_step", noted)
    monkeypatch.setattr(
        torch.nn.Module, "zero_grad", lambda self, *args: (visits.append(self), visit(self, *args))
    )
    trainer.train()
    # Two micro-batches per step; the second finds the first one's gradients.
    assert at_start == [0, 1] * 2
    # Before the first step.
    assert len(visits) == 1 and "zero_grad" not in vars(trainer.model)
    assert all(p.grad is None for p in trainer.model.parameters())
