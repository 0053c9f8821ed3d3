"""Restart the ranks after a fault, and decide when another restart would not help.

KFP 2.17 does not run a step again whose process failed, so the step itself starts new ranks, which
continue from the last checkpoint. A fault that comes again before training has gone further is no
accident: it ends the run.
"""

import logging
import os
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from tuneline.errors import TrainingError
from tuneline.train.checkpoints import CheckpointStore
from tuneline.train.ranks.faults import RankFault

logger = logging.getLogger(__name__)

_STEP_FILE = "step"
"""File beside the checkpoints with the number of the optimizer step that began last."""


class StepCallback(TrainerCallback):
    """Writes the number of the current optimizer step to a file that outlives this process."""

    def __init__(self, store: CheckpointStore) -> None:
        self._file = os.open(store.directory / _STEP_FILE, os.O_WRONLY | os.O_CREAT, 0o644)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the number."""
        # Of a fixed length and in one call, so that a reader never sees a part of it.
        os.pwrite(self._file, f"{state.global_step + 1:12d}".encode(), 0)


class Restarts:
    """Counts the restarts of a step, and ends the run if the next one would not help."""

    def __init__(self, store: CheckpointStore, max_restarts: int) -> None:
        self.num_restarts = 0
        self._store = store
        self._max_restarts = max_restarts
        self._reached: tuple[int, int] | None = None
        self._path: Path = store.directory / _STEP_FILE
        # It may be left over from another pod.
        self._path.unlink(missing_ok=True)

    def count(self, fault: RankFault) -> None:
        """Count a restart after a fault, and log it.

        Raises:
            TrainingError: training has not gone further since the last restart, or has been
                restarted `train.max_restarts` times.
        """
        checkpoint = max(self._store.steps(), default=0)
        step = self._step()
        before, self._reached = self._reached, (step, checkpoint)
        where = f"at step {step}" if step else "before the first step"
        if before is not None and step <= before[0] and checkpoint <= before[1]:
            raise TrainingError(
                f"{fault}; this happened {where}, and a restart did not get further, so it would "
                "happen again: check the GPU (`nvidia-smi -q`, dmesg) and the node's memory, then "
                "run the step again, on another node if possible; it resumes from its last "
                "checkpoint"
            ) from fault
        if self.num_restarts >= self._max_restarts:
            raise TrainingError(
                f"{fault}; this happened {where}, after {self.num_restarts} restarts "
                f"(train.max_restarts is {self._max_restarts}): run the step again, on another "
                "node if possible; it resumes from its last checkpoint"
            ) from fault
        self.num_restarts += 1
        logger.warning(
            "%s; this happened %s: restart %d of at most %d, from the checkpoint of step %d",
            *(fault, where, self.num_restarts, self._max_restarts, checkpoint),
        )

    def _step(self) -> int:
        """Return the number of the optimizer step that began last; 0 if none has begun."""
        try:
            return int(self._path.read_text(encoding="ascii"))
        except (OSError, ValueError):
            return 0
