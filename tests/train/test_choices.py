"""The optimizers and schedules of a recipe, against those of transformers."""

import pytest
import torch
from transformers import SchedulerType, Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

from tuneline.errors import RecipeError
from tuneline.train import TrainConfig
from tuneline.train.choices import _MEASURED, _MISSING_PACKAGES, OPTIMIZERS, SCHEDULES


def test_every_name_of_transformers_is_allowed_or_has_a_reason():
    names = {name.value for name in OptimizerNames}
    refused = {name for name in names if name.startswith(tuple(_MISSING_PACKAGES))}
    assert set(OPTIMIZERS) == names - refused and not refused & set(OPTIMIZERS)
    assert {name.value for name in SchedulerType} == {*SCHEDULES, *_MEASURED}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_changes_weights(name, tmp_path):
    arguments = TrainingArguments(
        str(tmp_path), optim=name, use_cpu=True, report_to="none", learning_rate=1e-3
    )
    kind, settings = Trainer.get_optimizer_cls_and_kwargs(arguments)
    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 64)
    before = layer.weight.detach().clone()
    optimizer = kind(layer.parameters(), **settings)
    layer(torch.ones(2, 64)).square().sum().backward()
    optimizer.step()
    assert (layer.weight - before).abs().max() > 1e-5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optim": "adamw_8bits"}, r"no optim 'adamw_8bits'; did you mean adamw_8bit"),
        ({"optim": "galore_adamw_layerwise"}, r"needs the package galore_torch.*adamw_8bit"),
        ({"optim": "schedule_free_sgd"}, r"needs the package schedulefree"),
        ({"optim": "adamw_torch_4bit"}, r"needs the package torchao"),
        ({"optim": "xyz"}, r"no optim 'xyz'; use one of adamw_8bit"),
        ({"lr_scheduler_type": "cosin"}, r"no lr_scheduler_type 'cosin'; did you mean cosine"),
        ({"lr_scheduler_type": "greedy"}, r"greedy changes the rate by the measured loss"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, r"needs min_lr or min_lr_rate .* none is"),
        ({"lr_scheduler_type": "warmup_stable_decay"}, r"needs num_decay_steps in"),
        (
            {
                "lr_scheduler_type": "cosine_with_min_lr",
                "lr_scheduler_kwargs": {"min_lr": 1e-5, "min_lr_rate": 0.1},
            },
            r"of which 2 is set: set one",
        ),
        (
            {"lr_scheduler_type": "linear", "lr_scheduler_kwargs": {"power": 2}},
            r"sets power, but lr_scheduler_type linear has no settings",
        ),
    ],
)
def test_what_cannot_run_is_refused_as_the_recipe_is_read(settings, message):
    with pytest.raises(RecipeError, match=message):
        TrainConfig.parse(settings)
