"""A signal to a step as an exception in what it waits for."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

from tuneline.errors import StoppedError


@contextlib.contextmanager
def raised_on_sigterm(advice: str, *, once: bool = False) -> Iterator[None]:
    """Have SIGTERM raise StoppedError in the body, in whatever it waits for.

    Outside the main thread, where Python sets no handlers, nothing changes.

    Args:
        advice: what to do about it; ends the sentence.
        once: whether later ones let the body clean up.
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
