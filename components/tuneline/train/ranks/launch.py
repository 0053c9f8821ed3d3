"""N processes that train together: started by torchrun, watched from here.

torchrun gives each process its rank and its log, and a place to meet. What it does when one of them
dies is not enough: it asks the others to stop, and they wait for the dead one; half a minute later
it kills them, with NCCL. So the step's own process looks after the ranks by their ids, ends all of
them as soon as one is gone, and says which one it was, with the end of its log.

    <directory>/job.pickle        a function and its arguments, the same for every rank
                rank-0.pid        of each rank, when it has started
                rank-0.error      {"kind", "message", "time"}, when it has failed
                rank-0.done       when it has returned
                rank-0.dead       when it was found gone with neither of these
                result.pickle     what the function returned on rank 0
                logs-0/           stdout.log and stderr.log of each rank of a machine

On several machines (see `nodes`) the directory is on a volume that they share, and each looks
after the ranks of its own by their ids, and after the others' by these files.
"""

import contextlib
import json
import logging
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from tuneline import errors
from tuneline.errors import RecipeError, StoppedError, TrainingError
from tuneline.runtime.stop_request import StopRequest, stop_on_sigterm
from tuneline.train.config import TrainConfig
from tuneline.train.ranks.board import Attempt, Nodes
from tuneline.train.ranks.process import JOB_FILE, RESULT_FILE, OutOfMemory, StartAgain

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_LOOKS = 0.05
_SECONDS_FOR_OTHERS = 1.0
"""After one has failed: time for the others to say what happened to them."""
_SECONDS_FOR_OTHER_NODES = 30.0
"""To see that an attempt is over; one that is gone never does."""
_NUM_LOG_LINES = 8


def choose_num_ranks(config: TrainConfig, device: str) -> int:
    """Return how many ranks train.

    Raises:
        RecipeError: more are asked for than there are GPUs, or a launcher has started this process
            as one of several already.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RecipeError(
            f"this process is one of WORLD_SIZE {os.environ['WORLD_SIZE']} that a launcher has "
            "started, and the step starts its ranks itself: run `python -m tuneline.train` alone, "
            "with train.num_ranks"
        )
    num_gpus = torch.cuda.device_count() if device == "cuda" else 0
    nodes = Nodes.from_environment()
    if nodes is not None:
        wanted = _of_all_nodes(nodes, config, device, num_gpus)
    else:
        wanted = max(1, num_gpus) if config.num_ranks == "auto" else config.num_ranks
    if nodes is None and device == "cuda" and wanted > num_gpus:
        raise RecipeError(
            f"train.num_ranks is {wanted}, and this machine has {num_gpus} GPUs: give "
            f"the step as many (placement.num_accelerators: {wanted}), or set num_ranks "
            f"to {num_gpus} or auto; a step learns from the same rows on any number"
        )
    return wanted


def _of_all_nodes(nodes: Nodes, config: TrainConfig, device: str, num_gpus: int) -> int:
    if device == "cuda" and nodes.ranks_each > num_gpus:
        raise RecipeError(
            f"this node has {num_gpus} GPUs, and {nodes.ranks_each} ranks are to train on it: ask "
            "for as many with placement.num_accelerators"
        )
    if config.num_ranks not in ("auto", nodes.num_ranks):
        raise RecipeError(
            f"train.num_ranks is {config.num_ranks}, and {nodes.count} nodes with "
            f"{nodes.ranks_each} ranks each have {nodes.num_ranks}: leave it at auto"
        )
    return nodes.num_ranks


def run_on_ranks(
    num_ranks: int,
    function: Callable[..., Any],
    arguments: Mapping[str, Any],
    *,
    directory: Path,
    device: str,
) -> Any:
    """Call a function on every rank, and return what it returned on the first.

    Args:
        num_ranks: how many; each is a process of its own.
        function: importable by name; `ranks` tells it where it runs.
        arguments: pickled for it.
        directory: new or empty, for what passes between the processes.
        device: "cuda": rank n has GPU n, and they meet through NCCL; "cpu": gloo.

    Raises:
        TunelineError: what a rank raised.
        OutOfMemory: what a rank raised.
        StartAgain: what all ranks raised.
        TrainingError: a rank died, or raised something else.
        StoppedError: SIGTERM came before the ranks could write a checkpoint.
    """
    directory.mkdir(parents=True, exist_ok=True)
    job = {
        "function": function,
        "arguments": dict(arguments),
        "num_ranks": num_ranks,
        "device": device,
    }
    (directory / JOB_FILE).write_bytes(pickle.dumps(job))
    nodes = Nodes.from_environment()
    attempt = nodes and nodes.board.announce(directory, num_ranks=num_ranks, device=device)
    logger.info("starting %d ranks on %s", num_ranks, device)
    try:
        with stop_on_sigterm() as stop:
            code = _start(directory, num_ranks, nodes, stop, lambda: False)
    finally:
        if attempt:
            attempt.end()
            attempt.wait_for_others(_SECONDS_FOR_OTHER_NODES)
    result = directory / RESULT_FILE
    if code == 0 and result.is_file():
        return pickle.loads(result.read_bytes())
    raise _failure(directory, num_ranks, stop, nodes)


def take_part(attempt: Attempt, nodes: Nodes, stop: StopRequest) -> None:
    """Run this node's ranks of an attempt that the first node has announced, to its end."""
    directory, own = attempt.directory, nodes.own_ranks
    is_first_time = attempt.begin(nodes.number)
    try:
        # After it has begun: the first node waits for those that have.
        if attempt.is_over:
            return
        if not is_first_time:
            _say(directory, own, f"node {nodes.number} was started again while its ranks ran")
            return
        code = _start(directory, attempt.num_ranks, nodes, stop, lambda: attempt.is_over)
        told = [_has_failed(directory, number) for number in own]
        if code and not any(told) and not attempt.is_over:
            _say(directory, own, f"torchrun on node {nodes.number} ended with {code}")
    finally:
        attempt.leave(nodes.number)


def _say(directory: Path, own: range, message: str) -> None:
    record = {"kind": "Exception", "message": message, "time": time.time()}
    (directory / f"rank-{own[0]}.error").write_text(json.dumps(record), encoding="utf-8")


def _start(
    directory: Path,
    num_ranks: int,
    nodes: Nodes | None,
    stop: StopRequest,
    is_over: Callable[[], bool],
) -> int:
    """Start the ranks of this machine, watch them to their end, and return torchrun's exit code."""
    own = nodes.own_ranks if nodes else range(num_ranks)
    if nodes:
        meeting = [
            *("--nnodes", str(nodes.count), "--node-rank", str(nodes.number)),
            *("--master-addr", nodes.master, "--master-port", str(nodes.port)),
        ]
    else:
        meeting = ["--standalone", "--local-addr", "127.0.0.1"]
    logs = f"logs-{nodes.number if nodes else 0}"
    command = [
        *(sys.executable, "-m", "torch.distributed.run", *meeting),
        *("--nproc-per-node", str(len(own))),
        *("--log-dir", str(directory / logs), "--tee", "3", "--local-ranks-filter", "0"),
        *("-m", "tuneline.train.ranks.process", str(directory), str(os.getpid())),
    ]
    # Their threads share the cores.
    threads = str(max(1, (os.cpu_count() or 1) // len(own)))
    environment = {
        "TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE": "rank ${rank}: ",
        "OMP_NUM_THREADS": threads,
        **os.environ,
    }
    # In a session of its own: Ctrl-C comes to this process, which passes it on.
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        _watch(process, directory, own, num_ranks, stop, is_over)
    finally:
        _kill(process, directory, own)
    return process.returncode


def _watch(
    process: subprocess.Popen[bytes],
    directory: Path,
    own: range,
    num_ranks: int,
    stop: StopRequest,
    is_over: Callable[[], bool],
) -> None:
    """Return when this machine's ranks are through, or some rank has failed."""
    was_told = False
    while process.poll() is None and not is_over():
        if stop.is_made and not was_told:
            # To the ranks themselves: torchrun would give them half a minute, and then kill them.
            was_told = True
            for number in own:
                _send(_pid(directory, number), signal.SIGTERM)
        others = (number for number in range(num_ranks) if number not in own)
        failed = [_has_failed(directory, number) for number in own]
        failed += [_is_told(directory, number) for number in others]
        if any(failed):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_SECONDS_FOR_OTHERS)
            # Again: one that the others missed may have been the first to go.
            for number in own:
                _has_failed(directory, number)
            return
        time.sleep(_SECONDS_BETWEEN_LOOKS)


def _kill(process: subprocess.Popen[bytes], directory: Path, own: range) -> None:
    if process.poll() is None:
        for number in own:
            _send(_pid(directory, number), signal.SIGKILL)
        try:
            process.wait(_SECONDS_FOR_OTHERS)
        except subprocess.TimeoutExpired:
            process.kill()
    process.wait()


def _pid(directory: Path, number: int) -> int | None:
    try:
        return int((directory / f"rank-{number}.pid").read_text())
    except (OSError, ValueError):
        return None


def _send(pid: int | None, number: int) -> None:
    if pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _is_told(directory: Path, number: int) -> bool:
    """Whether a rank of another machine has failed, as far as its files say."""
    return any((directory / f"rank-{number}.{end}").exists() for end in ("error", "dead"))


def _has_failed(directory: Path, number: int) -> bool:
    """Whether a rank said so, or is gone without a word; the latter is kept in `rank-N.dead`."""
    if (directory / f"rank-{number}.error").exists():
        return True
    pid = _pid(directory, number)
    if pid is None or _is_running(pid) or (directory / f"rank-{number}.done").exists():
        return False
    # It may have spoken between the first look and its end.
    if not (directory / f"rank-{number}.error").exists():
        (directory / f"rank-{number}.dead").touch()
    return True


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _failure(
    directory: Path, num_ranks: int, stop: StopRequest, nodes: Nodes | None = None
) -> Exception:
    """Find the rank that failed first, and make its error ours."""
    found = []
    silent = []
    for number in range(num_ranks):
        path = directory / f"rank-{number}.error"
        if path.exists():
            found.append((json.loads(path.read_text(encoding="utf-8")), number))
        elif not (directory / f"rank-{number}.done").exists():
            silent.append(number)
    told = [error for error, _ in found if error["kind"] != "Exception"]
    if told:
        # What all ranks decided together, or the first sentence that was meant for people.
        first = min(told, key=lambda error: error["time"])
        kinds = {kind.__name__: kind for kind in (OutOfMemory, StartAgain)}
        kind = kinds.get(first["kind"]) or getattr(errors, first["kind"])
        return kind(first["message"])
    if stop.is_made:
        return StoppedError(
            "stopped by SIGTERM before the first step: run the step again, and it goes on from "
            "its last checkpoint"
        )
    number, what = 0, "ended"
    # Of the ranks that were still alive, some are silent too: they were killed by us.
    dead = [number for number in silent if (directory / f"rank-{number}.dead").exists()]
    if dead:
        number = dead[0]
        what = "was killed or crashed without a word (is the machine short of memory?)"
    elif found:
        error, number = min(found, key=lambda pair: pair[0]["time"])
        what = f"failed: {error['message']}"
    lines = _last_lines(directory, number, nodes.ranks_each if nodes else num_ranks)
    tail = f"; its log ends: {' | '.join(lines)}" if lines else ""
    return TrainingError(f"rank {number} of {num_ranks} {what}, so the others were ended{tail}")


def _last_lines(directory: Path, number: int, ranks_each: int) -> list[str]:
    node, local = divmod(number, ranks_each)
    for path in directory.glob(f"logs-{node}/*/attempt_0/{local}/stderr.log"):
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        return [line.strip() for line in lines if line.strip()][-_NUM_LOG_LINES:]
    return []
