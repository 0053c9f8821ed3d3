"""Treat SIGTERM, which Kubernetes and schedulers send, as a request to stop at a safe point."""

import contextlib
import logging
import signal
import threading
from collections.abc import Iterator
from typing import Any

logger = logging.getLogger(__name__)


class StopRequest:
    """A flag that is set once the process has received SIGTERM."""

    def __init__(self) -> None:
        self.is_made = False

    def make(self, *_: Any) -> None:
        """Set the flag; the method has the arguments of a signal handler, which it ignores."""
        self.is_made = True
        logger.warning("received SIGTERM: writing a checkpoint after this optimizer step")


@contextlib.contextmanager
def stop_on_sigterm() -> Iterator[StopRequest]:
    """Turn SIGTERM into a request to stop while the body runs.

    Training then finishes the current optimizer step and writes a checkpoint. This saves the work
    since the last checkpoint where the process has time for it: on one machine, and in the pods of
    a TrainJob. A pod of KFP is gone about a second after SIGTERM, whatever its grace period,
    because KFP's launcher does not wait. Its retry continues from the last regular checkpoint.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        logger.warning("not in the main thread: SIGTERM will end this run without a checkpoint")
        yield request
        return
    before = signal.signal(signal.SIGTERM, request.make)
    try:
        yield request
    finally:
        signal.signal(signal.SIGTERM, before)
