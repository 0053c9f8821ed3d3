"""Config of the gate step."""

from pydantic import Field

from tuneline.strict_model import StrictModel


class GateConfig(StrictModel):
    """When a tuned model is good enough to be published."""

    target_tasks: tuple[str, ...] = ()
    """Tasks that have to improve. Default: all tasks of the evaluation."""
    max_regression: float = Field(default=0.0, ge=0)
    """Allowed loss of quality on the other tasks, in the unit of the metric. The verdict is hold
    if, for any such task, the whole 95 % interval of the difference (positive: tuned is better)
    lies below -max_regression."""
    num_resamples: int = Field(default=10_000, ge=100)
    """Resamples of the bootstrap behind the 95 % intervals."""
    seed: int = 3407
    """Seed of the bootstrap."""
