"""The process of one rank: `python -m tuneline.train.ranks.process DIRECTORY WATCHER_PID`.

torchrun starts this module once per rank; a single rank may also be started without torchrun. The
process writes its process ID, calls the function of job.pickle, and writes the result or the error,
as files in DIRECTORY; `launch` lists the files. WATCHER_PID is the process that watches the ranks
of this machine: a rank exits when that process is gone, because nothing else would read its result
or pass SIGTERM on to it.
"""

import datetime
import json
import logging
import os
import pickle
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from tuneline.errors import TrainingError, TunelineError

logger = logging.getLogger(__name__)

JOB_FILE = "job.pickle"
RESULT_FILE = "result.pickle"

_COLLECTIVE_TIMEOUT = datetime.timedelta(hours=12)
"""Longest time that a rank waits for the others. It can be long, because a dead rank is found by
the watcher and not by this timeout."""


class OutOfMemory(Exception):
    """A training step ran out of device memory."""


class StartAgain(Exception):
    """The run returns to a checkpoint, for which ZeRO-2 needs new processes."""

    def __init__(self, carried: str) -> None:
        super().__init__(carried)

    @property
    def carried(self) -> dict[str, Any]:
        """Values that replace those in the checkpoint, see `ResumableTrainer.train_from`."""
        carried: dict[str, Any] = json.loads(str(self))
        return carried


def main(directory: Path, watcher: int) -> None:
    """Run the job as one rank, and write its result or its error to the directory.

    Args:
        directory: Directory of the files that the ranks exchange; see `launch`.
        watcher: Process ID of the process that watches the ranks of this machine.
    """
    rank = int(os.environ.get("RANK", "0"))
    _write_atomically(directory / f"rank-{rank}.pid", str(os.getpid()))
    job = pickle.loads((directory / JOB_FILE).read_bytes())
    _exit_with(watcher)
    logging.basicConfig(
        level=logging.INFO if rank == 0 else logging.WARNING,
        format="%(levelname)s %(name)s: %(message)s",
    )
    try:
        result = _run(job)
        if rank == 0:
            _write_atomically(directory / RESULT_FILE, pickle.dumps(result))
    except Exception as error:
        traceback.print_exc()
        is_known = isinstance(error, TunelineError | OutOfMemory | StartAgain)
        record = {
            "kind": type(error).__name__ if is_known else "Exception",
            "message": str(error) if is_known else f"{type(error).__name__}: {error}",
            "time": time.time(),
        }
        _write_atomically(directory / f"rank-{rank}.error", json.dumps(record))
        sys.stderr.flush()
        # A normal interpreter exit runs clean-ups of libraries that wait for the other ranks.
        os._exit(1)
    _write_atomically(directory / f"rank-{rank}.done", "")


def _run(job: dict[str, Any]) -> Any:
    if not job["grouped"]:
        return job["function"](**job["arguments"])
    # Imported late: torch takes seconds to import, and the watcher needs the .pid file before.
    import torch
    import torch.distributed as dist

    uses_cuda = job["device"] == "cuda"
    if uses_cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(
        "nccl" if uses_cuda else "gloo",
        timeout=_COLLECTIVE_TIMEOUT,
        device_id=torch.device("cuda", torch.cuda.current_device()) if uses_cuda else None,
    )
    if dist.get_world_size() != job["num_ranks"]:
        raise TrainingError(
            f"{job['num_ranks']} ranks should train together, but the process group has "
            f"{dist.get_world_size()}: check that the launcher passes its environment on to them"
        )
    result = job["function"](**job["arguments"])
    dist.barrier()
    dist.destroy_process_group()
    return result


def _write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file that a reader sees either complete or not at all."""
    partial = path.with_name(f".{path.name}")
    partial.write_bytes(content.encode() if isinstance(content, str) else content)
    partial.rename(path)


def _exit_with(watcher: int) -> None:
    """Start a thread that exits this process when the watcher's process is gone."""

    def poll() -> None:
        while True:
            try:
                os.kill(watcher, 0)
            except ProcessLookupError:
                os._exit(1)
            time.sleep(0.5)

    threading.Thread(target=poll, daemon=True).start()


if __name__ == "__main__":
    # Import the module by its name, so that its classes are not pickled as those of __main__.
    from tuneline.train.ranks.process import main as _main

    _main(Path(sys.argv[1]), int(sys.argv[2]))
