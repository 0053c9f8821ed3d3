"""Signals that are put off until a program has started."""

import os
import signal

import pytest

from tuneline.errors import StoppedError
from tuneline.runtime.signals import deferred_signals, raised_on_sigterm


@pytest.mark.parametrize(
    ("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, StoppedError)]
)
def test_a_signal_is_delivered_after_the_body(
    number: signal.Signals, raised: type[BaseException]
) -> None:
    done = []
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with raised_on_sigterm(": run it again"):
            handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
            with pytest.raises(raised), deferred_signals():
                os.kill(os.getpid(), number)
                done.append("body")
            after = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    finally:
        signal.signal(signal.SIGINT, before)
    assert done == ["body"] and after == handlers
