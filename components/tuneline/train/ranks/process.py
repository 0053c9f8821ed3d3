"""One rank: `python -m tuneline.train.ranks.process DIRECTORY PID`; see `launch`."""

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

_MEETING_TIME = datetime.timedelta(hours=12)
"""Ranks wait so long for each other; one that died is found by its process' end, not by this."""


class OutOfMemory(Exception):
    """The device's memory was full in a training step."""


class StartAgain(Exception):
    """A run goes back to a checkpoint, and ZeRO-2 has to be made anew for it."""

    def __init__(self, carried: str) -> None:
        super().__init__(carried)

    @property
    def carried(self) -> dict[str, Any]:
        """What `ResumableTrainer.train_from` keeps of the run so far; it is told as JSON."""
        return json.loads(str(self))


def main(directory: Path, starter: int) -> None:
    """Do the job of this rank, and leave its result or its error in the directory.

    Args:
        directory: see `launch`.
        starter: the process that looks after this machine's ranks; they end with it.
    """
    number = int(os.environ["RANK"])
    _write(directory / f"rank-{number}.pid", str(os.getpid()))
    job = pickle.loads((directory / JOB_FILE).read_bytes())
    _end_with(starter)
    logging.basicConfig(
        level=logging.INFO if number == 0 else logging.WARNING,
        format="%(levelname)s %(name)s: %(message)s",
    )
    try:
        result = _do(job)
        if number == 0:
            _write(directory / RESULT_FILE, pickle.dumps(result))
    except Exception as error:
        traceback.print_exc()
        is_known = isinstance(error, TunelineError | OutOfMemory | StartAgain)
        record = {
            "kind": type(error).__name__ if is_known else "Exception",
            "message": str(error) if is_known else f"{type(error).__name__}: {error}",
            "time": time.time(),
        }
        _write(directory / f"rank-{number}.error", json.dumps(record))
        sys.stderr.flush()
        # Not through the interpreter's end: clean-ups of libraries wait for the other ranks.
        os._exit(1)
    _write(directory / f"rank-{number}.done", "")


def _do(job: dict[str, Any]) -> Any:
    import torch
    import torch.distributed as dist

    if job["device"] == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(
        "nccl" if job["device"] == "cuda" else "gloo",
        timeout=_MEETING_TIME,
        device_id=torch.device("cuda", torch.cuda.current_device())
        if job["device"] == "cuda"
        else None,
    )
    if dist.get_world_size() != job["num_ranks"]:
        raise TrainingError(
            f"{job['num_ranks']} ranks were to train together, and {dist.get_world_size()} have "
            "met: a launcher did not pass its environment on"
        )
    result = job["function"](**job["arguments"])
    dist.barrier()
    dist.destroy_process_group()
    return result


def _write(path: Path, content: str | bytes) -> None:
    """Write a file that nobody sees half written."""
    partial = path.with_name(f".{path.name}")
    partial.write_bytes(content.encode() if isinstance(content, str) else content)
    partial.rename(path)


def _end_with(parent: int) -> None:
    """End this process when the step's is gone: nobody would take the result or stop the work."""

    def watch() -> None:
        while True:
            try:
                os.kill(parent, 0)
            except ProcessLookupError:
                os._exit(1)
            time.sleep(0.5)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    # By its own name: what this module defines is pickled as tuneline.train.ranks.process's.
    from tuneline.train.ranks.process import main as _main

    _main(Path(sys.argv[1]), int(sys.argv[2]))
