"""End the pods of a TrainJob that nobody follows any more, so that they hold no GPU.

After a cancel, KFP's pods have about a second, and Argo may stop the exit handler before it starts.
Then nobody deletes the TrainJob. Therefore the launcher writes a file on the shared volume in each
round, and the pods stop if the file does not change for `SECONDS`: with a checkpoint, from which a
later job goes on. A launcher that is started again is back within that time in most cases.
"""

import logging
import os
import signal
import threading
import time

from tuneline.errors import StoppedError
from tuneline.train.ranks.nodes import SharedDirectory

logger = logging.getLogger(__name__)

SECONDS = 300.0
"""Time without a launcher after which a pod stops."""
_POLL_SECONDS = 10.0


def stop_without_launcher(
    shared: SharedDirectory, *, seconds: float = SECONDS, poll_seconds: float = _POLL_SECONDS
) -> threading.Event:
    """Watch for the launcher in a thread, and stop this process by SIGTERM if it is gone.

    If the process has not ended after the same time again, it ends without a checkpoint. A
    directory to which no launcher has written is not watched.

    Args:
        shared: Directory in which the launcher writes its beats.
        seconds: Time without a beat after which the process stops.
        poll_seconds: Time between two looks at the file.

    Returns:
        An event that ends the watch.
    """
    ended = threading.Event()

    def watch() -> None:
        last, since = shared.last_beat(), time.monotonic()
        while not ended.wait(poll_seconds):
            beat = shared.last_beat()
            # None: there is no launcher's file, or the volume does not answer.
            if beat is None or beat != last:
                last, since = beat, time.monotonic()
            elif time.monotonic() - since > seconds:
                logger.error(
                    "the launcher has not been seen for %.0f s, so nobody follows this job: "
                    "stopping with a checkpoint",
                    seconds,
                )
                os.kill(os.getpid(), signal.SIGTERM)
                # The first process of a container ignores a signal for which it has no handler.
                if not ended.wait(seconds):
                    os._exit(StoppedError.exit_code)
                return

    threading.Thread(target=watch, daemon=True, name="lease").start()
    return ended
