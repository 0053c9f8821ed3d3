"""A process that is killed while it holds a directory open."""

import contextlib
import os
import signal
from collections.abc import Callable
from pathlib import Path


def killed_in(
    opened: contextlib.AbstractContextManager[Path], action: Callable[[Path], object]
) -> None:
    """Enter a context in another process, and send that process SIGKILL after an action there."""
    child = os.fork()
    if child == 0:
        with opened as directory:
            action(directory)
            os.kill(os.getpid(), signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
