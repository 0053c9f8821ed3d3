"""A Setup for tests that build a trainer themselves, on a CPU in float32."""

from typing import Any

import torch

from tuneline.train import TrainConfig
from tuneline.train.batch_size import batch_size
from tuneline.train.memory.plan import recipe_plan
from tuneline.train.setup import Setup


def cpu_setup(
    config: TrainConfig,
    *,
    num_ranks: int = 1,
    learning_rate: float = 1e-4,
    max_seq_length: int = 64,
    **changes: Any,
) -> Setup:
    """Return what `tuneline.train.run.decide` would, without a look at this machine.

    Args:
        config: The recipe's part for training.
        num_ranks: Number of ranks.
        learning_rate: Highest learning rate, where the config does not decide it.
        max_seq_length: Tokens per pack.
        changes: Other fields of the Setup.
    """
    asked = recipe_plan(config, batch_size(config, num_ranks), max_seq_length)
    values: dict[str, Any] = {
        "device": "cpu",
        "num_ranks": num_ranks,
        "dtype": torch.float32,
        "learning_rate": learning_rate,
        "fused": False,
        "divides_optimizer": False,
        "optimizer": config.optim,
        "trackers": (),
        "asked": asked,
        "plan": asked,
    }
    return Setup(**{**values, **changes})
