"""Compute global batch, micro-batch and number of steps from a config and a number of ranks.

    global batch      the examples of an optimizer step, over all ranks
    rank's part       global batch / ranks
    micro-batch       a divisor of the rank's part: the examples of one forward and backward pass

The recipe check, `tuneline plan` and the train step all use this module. It also accepts the
deprecated transformers keys per_device_train_batch_size and gradient_accumulation_steps. These
count per rank, so a global batch that is set with them depends on the number of ranks.
"""

import math
from dataclasses import dataclass

from tuneline.errors import RecipeError
from tuneline.train.config import TrainConfig

FEW_STEPS = 10
"""Number of optimizer steps below which an adapter learns little."""
UPSTREAM_MICRO_BATCH_SIZE = 2
UPSTREAM_ACCUMULATION_STEPS = 4
"""Defaults of per_device_train_batch_size and gradient_accumulation_steps. Each is used if a config
has only the other key, and is the key's default in earlier versions of tuneline."""


@dataclass(frozen=True)
class BatchSize:
    """Batch size that a config asks for on a number of ranks."""

    num_ranks: int
    global_batch_size: int
    """Examples per optimizer step, over all ranks."""
    micro_batch_size: int
    """Highest number of examples per micro-batch; at most a rank's part of the global batch."""
    is_auto: bool = False
    """Whether the config says auto, so that `micro_batch_size` may be lowered to fit memory."""
    deprecation: str = ""
    """Warning that names the keys to use instead of transformers' keys; empty without those."""

    @property
    def divides(self) -> bool:
        """Whether every rank gets the same number of examples."""
        return self.global_batch_size % self.num_ranks == 0

    @property
    def advice(self) -> str:
        """Advice to set a global batch size that the ranks can divide equally."""
        below = self.global_batch_size // self.num_ranks * self.num_ranks
        near = f"{below} or {below + self.num_ranks}" if below else f"{self.num_ranks}"
        return f"set train.global_batch_size to a multiple of {self.num_ranks}, such as {near}"


def batch_size(config: TrainConfig, num_ranks: int) -> BatchSize:
    """Return the batch size of a config on `num_ranks` ranks, divisible or not."""
    if config.uses_upstream_batch_keys:
        return _from_upstream(config, num_ranks)
    part = max(1, config.global_batch_size // num_ranks)
    is_auto = config.micro_batch_size == "auto"
    most = part if config.micro_batch_size == "auto" else config.micro_batch_size
    return BatchSize(num_ranks, config.global_batch_size, min(part, most), is_auto)


def num_total_steps(config: TrainConfig, num_examples: int, global_batch_size: int) -> int:
    """Return the number of optimizer steps of a run; an example is a row or a pack of rows."""
    if config.max_steps is not None:
        return config.max_steps
    steps_per_epoch = math.ceil(num_examples / global_batch_size)
    return math.ceil(config.num_train_epochs * steps_per_epoch)


def more_steps_advice(config: TrainConfig, global_batch_size: int, *, packing: bool) -> str:
    """Return what gives a run more optimizer steps.

    Args:
        config: The `train` section of the recipe.
        global_batch_size: Examples per optimizer step.
        packing: Whether an example is a pack of rows.
    """
    unpacked = ", or set train.packing to false" if packing else ""
    return (
        f"lower train.global_batch_size (it is {global_batch_size}), raise "
        f"train.num_train_epochs (it is {config.num_train_epochs:g}){unpacked}"
    )


def largest_micro_batch(global_batch_size: int, most: int, num_ranks: int) -> int:
    """Return the largest micro-batch of at most `most` examples that divides a rank's part.

    Raises:
        RecipeError: the ranks cannot divide the global batch equally.
    """
    if global_batch_size % num_ranks:
        size = BatchSize(num_ranks, global_batch_size, most)
        raise RecipeError(
            f"train.global_batch_size is {global_batch_size}, which {num_ranks} ranks cannot "
            f"divide equally: {size.advice}, or set train.num_ranks to "
            f"{math.gcd(global_batch_size, num_ranks)}"
        )
    part = global_batch_size // num_ranks
    return max(size for size in range(1, min(part, most) + 1) if part % size == 0)


def _from_upstream(config: TrainConfig, num_ranks: int) -> BatchSize:
    micro = config.per_device_train_batch_size or UPSTREAM_MICRO_BATCH_SIZE
    accumulated = config.gradient_accumulation_steps or UPSTREAM_ACCUMULATION_STEPS
    total = micro * accumulated * num_ranks
    ranks = "1 rank" if num_ranks == 1 else f"{num_ranks} ranks"
    return BatchSize(
        num_ranks,
        total,
        micro,
        deprecation=(
            f"train.per_device_train_batch_size {micro} x train.gradient_accumulation_steps "
            f"{accumulated} x {ranks} are deprecated names for a global batch of {total} examples: "
            f"write train.global_batch_size: {total} and train.micro_batch_size: {micro} instead"
        ),
    )
