"""Watch the rank processes of this machine by their process IDs, and kill them."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from tuneline.runtime.stop_request import StopRequest

_POLL_SECONDS = 0.05
_SECONDS_FOR_OTHER_RANKS = 1.0
"""Time for the other ranks to write their errors after one rank has failed."""


def watch(
    process: subprocess.Popen[bytes],
    directory: Path,
    local: range,
    num_ranks: int,
    stop: StopRequest,
    is_over: Callable[[], bool],
) -> None:
    """Wait until the ranks of this machine have ended, or a rank of any machine has failed.

    Args:
        process: Process that started the ranks of this machine, or that is the only rank.
        directory: Directory of the files that the ranks exchange; see `launch`.
        local: The ranks of this machine.
        num_ranks: Number of ranks of all machines.
        stop: Whether this process has received SIGTERM, which is then passed on to the ranks.
        is_over: Whether the ranks are to be killed, because another machine ended the attempt.
    """
    is_forwarded = False
    while process.poll() is None and not is_over():
        if stop.is_made and not is_forwarded:
            # Send SIGTERM only to the ranks: torchrun would kill them half a minute later.
            is_forwarded = True
            for rank in local:
                _send(_pid(directory, rank), signal.SIGTERM)
        remote = (rank for rank in range(num_ranks) if rank not in local)
        have_failed = [has_failed(directory, rank) for rank in local]
        have_failed += [_has_recorded_failure(directory, rank) for rank in remote]
        if any(have_failed):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_SECONDS_FOR_OTHER_RANKS)
            break
        time.sleep(_POLL_SECONDS)
    # Check once more. The process may have ended between two rounds, and another rank that is dead
    # by now may be the cause of the first failure.
    for rank in local:
        has_failed(directory, rank)


def kill(process: subprocess.Popen[bytes], directory: Path, local: range) -> None:
    """Kill the ranks of this machine if they still run, and wait for their process."""
    if process.poll() is None:
        for rank in local:
            _send(_pid(directory, rank), signal.SIGKILL)
        try:
            process.wait(_SECONDS_FOR_OTHER_RANKS)
        except subprocess.TimeoutExpired:
            process.kill()
    process.wait()


def _pid(directory: Path, rank: int) -> int | None:
    try:
        return int((directory / f"rank-{rank}.pid").read_text())
    except (OSError, ValueError):
        return None


def _send(pid: int | None, signal_number: int) -> None:
    if pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal_number)


def _has_recorded_failure(directory: Path, rank: int) -> bool:
    """Return whether a rank of any machine has failed, according to the exchanged files."""
    return any((directory / f"rank-{rank}.{suffix}").exists() for suffix in ("error", "dead"))


def has_failed(directory: Path, rank: int) -> bool:
    """Return whether a rank of this machine has failed; write `rank-N.dead` if it has died."""
    if (directory / f"rank-{rank}.error").exists():
        return True
    pid = _pid(directory, rank)
    if pid is None or _is_running(pid) or (directory / f"rank-{rank}.done").exists():
        return False
    # The rank may have written its error between the first check and its end.
    if not (directory / f"rank-{rank}.error").exists():
        (directory / f"rank-{rank}.dead").touch()
    return True


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
