"""What a run knows of itself beyond what transformers puts into a checkpoint."""

from typing import Self

from pydantic import ConfigDict

from tuneline.artifacts import TrainingPoint
from tuneline.strict_model import StrictModel
from tuneline.train.memory.plan import Plan


class RunState(StrictModel):
    """Counters and history of a training run; changes as it goes, travels in every checkpoint."""

    model_config = ConfigDict(frozen=False)

    points: dict[int, TrainingPoint] = {}
    """What was logged, by step."""
    num_tokens: int = 0
    """Tokens that went through training steps, padding not counted."""
    step_seconds: float = 0.0
    """Time in training steps alone, without evaluations."""
    device_seconds: float = 0.0
    """Time in training, evaluations included, of all devices."""
    energy_joules: float | None = None
    """What the GPU took in that time, where NVML says it."""
    num_resumptions: int = 0
    divides_optimizer: bool = False
    """Whether ZeRO-2 has the optimizer: a run goes on as it began, on any number of ranks."""
    plan: Plan | None = None
    """The settings that were made to fit; kept when a checkpoint is read."""
    num_out_of_memory: int = 0
    """How often memory ran out and a smaller plan was taken; kept likewise."""
    num_skipped_steps: int = 0
    """Steps whose loss or gradient was not finite, those undone by a rollback too."""
    skipped_in_a_row: int = 0
    num_rollbacks: int = 0
    rate_factor: float = 1.0
    """What rollbacks multiplied the learning rate by."""
    best_step: int | None = None
    best_eval_loss: float | None = None
    evaluations_since_best: int = 0
    stopped_early: bool = False
    loss_since_log: float = 0.0
    """Sum of the losses of the steps after the last one that was logged."""
    metrics_since_log: dict[str, list[float]] = {}
    """What TRL measured in those steps, by its names."""
    last_logged_step: int = 0
    evaluation_due: bool = False
    """Whether the checkpoint was written in place of the evaluation that its step asks for."""

    @property
    def history(self) -> list[TrainingPoint]:
        """The points in the order of steps."""
        return [point for _, point in sorted(self.points.items())]

    def become(self, other: Self) -> None:
        """Take over every value of another state; whoever holds this one sees them."""
        for name in type(self).model_fields:
            setattr(self, name, getattr(other, name))
