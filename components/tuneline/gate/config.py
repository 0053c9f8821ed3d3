"""The recipe's part for the decision to publish."""

from pydantic import Field

from tuneline.strict_model import StrictModel


class GateConfig(StrictModel):
    """When a tuned model is good enough."""

    target_tasks: tuple[str, ...] = ()
    """Tasks that must get better; default: all tasks of the evaluation."""
    max_regression: float = Field(0.0, ge=0)
    """How much worse another task's score may become, in the metric's unit: it holds the model
    when the whole interval lies below minus this."""
    num_resamples: int = Field(10_000, ge=100)
    """Bootstrap resamples."""
    seed: int = 3407
