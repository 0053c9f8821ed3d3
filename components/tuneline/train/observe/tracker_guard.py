"""Keep experiment trackers from ending a run: training does not depend on them.

A tracker that fails as training begins still ends the run: that costs nothing, and the recipe asks
for it. Later, a tracker whose server is unreachable is switched off with a warning.
"""

import logging
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback
from transformers.integrations import integration_utils

logger = logging.getLogger(__name__)

_MAY_FAIL = ("on_init_end", "on_train_begin")
"""Events in which a tracker connects to its server."""


class GuardedTracker(TrainerCallback):
    """Passes all events on to a tracker until one of them fails."""

    def __init__(self, tracker: TrainerCallback) -> None:
        self._tracker = tracker
        self._has_failed = False

    def __getattribute__(self, name: str) -> Any:
        """Return the tracker's method for an event, guarded; anything else as usual."""
        if not name.startswith("on_"):
            return super().__getattribute__(name)
        event = getattr(self._tracker, name)
        return event if name in _MAY_FAIL else self._guarded(event)

    def _guarded(self, event: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            if self._has_failed:
                return None
            try:
                return event(*arguments, **named)
            # Trackers raise errors of their own kinds, of their HTTP client, or of the disk.
            except Exception as error:
                self._has_failed = True
                logger.warning(
                    "%s has failed and gets no more values, but training goes on: %s: %s",
                    type(self._tracker).__name__,
                    type(error).__name__,
                    str(error).partition("\n")[0],
                )
                return None

        return call


def guard_trackers(trainer: Any) -> None:
    """Guard all trackers of a trainer."""
    classes_of: Any = integration_utils.get_reporting_integration_callbacks
    for tracker_class in classes_of(trainer.args.report_to):
        tracker = trainer.pop_callback(tracker_class)
        if tracker is not None:
            trainer.add_callback(GuardedTracker(tracker))
