"""What a run decides once, before it trains, from its config, its data and this machine.

`run.decide` makes the Setup, and every later function reads its values instead of deciding again.
Only `within_memory` replaces values: it replaces the plan if memory runs out, and it takes from a
checkpoint the limits of the plan and whether ZeRO-2 divides the optimizer state.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tuneline.artifacts import DatasetManifest, ModelOrigin
from tuneline.train.config import TrainConfig
from tuneline.train.memory.estimate import ZERO_OPTIMIZER
from tuneline.train.memory.plan import Plan

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Inputs:
    """What the earlier steps made: the base model and the dataset."""

    base_model_dir: Path
    dataset_dir: Path
    origin: ModelOrigin
    """Record of the base model."""
    manifest: DatasetManifest
    """Record of the dataset."""
    tokenizer: "PreTrainedTokenizerBase"
    """The base model's tokenizer, with the dataset's chat template."""


@dataclass(frozen=True)
class Setup:
    """Decisions of a run that hold for all its attempts and ranks."""

    device: str
    """Kind of device: "cpu" or "cuda"."""
    num_ranks: int
    """Number of ranks, that is, of processes that train together."""
    dtype: torch.dtype
    """Compute type: the number format of matrix products."""
    learning_rate: float
    """Highest learning rate of the schedule."""
    fused: bool
    """Whether fused kernels replace the model's layers."""
    divides_optimizer: bool
    """Whether ZeRO-2 divides gradients and optimizer state over the ranks."""
    optimizer: str
    """Name of the optimizer, as in transformers: the config's, or the one that ZeRO-2 uses."""
    trackers: tuple[str, ...]
    """Names of the experiment trackers to report to."""
    asked: Plan
    """Plan that the recipe asks for."""
    plan: Plan
    """Plan to train with: `asked` if it fits memory, else the first smaller plan that fits."""
    estimated_bytes: int | None = None
    """Estimated peak memory of a rank with `plan`. None if no estimate exists for the model."""
    table_bytes: int = 0
    """Bytes of host memory that the input embedding and the head of a rank take if they are there;
    0 if they cannot be there."""

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches per optimizer step on one rank."""
        return self.plan.accumulation_steps(self.num_ranks)

    @property
    def changes(self) -> str:
        """Human-readable list of the recipe's settings that the plan changes."""
        kept = {"kept_gib": self.plan.kept_gib}
        return self.plan.changes_from(self.asked.model_copy(update=kept))


def optimizer_name(config: TrainConfig, divides_optimizer: bool) -> str:
    """Return the name of the optimizer that a run uses."""
    return ZERO_OPTIMIZER if divides_optimizer else config.optim
