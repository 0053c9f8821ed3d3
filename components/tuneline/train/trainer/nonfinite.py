"""What happens when a loss or a gradient is NaN or infinite.

The step is skipped and counted: its gradients are dropped before the optimizer sees them, so that
they change no weight and no moment. After several skipped steps in a row, the run returns to the
last checkpoint before them and continues with a lower learning rate, at most twice.
"""

import functools
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tuneline.artifacts import TRAIN_FILE, DatasetManifest
from tuneline.errors import TrainingError
from tuneline.train.checkpoints import CheckpointStore
from tuneline.train.ranks import collectives
from tuneline.train.ranks.process import StartAgain
from tuneline.train.rows.lookup import rows_of_batches
from tuneline.train.trainer.resumable import ResumableTrainer

logger = logging.getLogger(__name__)

MAX_ROLLBACKS = 2
"""Rollbacks after which a run that diverges again ends with an error."""
RATE_FACTOR = 0.3
"""Factor by which a rollback lowers the learning rate; two rollbacks make it about a tenth."""
NUM_NAMED_ROWS = 20
"""Highest number of rows that an error names."""


class Diverged(Exception):
    """Too many steps in a row had a loss or gradient that is not finite."""


class GuardedTrainer(ResumableTrainer):
    """Skips steps whose loss or gradient is not finite.

    The check waits for the device only once per step, because the losses of all micro-batches are
    checked together with the gradient norm. With float16, a norm that is infinite while all losses
    are finite is caused by the loss scaling; the loss scaler then skips the step, and this class
    does not count the step as skipped.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.max_skipped_in_a_row = 3
        self.bad_batches: list[tuple[int, int]] = []
        """Possible causes of the last skip: micro-batches as (rank, number in the step), from 0."""
        self._losses: list[torch.Tensor] = []
        self._loss_before_step = torch.zeros(())
        self.last_skipped_step = 0
        """Number of the last skipped optimizer step, from 1; 0 if no step was skipped."""
        self.bad_value = "the loss"
        """What was not finite in `last_skipped_step`: "the loss" or "the gradient"."""

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the loss of a micro-batch after its backward pass."""
        if not self._losses:
            self._loss_before_step = self._tr_loss.clone()
        loss = super().training_step(*args, **kwargs)
        self._losses.append(loss)
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        # Called once per step, after clipping and before the optimizer.
        transformers: Any = super()
        norm = transformers._get_grad_norm(model, grad_norm)
        are_finite = torch.stack([torch.isfinite(loss) for loss in self._losses]).int()
        finite = collectives.gathered(are_finite).tolist()
        self._losses.clear()
        norm_is_bad = not self.args.fp16 and not torch.isfinite(torch.as_tensor(norm))
        if self.is_deepspeed_enabled:
            # DeepSpeed has checked the norm itself, and taken or skipped the step by now.
            norm_is_bad = norm_is_bad or self.accelerator.optimizer_step_was_skipped
        if all(map(all, finite)) and not norm_is_bad:
            self.run_state.skipped_in_a_row = 0
            return norm
        places = [(rank, number) for rank, row in enumerate(finite) for number in range(len(row))]
        bad = [(rank, number) for rank, number in places if not finite[rank][number]]
        # If only the gradient is not finite, any micro-batch of the step may be the cause.
        self.bad_batches = bad or places
        self.bad_value = "the loss" if bad else "the gradient"
        self._skip_step()
        return None

    def _skip_step(self) -> None:
        state = self.run_state
        self.last_skipped_step = self.state.global_step + 1
        state.num_skipped_steps += 1
        state.skipped_in_a_row += 1
        logger.warning(
            "step %d is skipped: %s is not finite", self.last_skipped_step, self.bad_value
        )
        # An optimizer leaves parameters without a gradient alone, and does not decay them either.
        assert self.model is not None
        self.model.zero_grad(set_to_none=True)
        # The logged loss is a mean over steps: leave this step out of its sum and its count.
        self._tr_loss.copy_(self._loss_before_step)
        self._globalstep_last_logged += 1
        for name, values in list(self._measured.items()):
            values[:] = [value for value in values if torch.isfinite(torch.as_tensor(value))]
            if not values:
                del self._measured[name]
        if state.skipped_in_a_row >= self.max_skipped_in_a_row:
            raise Diverged

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        if self.run_state.skipped_in_a_row and not self.stops:
            # A rollback returns to the newest checkpoint, which has to precede the skipped steps.
            self.control.should_save = False
        super()._maybe_log_save_evaluate(*args, **kwargs)


def train_through(
    trainer: GuardedTrainer,
    checkpoint: Path | None,
    *,
    dataset_dir: Path,
    manifest: DatasetManifest,
    packing: bool,
    carried: Mapping[str, Any],
) -> None:
    """Train to the end; if training diverges, return to an earlier checkpoint.

    Args:
        trainer: A new trainer.
        checkpoint: The checkpoint to start from. None: start from the beginning.
        dataset_dir: The dataset, as prepare leaves it.
        manifest: Record of the dataset, with the pack length of this attempt.
        packing: Whether the trainer's examples are packs.
        carried: After a rollback, the values of the run's state that replace those of the
            checkpoint, see `StartAgain`; otherwise empty.

    Raises:
        TrainingError: training diverged again after `MAX_ROLLBACKS` rollbacks, or it diverged from
            the first step on, which no lower learning rate can fix. The error names the rows of the
            micro-batches that may be the cause.
        StartAgain: the run has to return to a checkpoint, for which ZeRO-2 needs new processes.
            Call this function in new processes, with the `carried` of the error.
    """
    state = trainer.run_state
    store = trainer.store
    assert store is not None
    while True:
        try:
            trainer.train_from(checkpoint, carried)
        except Diverged:
            last_good = trainer.state.global_step + 1 - state.skipped_in_a_row
            if last_good > 0 and state.num_rollbacks < MAX_ROLLBACKS:
                checkpoint = collectives.from_first(functools.partial(_back_to, store, last_good))
                carried = {
                    "num_skipped_steps": state.num_skipped_steps,
                    "num_rollbacks": state.num_rollbacks + 1,
                    "rate_factor": state.rate_factor * RATE_FACTOR,
                }
                logger.warning(
                    "%d steps in a row were skipped: returning to %s, with %g of the learning rate",
                    state.skipped_in_a_row,
                    checkpoint,
                    carried["rate_factor"],
                )
                if trainer.is_deepspeed_enabled:
                    raise StartAgain(json.dumps(carried)) from None
                continue
            raise _gave_up(trainer, dataset_dir, manifest, packing) from None
        if state.skipped_in_a_row and not any(point.loss is not None for point in state.history):
            raise _gave_up(trainer, dataset_dir, manifest, packing)
        return


def _back_to(store: CheckpointStore, step: int) -> Path | None:
    store.discard_after(step)
    return store.latest()


def _gave_up(
    trainer: GuardedTrainer, dataset_dir: Path, manifest: DatasetManifest, packing: bool
) -> TrainingError:
    state = trainer.run_state
    rows = rows_of_batches(
        trainer, trainer.last_skipped_step, trainer.bad_batches, dataset_dir, manifest, packing
    )
    named = ", ".join(str(row) for row in rows[:NUM_NAMED_ROWS])
    more = f" and {len(rows) - NUM_NAMED_ROWS} more" if len(rows) > NUM_NAMED_ROWS else ""
    where = (
        f"{trainer.bad_value} is not a finite number at step {trainer.last_skipped_step}, the last "
        f"of {state.skipped_in_a_row} in a row"
    )
    blame = f"the batch was rows {named}{more} of {TRAIN_FILE}, counted from 0"
    if state.num_rollbacks:
        rate = trainer.args.learning_rate
        return TrainingError(
            f"{where}, after {state.num_rollbacks} returns to a checkpoint with a lower rate; "
            f"{blame}: check these rows, lower train.learning_rate (it is {rate:g}, and "
            f"{rate * state.rate_factor:g} did not help), raise train.warmup_steps, or lower "
            "train.max_grad_norm"
        )
    return TrainingError(
        f"{where}, and no step before was finite, so the learning rate is not the cause; {blame}: "
        "check these rows, check that the base model answers sensibly, or set train.dtype to "
        "float32"
    )
