"""Why ranks failed, and whether the same training can succeed in new processes.

A fault of a GPU, its driver, NCCL or the network breaks the process that meets it, but not the
training: new processes continue from the last checkpoint (see `restarts`). A fault of the program
or of its input happens again, so it is not in `_TRANSIENT`. Examples are an invalid argument of a
CUDA function, and a failed assertion on the device, which an index out of range causes there.
"""

import json
import re
from pathlib import Path
from typing import Any

from tuneline import errors
from tuneline.errors import StoppedError, TrainingError
from tuneline.runtime.stop_request import StopRequest
from tuneline.train.ranks.nodes import Node
from tuneline.train.ranks.process import OutOfMemory, StartAgain

NODE_RESTARTED = "the pod of node {} restarted while its ranks were running"
"""Message of a rank whose pod restarted."""

_NUM_LOG_LINES = 8

_CUDA_FAULTS = (
    # The GPU: memory errors, NVLink, a GPU that no longer answers (Xid 79).
    *("uncorrectable", "hardware stack error", "contained error", "GPU is lost"),
    *("unspecified launch failure", "launch timed out", "no CUDA-capable device is detected"),
    *("devices? (is|are)( all)? busy or unavailable", "system not yet initialized"),
    # The driver, or a kernel that read what a broken GPU or driver wrote.
    *("unknown error", "operating system call failed", "driver shutting down"),
    *("illegal memory access", "misaligned address", "illegal instruction"),
    "invalid program counter",
)
_TRANSIENT = re.compile(
    rf"cuda (driver )?error:? [^|]*({'|'.join(_CUDA_FAULTS)})"
    r"|cublas_status_(execution_failed|internal_error)|cudnn_status_(execution_failed|internal)"
    # NCCL, without "invalid usage" and "invalid argument".
    r"|nccl[^|]*(unhandled (cuda|system) error|internal error|remote process exited|network error"
    r"|timeout|timed out|was aborted)|watchdog caught collective operation timeout"
    # The connections between ranks, in NCCL, gloo and the store through which they meet.
    r"|connection (closed by peer|reset by peer|was (likely )?closed|refused)|broken pipe"
    r"|distnetworkerror|the client socket has (failed|timed out)|socket timeout"
    rf"|{NODE_RESTARTED.format(r'[0-9]+')}",
    re.IGNORECASE,
)


class RankFault(TrainingError):
    """A rank died, or failed in a way that new processes can survive."""


def is_transient(message: str) -> bool:
    """Return whether an exception's message names a fault that new processes can survive."""
    return _TRANSIENT.search(message) is not None


def failure(
    directory: Path, num_ranks: int, stop: StopRequest, node: Node | None = None
) -> Exception:
    """Return the error of the rank that failed first; a RankFault if new processes may succeed.

    Args:
        directory: Directory of the files that the ranks exchange; see `launch`.
        num_ranks: Number of ranks, over all nodes.
        stop: Whether the step received SIGTERM.
        node: This node, if there are several.
    """
    errors_of_ranks: list[tuple[dict[str, Any], int]] = []
    silent = []
    for rank in range(num_ranks):
        path = directory / f"rank-{rank}.error"
        if path.exists():
            errors_of_ranks.append((json.loads(path.read_text(encoding="utf-8")), rank))
        elif not (directory / f"rank-{rank}.done").exists():
            silent.append(rank)
    known_errors = [error for error, _ in errors_of_ranks if error["kind"] != "Exception"]
    if known_errors:
        # These errors explain more than the exceptions that they cause on other ranks.
        first = min(known_errors, key=lambda error: error["time"])
        internal_kinds = {kind.__name__: kind for kind in (OutOfMemory, StartAgain)}
        kind = internal_kinds.get(first["kind"]) or getattr(errors, first["kind"])
        known: Exception = kind(first["message"])
        return known
    if stop.is_made:
        return StoppedError(
            "stopped by SIGTERM before the first step: run the step again, and it resumes from "
            "its last checkpoint if there is one"
        )
    failed_rank, what, may_succeed = 0, "ended without a result", False
    # A silent rank without a .dead file was alive until the watcher killed it.
    dead = [rank for rank in silent if (directory / f"rank-{rank}.dead").exists()]
    if dead:
        failed_rank, may_succeed = dead[0], True
        what = "was killed or crashed without an error message (is the machine short of memory?)"
    elif errors_of_ranks:
        error, failed_rank = min(errors_of_ranks, key=lambda pair: pair[0]["time"])
        what = f"failed: {error['message']}"
        # If another rank failed for good, the lost connection to it is only a consequence.
        may_succeed = all(is_transient(error["message"]) for error, _ in errors_of_ranks)
    others = ", so the other ranks were killed" if num_ranks > 1 else ""
    lines = _last_lines(directory, failed_rank, node.ranks_per_node if node else num_ranks)
    tail = f"; the end of its log: {' | '.join(lines)}" if lines else ""
    message = f"rank {failed_rank} of {num_ranks} {what}{others}{tail}"
    return RankFault(message) if may_succeed else TrainingError(message)


def _last_lines(directory: Path, rank: int, ranks_per_node: int) -> list[str]:
    node, local_rank = divmod(rank, ranks_per_node)
    for path in directory.glob(f"logs-{node}/*/attempt_0/{local_rank}/stderr.log"):
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        return [line.strip() for line in lines if line.strip()][-_NUM_LOG_LINES:]
    return []
