"""Show the progress of a run on the terminal and send it to the runner; record the losses."""

import logging
import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

from tuneline.artifacts import TrainingPoint
from tuneline.runtime.step import emit
from tuneline.train.trainer.state import RunState

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 10.0
"""Shortest time between two log lines with the loss, where there is no progress bar."""
SECONDS_BETWEEN_EVENTS = 1.0
"""Shortest time between two progress events for the runner."""

# The fields of a TrainingPoint by their names in the logs of transformers and TRL.
_FIELDS = {
    "loss": "loss",
    "eval_loss": "eval_loss",
    "learning_rate": "learning_rate",
    "grad_norm": "grad_norm",
    "rewards/margins": "reward_margin",
    "rewards/accuracies": "reward_accuracy",
}


class ProgressCallback(TrainerCallback):
    """Records the history, and shows progress: a bar on a terminal, log lines elsewhere.

    Every rank records the history, but only one shows progress (`shows`).
    """

    def __init__(self, run_state: RunState, *, shows: bool = True) -> None:
        self._run_state = run_state
        self._shows = shows
        self._note = ""
        self._step_began = 0.0
        self._tokens = 0
        self._last_line = 0.0
        self._last_event = 0.0
        self._bar: Progress | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Report the number of steps, and open the bar on a terminal."""
        self._last_line = time.monotonic()
        self._tokens = self._run_state.num_tokens
        if not self._shows:
            return
        emit("train", "progress", done=state.global_step, total=state.max_steps, note="")
        if sys.stderr.isatty():
            self._bar = Progress(
                TextColumn("train"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=Console(stderr=True),
            )
            self._bar.add_task("train", total=state.max_steps, completed=state.global_step, note="")
            self._bar.start()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock of the step."""
        self._step_began = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add the step's time and speed to the state of the run."""
        run_state = self._run_state
        seconds = time.monotonic() - self._step_began
        run_state.step_seconds += seconds
        run_state.step_rates.append((run_state.num_tokens - self._tokens) / max(seconds, 1e-9))
        self._tokens = run_state.num_tokens

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Record the logged values, and show the loss."""
        logs = kwargs["logs"]
        values = {field: float(logs[name]) for name, field in _FIELDS.items() if name in logs}
        if not values:
            return
        points = self._run_state.points
        before = points.get(state.global_step, TrainingPoint(step=state.global_step))
        points[state.global_step] = before.model_copy(update={"epoch": state.epoch, **values})
        if not self._shows:
            return
        if "loss" in values:
            self._note = f"loss {values['loss']:.4g}"
            self._show(state)
        elif "eval_loss" in values:
            logger.info("step %d: evaluation loss %.4f", state.global_step, values["eval_loss"])

    def close(self) -> None:
        """Remove the bar; call this also if training failed."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _show(self, state: Any) -> None:
        now = time.monotonic()
        is_last = state.global_step >= state.max_steps
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=state.global_step, note=self._note)
        elif now - self._last_line >= SECONDS_BETWEEN_LINES or is_last:
            self._last_line = now
            logger.info("step %d of %d: %s", state.global_step, state.max_steps, self._note)
        if now - self._last_event >= SECONDS_BETWEEN_EVENTS or is_last:
            self._last_event = now
            emit(
                "train",
                "progress",
                done=state.global_step,
                total=state.max_steps,
                note=self._note,
            )
