"""Copy the log of a TrainJob's pods to the launcher's own log."""

import datetime
import logging
from collections.abc import Callable
from typing import Any

from tuneline.train.trainjob.client import TrainJobs

logger = logging.getLogger(__name__)

NUM_LOG_LINES = 200
_LOG_SLACK_SECONDS = 60
"""Largest difference between the clock of a node and the launcher's."""


class LogMirror:
    """Copies each line of a pod's log once, although reads may fail in between."""

    def __init__(self, jobs: TrainJobs, now: Callable[[], float]) -> None:
        """Prepare to copy; `now` returns the Unix time in seconds."""
        self._jobs, self._now = jobs, now
        self._last_times: dict[str, str] = {}

    def copy_new_lines(self, pod: str) -> None:
        """Log what a pod has logged since the last successful read."""
        options: dict[str, Any] = {"timestamps": True}
        last = self._last_times.get(pod, "")
        if last:
            seconds = self._now() - _seconds_of(last) + _LOG_SLACK_SECONDS
            options["since_seconds"] = max(1, int(seconds))
        for line in self._jobs.log(pod, **options):
            moment, _, text = line.partition(" ")
            # The times of a container ascend and have nine decimals, so they compare as strings.
            if moment > last:
                self._last_times[pod] = moment
                logger.info("%s: %s", pod, text)

    def copy_end(self, pod: str) -> None:
        """Log the last lines of a pod that failed."""
        lines = self._jobs.log(pod, tail_lines=NUM_LOG_LINES)
        logger.error("pod %s failed; the last %d lines of its log:", pod, len(lines))
        for line in lines:
            logger.error("%s: %s", pod, line)


def _seconds_of(moment: str) -> float:
    # Kubernetes writes nine decimals, but Python reads at most six.
    whole = moment.partition(".")[0].rstrip("Z")
    return datetime.datetime.fromisoformat(f"{whole}+00:00").timestamp()
