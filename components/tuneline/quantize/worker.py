"""Run a program that ends with the step: no signal to the step leaves it behind."""

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tuneline.errors import StoppedError


def run_to_end(
    command: list[str], *, cwd: Path, env: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    """Run a program in a session of its own; what interrupts the wait ends it and its children."""
    with subprocess.Popen(
        command,
        cwd=cwd,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        # gptqmodel's progress bars ask the terminal questions; in a background job that stops it.
        start_new_session=True,
    ) as process:
        try:
            out, err = process.communicate()
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


@contextlib.contextmanager
def raised_on_sigterm() -> Iterator[None]:
    """Have the first SIGTERM raise StoppedError in the body; later ones let it clean up.

    Outside the main thread, where Python sets no handlers, nothing changes.
    """

    def stop(*_: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise StoppedError("stopped by SIGTERM, and nothing of the export was kept: run it again")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
