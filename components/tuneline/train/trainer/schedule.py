"""The learning rate of every optimizer step, as a factor of the highest rate.

The schedules are transformers', which have a rate of 0 in the first step of their warm-up. Such a
step would change nothing, and on a small dataset it may be the only one. Here the rate of step s of
a warm-up of w steps is (s + 1) / (w + 1) of the highest rate. All later rates are transformers'.
"""

import logging
import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import SchedulerType, get_scheduler

from tuneline.errors import RecipeError
from tuneline.train.config import TrainConfig
from tuneline.train.trainer.host_overhead import QuickStepTrainer

logger = logging.getLogger(__name__)


def num_warmup_steps(config: TrainConfig, num_steps: int) -> int:
    """Return the number of warm-up steps: what the recipe asks for, or half of a shorter run."""
    asked = config.warmup_steps
    if config.warmup_ratio is not None:
        asked = math.ceil(config.warmup_ratio * num_steps)
    if config.lr_scheduler_type == "constant" or asked < num_steps:
        return asked
    kept = num_steps // 2
    logger.warning(
        "%s asks for %d steps of warm-up, but the run has %d in all: the warm-up takes %d",
        "train.warmup_steps" if config.warmup_ratio is None else "train.warmup_ratio",
        asked,
        num_steps,
        kept,
    )
    return kept


def rate_factors(
    name: str, settings: dict[str, Any], *, rate: float, num_warmup: int, num_steps: int
) -> Callable[[int], float]:
    """Return the function from an optimizer step, from 0, to the factor of the highest rate.

    Args:
        name: The schedule's name, as in transformers.
        settings: The schedule's settings.
        rate: The highest learning rate.
        num_warmup: Number of warm-up steps.
        num_steps: Optimizer steps of the run.

    Raises:
        RecipeError: the settings cannot be used, or a step would have a rate of 0.
    """
    if name == "constant":
        return _one
    if name == "inverse_sqrt":
        settings = {"timescale": num_warmup or 10_000} | settings
    # An optimizer of its own, because a scheduler changes the optimizer that it is made for.
    throwaway = torch.optim.SGD([torch.zeros(1)], lr=rate)
    try:
        scheduler: Any = get_scheduler(
            name,
            throwaway,
            num_warmup_steps=num_warmup + 1,
            num_training_steps=num_steps + 1,
            scheduler_specific_kwargs=settings,
        )
        factors = [scheduler.lr_lambdas[0](step + 1) for step in range(num_steps)]
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise RecipeError(
            f"train.lr_scheduler_kwargs {settings} do not suit lr_scheduler_type {name} on "
            f"{num_steps} optimizer steps with {num_warmup} of warm-up: {error}"
        ) from None
    if not min(factors) > 0:
        raise RecipeError(
            f"lr_scheduler_type {name} with {settings} has a learning rate of 0 in "
            f"{sum(not factor > 0 for factor in factors)} of {num_steps} optimizer steps, which "
            "would change nothing: change train.lr_scheduler_kwargs, or use cosine"
        )
    return lambda step: factors[min(step, num_steps - 1)]


class ScheduledTrainer(QuickStepTrainer):
    """A base of TRL's trainers whose steps all have a learning rate above 0."""

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> Any:
        """Return the scheduler of the run, a new one unless the trainer has one.

        Args:
            num_training_steps: Optimizer steps of the run.
            optimizer: The optimizer whose rates the scheduler sets. None: the trainer's.
        """
        if self.lr_scheduler is None:
            arguments: Any = self.args
            factors = rate_factors(
                SchedulerType(arguments.lr_scheduler_type).value,
                arguments.lr_scheduler_kwargs or {},
                rate=arguments.learning_rate,
                num_warmup=int(arguments.warmup_steps),
                num_steps=num_training_steps,
            )
            self.lr_scheduler = LambdaLR(cast(Any, optimizer or self.optimizer), factors)
            self._created_lr_scheduler = True
        return self.lr_scheduler


def _one(step: int) -> float:
    return 1.0
