"""Config of the gate step."""

from pydantic import Field

from tuneline.verdict import GateRule


class GateConfig(GateRule):
    """When a tuned model is good enough to be published."""

    target_tasks: tuple[str, ...] = ()
    """Tasks that have to improve. Default: all tasks of the evaluation. The name of a group, such
    as kobest, stands for all samples of its tasks together."""
    num_resamples: int = Field(default=10_000, ge=100)
    """Resamples of the bootstrap behind the intervals of scores other than 0 and 1."""
    seed: int = 3407
    """Seed of the bootstrap."""
