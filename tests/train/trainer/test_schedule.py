"""Learning rates: transformers' after the warm-up, and none of them 0."""

import pytest
import torch
from transformers import get_scheduler

from tuneline.errors import RecipeError
from tuneline.train import TrainConfig
from tuneline.train.choices import SCHEDULES
from tuneline.train.trainer.schedule import num_warmup_steps, rate_factors

SETTINGS = {
    "cosine_with_min_lr": {"min_lr_rate": 0.1},
    "cosine_warmup_with_min_lr": {"min_lr": 2e-5},
    "warmup_stable_decay": {"num_decay_steps": 2},
    "polynomial": {"power": 2.0},
}


def rates(name, num_warmup, num_steps):
    settings = SETTINGS.get(name, {})
    factors = rate_factors(name, settings, rate=2e-4, num_warmup=num_warmup, num_steps=num_steps)
    return [factors(step) for step in range(num_steps)]


def stock_rates(name, num_warmup, num_steps):
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=2e-4)
    scheduler = get_scheduler(name, optimizer, num_warmup, num_steps, SETTINGS.get(name))
    found = []
    for _ in range(num_steps):
        found.append(scheduler.get_last_lr()[0] / 2e-4)
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("name", sorted(set(SCHEDULES) - {"cosine_warmup_with_min_lr"}))
@pytest.mark.parametrize("num_warmup", [0, 1, 4])
def test_rates_after_the_warm_up_are_those_of_transformers(name, num_warmup):
    found = rates(name, num_warmup, 11)
    assert found[num_warmup:] == pytest.approx(stock_rates(name, num_warmup, 11)[num_warmup:])
    if name != "constant":
        rise = [(step + 1) / (num_warmup + 1) for step in range(num_warmup)]
        assert found[:num_warmup] == pytest.approx(rise)


@pytest.mark.parametrize("name", sorted(SCHEDULES))
@pytest.mark.parametrize("num_steps", [1, 2, 3, 5, 6])
def test_no_step_of_a_short_run_has_a_rate_of_0(name, num_steps):
    config = TrainConfig(lr_scheduler_type=name, lr_scheduler_kwargs=SETTINGS.get(name, {}))
    found = rates(name, num_warmup_steps(config, num_steps), num_steps)
    assert min(found) > 0
    # These two may decay already in the first step after the warm-up.
    if name not in ("cosine_warmup_with_min_lr", "warmup_stable_decay"):
        assert max(found) == pytest.approx(1)


@pytest.mark.parametrize(
    ("settings", "num_steps", "expected"),
    [
        ({}, 100, 5),
        ({}, 6, 5),
        ({}, 5, 2),
        ({}, 1, 0),
        ({"warmup_steps": 50}, 20, 10),
        ({"warmup_ratio": 1.0}, 8, 4),
        ({"warmup_ratio": 0.03}, 10, 1),
        ({"warmup_steps": 0}, 3, 0),
    ],
)
def test_a_warm_up_never_takes_all_steps(settings, num_steps, expected):
    assert num_warmup_steps(TrainConfig(**settings), num_steps) == expected


def test_settings_that_stop_the_learning_are_refused():
    with pytest.raises(RecipeError, match=r"rate of 0 in 1 of 11 optimizer steps"):
        rate_factors("cosine", {"num_cycles": 1.0}, rate=1e-4, num_warmup=1, num_steps=11)
    with pytest.raises(RecipeError, match=r"lr_end .* must be smaller"):
        rate_factors("polynomial", {"lr_end": 1e-3}, rate=1e-4, num_warmup=1, num_steps=11)
