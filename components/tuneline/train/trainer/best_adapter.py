"""Keep the adapter with the lowest evaluation loss, and end a run that no longer improves."""

import logging
from typing import Any

from transformers import TrainerCallback

from tuneline.train.trainer.resumable import ResumableTrainer

logger = logging.getLogger(__name__)


class BestAdapterCallback(TrainerCallback):
    """Keeps the best adapter, and stops training if `patience` evaluations in a row are no better.

    The best adapter is small, so it is held in host memory and stored in every checkpoint. The
    evaluation before the first step does not count: an untrained adapter is not a result.
    """

    def __init__(self, trainer: ResumableTrainer, patience: int | None) -> None:
        self._trainer = trainer
        self._patience = patience

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Compare the evaluation loss with the lowest one so far."""
        run_state = self._trainer.run_state
        loss = float(kwargs["metrics"]["eval_loss"])
        if state.global_step == 0:
            return
        if run_state.best_eval_loss is None or loss < run_state.best_eval_loss:
            run_state.best_eval_loss = loss
            run_state.best_step = state.global_step
            run_state.evaluations_since_best = 0
            self._trainer.keep_best()
            return
        run_state.evaluations_since_best += 1
        if self._patience is not None and run_state.evaluations_since_best >= self._patience:
            run_state.stopped_early = state.global_step < state.max_steps
            control.should_training_stop = True
            logger.info(
                "stopped at step %d: %d evaluations in a row were no better than that of step %d",
                state.global_step,
                self._patience,
                run_state.best_step,
            )
