"""A request to stop, as Kubernetes and schedulers make it: SIGTERM."""

import contextlib
import logging
import signal
import threading
from collections.abc import Iterator
from typing import Any

logger = logging.getLogger(__name__)


class StopRequest:
    """Whether the process was told to stop."""

    def __init__(self) -> None:
        self.is_made = False

    def make(self, *_: Any) -> None:
        """Ask for a stop at the next place where a run can be continued from."""
        self.is_made = True
        logger.warning("told to stop: writing a checkpoint after this step")


@contextlib.contextmanager
def stop_on_sigterm() -> Iterator[StopRequest]:
    """Turn SIGTERM into a request while the body runs.

    Only the step that is being computed is finished before the checkpoint is written, so the
    grace period (30 s by default in Kubernetes) has to be longer than a step and a write.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        logger.warning("not in the main thread: SIGTERM ends this run without a checkpoint")
        yield request
        return
    before = signal.signal(signal.SIGTERM, request.make)
    try:
        yield request
    finally:
        signal.signal(signal.SIGTERM, before)
