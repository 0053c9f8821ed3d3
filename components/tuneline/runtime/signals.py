"""Raise an exception on SIGTERM, so that a waiting step stops; delay SIGINT and SIGTERM."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

from tuneline.errors import StoppedError


@contextlib.contextmanager
def deferred_signals() -> Iterator[None]:
    """Delay SIGINT and SIGTERM until the body has ended, for code that must not be interrupted.

    Outside the main thread, where Python never runs signal handlers, this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []
    before = {
        number: signal.signal(number, lambda number, _: received.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
        if signal.getsignal(number) != signal.SIG_IGN
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    for caught in received:
        signal.raise_signal(caught)


@contextlib.contextmanager
def raised_on_sigterm(advice: str, *, once: bool = False) -> Iterator[None]:
    """Raise StoppedError in the body when the process receives SIGTERM.

    Outside the main thread, where Python cannot set signal handlers, this does nothing.

    Args:
        advice: what the user should do; it is appended to the message of the error.
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
