"""The state of a run that transformers does not put into a checkpoint."""

from typing import Self

from pydantic import ConfigDict

from tuneline.artifacts import TrainingPoint
from tuneline.strict_model import StrictModel
from tuneline.train.memory.plan import Plan


class RunState(StrictModel):
    """Counters and history of a training run. Every checkpoint contains them."""

    model_config = ConfigDict(frozen=False)

    points: dict[int, TrainingPoint] = {}
    """Logged values, by optimizer step."""
    num_tokens: int = 0
    """Tokens that went through training steps, without padding."""
    step_seconds: float = 0.0
    """Seconds in training steps, without evaluations."""
    step_rates: list[float] = []
    """Tokens per second of each training step."""
    device_seconds: float = 0.0
    """Seconds in training, evaluations included, summed over devices."""
    energy_joules: float | None = None
    """Energy in joules that the GPUs used during training, evaluations included. null: NVML does
    not report the energy."""
    num_resumptions: int = 0
    """How often the run resumed from a checkpoint after an interruption."""
    divides_optimizer: bool = False
    """Whether ZeRO-2 divides the optimizer state. This does not change if the run resumes on
    another number of ranks."""
    plan: Plan | None = None
    """Plan of the current attempt. `ResumableTrainer.train_from` does not replace this value by
    that of the checkpoint."""
    num_out_of_memory: int = 0
    """How often memory ran out, so that a smaller plan was used. `ResumableTrainer.train_from` does
    not replace this value by that of the checkpoint."""
    num_restarts: int = 0
    """How often a fault of a rank restarted the run. `ResumableTrainer.train_from` does not replace
    this value by that of the checkpoint."""
    num_skipped_steps: int = 0
    """Steps whose loss or gradient was not finite, including those undone by a rollback."""
    skipped_in_a_row: int = 0
    """Skipped steps since the last step that was taken."""
    num_rollbacks: int = 0
    """How often the run returned to a checkpoint because it diverged."""
    rate_factor: float = 1.0
    """Product of the factors by which rollbacks lowered the learning rate."""
    best_step: int | None = None
    """Optimizer step with the lowest evaluation loss."""
    best_eval_loss: float | None = None
    """Lowest evaluation loss."""
    evaluations_since_best: int = 0
    """Evaluations since `best_step`."""
    stopped_early: bool = False
    """Whether the run ended before its last step because the evaluation loss no longer fell."""
    loss_since_log: float = 0.0
    """Sum of the losses of the steps after `last_logged_step`."""
    metrics_since_log: dict[str, list[float]] = {}
    """TRL's metrics of the steps after `last_logged_step`, by TRL's names."""
    last_logged_step: int = 0
    """The last optimizer step whose loss was logged."""
    evaluation_due: bool = False
    """Whether the checkpoint was written before the evaluation that its step requires."""

    @property
    def history(self) -> list[TrainingPoint]:
        """The logged points in the order of steps."""
        return [point for _, point in sorted(self.points.items())]

    def become(self, other: Self) -> None:
        """Copy every value of another state, so that all holders of this object see them."""
        for name in type(self).model_fields:
            setattr(self, name, getattr(other, name))
