"""SIGTERM as an exception, so that a step stops whatever it is waiting for."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

from tuneline.errors import StoppedError


@contextlib.contextmanager
def raised_on_sigterm(advice: str, *, once: bool = False) -> Iterator[None]:
    """Raise StoppedError in the body when the process receives SIGTERM.

    Outside the main thread, where Python cannot set signal handlers, this does nothing.

    Args:
        advice: what the user should do; the end of the error's sentence.
        once: whether to ignore further signals, so that the body can clean up.
    """

    def stop(*_: Any) -> None:
        if once:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise StoppedError(f"stopped by SIGTERM{advice}")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
