"""A trainer that can be stopped and resumed without any effect on its result."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainerCallback

from tuneline.models.adapter_files import check_tensors
from tuneline.runtime.stop_request import StopRequest
from tuneline.train.checkpoints import CheckpointStore
from tuneline.train.ranks import collectives, zero2
from tuneline.train.trainer.rates import set_rate
from tuneline.train.trainer.shared_steps import SharedStepTrainer
from tuneline.train.trainer.state import RunState

KNOWN_TO_THE_STEP = ("plan", "num_out_of_memory", "num_restarts")
"""Fields of the run's state that the step's process knows better than a checkpoint."""
_STATE_FILE = "run_state.json"
_BEST_FILE = "best_adapter.safetensors"


class EvaluationAbandoned(Exception):
    """A stop was requested during an evaluation."""


def saved_state(checkpoint: Path) -> RunState:
    """Return the state of the run that a checkpoint contains."""
    path = checkpoint / _STATE_FILE
    return RunState.parse(path.read_text(encoding="utf-8"), where=str(path))


class ResumableTrainer(SharedStepTrainer):
    """A base of TRL's trainers that makes transformers' checkpoints atomic and complete.

    A checkpoint of transformers has the adapter, the optimizer, the scheduler, the RNG states and
    the position in the data. This class adds the `RunState`, which includes the sum of losses since
    the last log, and whether a stop interrupted an evaluation that is still to be done. Evaluations
    do not use the RNG that training uses, so neither their number nor their repetition changes the
    training.

    With several ranks, all ranks call these methods together, and rank 0 writes the files. Except
    for the RNG state of each rank, a checkpoint does not depend on the number of ranks.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.store: CheckpointStore | None = None
        """Where checkpoints are written. None: no checkpoints."""
        self.stop = StopRequest()
        """Stop request of this process. `agree_to_stop` exchanges the requests of all ranks."""
        self.stops = False
        """Whether all ranks have agreed to stop."""
        self.is_spent = False
        """Whether they stop because the run may cost no more."""
        self.embedding_rate: float | None = None
        """Learning rate of modules that are trained in full. None: the same as the adapter's."""
        self._rate_scale = 1.0
        self._best: dict[str, torch.Tensor] = {}

    def keep_checkpoints(
        self,
        store: CheckpointStore,
        *,
        minutes: float,
        stop: StopRequest,
        is_spent: Callable[[], bool] = lambda: False,
    ) -> None:
        """Write a checkpoint before the first step, then every `minutes` minutes, and at a stop.

        Args:
            store: Where checkpoints are written.
            minutes: Minutes between two checkpoints.
            stop: Stop request of this process.
            is_spent: Function that says after each step whether the run may cost no more, which
                stops it too.
        """
        self.store = store
        self.stop = stop
        self.add_callback(_CheckpointCallback(self, minutes, is_spent))

    def train_from(self, checkpoint: Path | None, carried: Mapping[str, Any] = {}) -> None:
        """Train to the end.

        Args:
            checkpoint: The checkpoint to resume from. None: start from the beginning.
            carried: Fields of the run's state whose values replace those of the checkpoint. A new
                `rate_factor` scales the learning rates of all further steps.
        """
        if checkpoint is not None:
            known = {name: getattr(self.run_state, name) for name in KNOWN_TO_THE_STEP}
            saved = saved_state(checkpoint)
            self.run_state.become(saved.model_copy(update=known))
            factor = self.run_state.rate_factor
            if carried:
                self.run_state.become(self.run_state.model_copy(update=carried))
            else:
                self.run_state.num_resumptions += 1
            self._rate_scale = self.run_state.rate_factor / factor
            best = checkpoint / _BEST_FILE
            self._best = load_file(best) if best.exists() else {}
        evaluates = self.eval_dataset is not None
        first_is_missing = 0 not in self.run_state.points
        self.args.eval_on_start = evaluates and (first_is_missing or self.run_state.evaluation_due)
        if not collectives.is_first():
            # So that dropout differs from that of rank 0. If the checkpoint has an RNG state of
            # this rank, that state replaces this seed.
            torch.manual_seed(self.args.seed + collectives.rank())
        try:
            self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except EvaluationAbandoned:
            # Only the evaluation at the start raises it here. Its step already has a checkpoint.
            self.run_state.evaluation_due = True

    def agree_to_stop(self, *others: bool) -> list[bool]:
        """Set `stops` on all ranks if any rank was asked to stop.

        Args:
            others: More flags to exchange in the same collective operation.

        Returns:
            For each flag of `others`, whether it is set on any rank.
        """
        stops, *flags = collectives.any_of(self.stop.is_made, *others)
        self.stops = self.stops or stops
        return flags

    @property
    def is_done(self) -> bool:
        """Whether no step and no evaluation remains."""
        return self._has_no_step_left and not self.run_state.evaluation_due

    @property
    def _has_no_step_left(self) -> bool:
        return self.run_state.stopped_early or self.state.global_step >= self.state.max_steps

    def keep_best(self) -> None:
        """Keep a copy of the current adapter as the best one."""
        weights = get_peft_model_state_dict(self.model, save_embedding_layers=False)
        self._best = {name: tensor.detach().cpu().clone() for name, tensor in weights.items()}

    def restore_best(self) -> None:
        """Replace the adapter by the copy that `keep_best` made, if there is one."""
        if self._best:
            own = get_peft_model_state_dict(self.model, save_embedding_layers=False)
            check_tensors(self._best, own, called="the best adapter of the checkpoint")
            set_peft_model_state_dict(self.model, self._best)

    def create_optimizer(self, *args: Any) -> torch.optim.Optimizer:
        """Return the optimizer, with `embedding_rate` for modules that are trained in full."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(*args)
        if is_new and self.embedding_rate is not None:
            assert self.model is not None
            in_full = (p for n, p in self.model.named_parameters() if ".modules_to_save." in n)
            set_rate(optimizer, in_full, self.embedding_rate)
        return optimizer

    def _scale_rates(self) -> None:
        if self._rate_scale == 1.0:
            return
        assert self.optimizer is not None and self.lr_scheduler is not None
        # Any: the types allow DeepSpeed's placeholders, which no run has.
        optimizer, scheduler = cast(Any, self.optimizer), cast(Any, self.lr_scheduler)
        for group in optimizer.param_groups:
            group["lr"] *= self._rate_scale
            group["initial_lr"] *= self._rate_scale
        scheduler.base_lrs = [rate * self._rate_scale for rate in scheduler.base_lrs]
        scheduler._last_lr = [rate * self._rate_scale for rate in scheduler._last_lr]
        self._rate_scale = 1.0

    @property
    def _measured(self) -> dict[str, list[float]]:
        # TRL averages these metrics at each log, and then clears them.
        trl: Any = self
        metrics: dict[str, list[float]] = trl._metrics["train"]
        return metrics

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate without drawing from the RNG that training uses."""
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with torch.random.fork_rng(devices):
            metrics = super().evaluate(*args, **kwargs)
        self.run_state.evaluation_due = False
        return metrics

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate one batch, unless a stop was requested.

        An evaluation can take long, so a stop does not wait for its end.

        Raises:
            EvaluationAbandoned: a rank was asked to stop.
        """
        self.agree_to_stop()
        if self.stops:
            raise EvaluationAbandoned
        return super().prediction_step(*args, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # If the run resumes after its last step or an early stop, transformers would take a step.
        if self._has_no_step_left:
            self.control.should_training_stop = True
            return
        transformers: Any = super()
        transformers._run_epoch(*args, **kwargs)

    def _maybe_log_save_evaluate(
        self, tr_loss: Any, grad_norm: Any, model: Any, *rest: Any, **named: Any
    ) -> None:
        try:
            super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, *rest, **named)
        except EvaluationAbandoned:
            self.run_state.evaluation_due = True
            self.control.should_training_stop = True
            self._save_checkpoint(model, None)

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> Any:
        transformers: Any = super()
        if not self.is_deepspeed_enabled:
            return transformers._prepare_for_training(
                max_steps, train_dataloader, resume_from_checkpoint
            )
        # DeepSpeed's own checkpoints can be read only with the same number of ranks.
        prepared = transformers._prepare_for_training(max_steps, train_dataloader, None)
        zero2.check_once(self)
        if resume_from_checkpoint is not None:
            zero2.load_state(self, Path(resume_from_checkpoint))
        return prepared

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_deepspeed_enabled:
            zero2.save_state(self, Path(output_dir))
        else:
            super()._save_optimizer_and_scheduler(output_dir)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the adapter, on the first rank."""
        if not self.is_deepspeed_enabled:
            super().save_model(output_dir, _internal_call)
        elif self.args.should_save:
            # transformers would first copy the whole model, including the frozen base.
            self._save(output_dir)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self.store is None:
            return
        state = self.run_state
        state.loss_since_log = float(collectives.gathered(self._tr_loss).mean())
        state.metrics_since_log = {name: list(map(float, v)) for name, v in self._measured.items()}
        state.last_logged_step = self._globalstep_last_logged
        step = self.state.global_step
        with self._output_below(self.store.partial):
            # Not TRL's method, which would also write a model card with every checkpoint.
            Trainer._save_checkpoint(self, model, trial)
        collectives.wait_for_all()
        if collectives.is_first():
            written = self.store.partial / f"checkpoint-{step}"
            (written / _STATE_FILE).write_text(state.model_dump_json(), encoding="utf-8")
            if self._best:
                save_file(self._best, written / _BEST_FILE)
            self.store.seal(written, step)
        # No rank may continue, and perhaps end, while rank 0 is still writing.
        collectives.wait_for_all()

    @contextlib.contextmanager
    def _output_below(self, directory: Path) -> Iterator[None]:
        before, self.args.output_dir = self.args.output_dir, str(directory)
        try:
            yield
        finally:
            self.args.output_dir = before


class _CheckpointCallback(TrainerCallback):
    """Decides when a checkpoint is due, and restores counters that the trainer's loop resets."""

    def __init__(
        self, trainer: ResumableTrainer, minutes: float, is_spent: Callable[[], bool]
    ) -> None:
        self._trainer = trainer
        self._is_spent = is_spent
        self._seconds = 60 * minutes
        self._last = math.inf

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self._trainer
        self._last = time.monotonic()
        trainer._scale_rates()
        trainer._measured.clear()
        if state.global_step:
            run_state = trainer.run_state
            trainer._tr_loss.fill_(run_state.loss_since_log)
            trainer._measured.update(run_state.metrics_since_log)
            trainer._globalstep_last_logged = run_state.last_logged_step
        elif trainer.store is not None and not collectives.from_first(trainer.store.steps):
            # So that an unwritable disk fails now, and a rollback always finds a checkpoint.
            trainer._save_checkpoint(trainer.model, None)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps and self._trainer.eval_dataset is not None:
            control.should_evaluate = True
        is_due = time.monotonic() - self._last >= self._seconds
        is_due, is_spent = self._trainer.agree_to_stop(is_due, self._is_spent())
        if is_spent:
            self._trainer.is_spent = self._trainer.stops = True
        if self._trainer.stops:
            control.should_save = True
            control.should_training_stop = True
        elif is_due:
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._last = time.monotonic()
