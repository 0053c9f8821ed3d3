"""Start the process of a local run, show its progress, and stop it together with its steps."""

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from tuneline.errors import UserError, WorldError
from tuneline.pipelines.local.run_dir import (
    CHECKPOINT_DIR,
    NEVER_CACHED,
    LocalRun,
    Start,
    remove_partial_artifacts,
    set_events_aside,
)
from tuneline.pipelines.local.watch import watch
from tuneline.recipe import Recipe
from tuneline.runtime.events import StepRun, failed_run
from tuneline.steps import EVERY_STEP
from tuneline.train.checkpoints import ROOT_VARIABLE, newest_checkpoint

STOP_SECONDS = 120.0
"""Seconds in which the steps of a stopped run may end, e.g. write a checkpoint."""
_NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


class StoppedRun(WorldError):
    """The run was stopped by a signal; the message says what is kept."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + number


def execute(run: LocalRun, recipe: Recipe, start: Start, console: Console) -> int:
    """Run the pipeline in a process group of its own, show its progress, return its exit code.

    Args:
        run: the directory of the run.
        recipe: the recipe.
        start: how the run was started; its exit code is recorded.
        console: where to show the progress.

    Raises:
        StoppedRun: the run was stopped by Ctrl-C or SIGTERM.
        UserError: the run is at work in another process.
    """
    # Otherwise, waiting OpenMP threads would spin on cores that other steps need.
    environment = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", **os.environ}
    command = [sys.executable, "-m", "tuneline.pipelines.local.run", str(run.directory)]
    with open(run.log_path, "a", encoding="utf-8") as log, _signals() as received:
        try:
            # The lock is held until the last process that writes to the log has ended.
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{run.directory} is running: wait until it ends, or stop it") from None
        replace(start, exit_code=None).write(run.directory)
        set_events_aside(run)
        for directory in remove_partial_artifacts(run.directory.parent):
            console.print(f"removed {directory}, left by a step that was killed", markup=False)
        # If this process is killed, its end of the pipe is closed, and the run stops.
        held, ours = os.pipe()
        process = subprocess.Popen(
            [*command, recipe.model_dump_json(), start.runner, *start.uncached],
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=held,
            env=environment,
            start_new_session=True,
        )
        os.close(held)
        try:
            code = watch(process, run.events_path, console)
        except BaseException as stopped:
            _stop(process, received, console)
            if not received:
                raise
            replace(start, exit_code=128 + received[0]).write(run.directory)
            message = f"stopped by {_NAMES[signal.Signals(received[0])]}\n{kept(run)}"
            raise StoppedRun(message, received[0]) from stopped
        finally:
            os.close(ours)
    replace(start, exit_code=code).write(run.directory)
    return code


def kept(run: LocalRun) -> str:
    """Return lines that say which results of a run that ended early are kept, and how to go on."""
    steps = run.steps()
    uncached = run.start.uncached if run.start else []
    finished = run.cached()
    if EVERY_STEP not in uncached:
        again = (*NEVER_CACHED, *uncached)
        finished += [s.name for s in steps if s.status == "finished" and s.step not in again]
    open_step = failed_run(steps)
    lines = []
    if open_step is not None:
        lines.append(f"at step: {_reached(open_step)}")
    lines.append(f"kept: {', '.join(finished) or 'no results yet'}")
    if open_step is not None and open_step.step == "train":
        root = os.environ.get(ROOT_VARIABLE) or run.directory.parent / CHECKPOINT_DIR
        found = newest_checkpoint(Path(root), since=open_step.started)
        lines.append(
            f"kept: checkpoint after optimizer step {found[1]}, in {found[0]}"
            if found is not None
            else "kept: no checkpoint of train, which begins again at its first step"
        )
    lines.append(f"continue: tuneline resume {run.argument}")
    return "\n".join(lines)


def _reached(step: StepRun) -> str:
    return f"{step.name} ({step.done} of {step.total})" if step.total else step.name


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Turn SIGINT and SIGTERM into SystemExit in the body; yield the list of those received."""
    received: list[int] = []

    def stop(number: int, _: object) -> None:
        received.append(number)
        # A second signal must not interrupt the wait for the steps; `_stop` looks at the list.
        if len(received) == 1:
            sys.exit(128 + number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(process: subprocess.Popen[bytes], received: list[int], console: Console) -> None:
    """End the process group of a run: the runner and the steps that it started.

    Args:
        process: the leader of the group.
        received: signals that this process received; after the second one, the group is killed.
        console: where to say that the steps are waited for.
    """
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    if received:
        console.print("\nstopping: the running step may write a checkpoint first", markup=False)
    deadline = time.monotonic() + STOP_SECONDS
    while _has_live_process(process):
        if len(received) > 1 or time.monotonic() > deadline:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            break
        time.sleep(0.1)
    process.wait()


def _has_live_process(leader: subprocess.Popen[bytes]) -> bool:
    """Return whether a process of a group has not ended; one that nobody waits for has."""
    if leader.poll() is None:
        return True
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, group = path.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue  # It has ended meanwhile.
        if int(group) == leader.pid and state not in "ZX":
            return True
    return False
