"""Run a function on N ranks: torchrun starts the processes, and this module watches them.

torchrun gives each process its rank, a log and a rendezvous with the other processes. It handles
the death of a rank too slowly: it sends SIGTERM to the other ranks, which are blocked in a
collective operation with the dead rank, and kills them half a minute later. Therefore the step's
own process watches the rank processes by their process IDs. As soon as one rank has failed or is
gone, this watcher kills the other ranks, and raises an error that names the failed rank and has the
last lines of that rank's log.

The processes exchange files in one directory:

    <directory>/job.pickle        the function and its arguments, the same for every rank
                rank-0.pid        process ID, written when the rank starts
                rank-0.error      {"kind", "message", "time"}, written when the rank fails
                rank-0.done       written when the function has returned
                rank-0.dead       written by the watcher when the process is gone, but has written
                                  neither rank-0.error nor rank-0.done
                result.pickle     what the function returned on rank 0
                logs-0/           stdout.log and stderr.log of each rank on node 0

With several nodes (see `nodes`) the directory is on the volume that the nodes share. Each node
watches the processes of its own ranks, and the .error and .dead files of the other nodes' ranks.
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
from tuneline.train.ranks.nodes import Attempt, Node
from tuneline.train.ranks.process import JOB_FILE, RESULT_FILE, OutOfMemory, StartAgain

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.05
_SECONDS_FOR_OTHER_RANKS = 1.0
"""Time for the other ranks to write their errors after one rank has failed."""
_SECONDS_FOR_OTHER_NODES = 30.0
"""Longest wait for the other nodes to leave an attempt. It is limited because a node that is gone
never leaves the attempt."""
_NUM_LOG_LINES = 8


def choose_num_ranks(config: TrainConfig, device: str) -> int:
    """Return the number of ranks that train together.

    Raises:
        RecipeError: num_ranks does not match the GPUs or the nodes, or another launcher has started
            this process as one of several.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RecipeError(
            f"this process was started by a launcher (WORLD_SIZE={os.environ['WORLD_SIZE']}), but "
            "train starts its own ranks: run `python -m tuneline.train` without a "
            "launcher and set train.num_ranks"
        )
    num_gpus = torch.cuda.device_count() if device == "cuda" else 0
    node = Node.from_environment()
    if node is not None:
        wanted = _num_ranks_of_all_nodes(node, config, device, num_gpus)
    else:
        wanted = max(1, num_gpus) if config.num_ranks == "auto" else config.num_ranks
    if node is None and device == "cuda" and wanted > num_gpus:
        raise RecipeError(
            f"train.num_ranks is {wanted}, but this machine has {num_gpus} GPUs: set "
            f"placement.num_accelerators to {wanted}, or train.num_ranks to {num_gpus} or auto; "
            "the number of ranks does not change which rows a step learns from"
        )
    return wanted


def _num_ranks_of_all_nodes(node: Node, config: TrainConfig, device: str, num_gpus: int) -> int:
    if device == "cuda" and node.ranks_per_node > num_gpus:
        raise RecipeError(
            f"{node.ranks_per_node} ranks should train on this node, but it has {num_gpus} GPUs: "
            f"set placement.num_accelerators to {node.ranks_per_node}"
        )
    if config.num_ranks not in ("auto", node.num_ranks):
        raise RecipeError(
            f"train.num_ranks is {config.num_ranks}, but {node.num_nodes} nodes with "
            f"{node.ranks_per_node} ranks each have {node.num_ranks} ranks: set it to auto"
        )
    return node.num_ranks


def run_on_ranks(
    num_ranks: int,
    function: Callable[..., Any],
    arguments: Mapping[str, Any],
    *,
    directory: Path,
    device: str,
) -> Any:
    """Call a function on every rank, and return what it returned on rank 0.

    Args:
        num_ranks: Number of ranks, each a process of its own.
        function: Function that the ranks import by name. It gets the rank from `collectives`.
        arguments: Keyword arguments of the function; they are pickled.
        directory: New or empty directory for the files that the processes exchange.
        device: "cuda" gives each rank its own GPU and uses NCCL; "cpu" uses gloo.

    Raises:
        TunelineError: raised by the function on a rank.
        OutOfMemory: raised by the function on a rank.
        StartAgain: raised by the function on all ranks.
        TrainingError: a rank died, or the function raised another exception.
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
    node = Node.from_environment()
    attempt = node and node.shared.announce(directory, num_ranks=num_ranks, device=device)
    logger.info("starting %d ranks on %s", num_ranks, device)
    try:
        with stop_on_sigterm() as stop:
            code = _run_torchrun(directory, num_ranks, node, stop, lambda: False)
    finally:
        if attempt:
            attempt.end()
            attempt.wait_for_others(_SECONDS_FOR_OTHER_NODES)
    result = directory / RESULT_FILE
    if code == 0 and result.is_file():
        return pickle.loads(result.read_bytes())
    raise _failure(directory, num_ranks, stop, node)


def take_part(attempt: Attempt, node: Node, stop: StopRequest) -> None:
    """Run this node's ranks in an attempt that node 0 has announced, and wait until they end."""
    directory, local = attempt.directory, node.local_ranks
    is_first_time = attempt.begin(node.number)
    try:
        # Check this only after `begin`: node 0 waits for all nodes that have begun, so from then
        # on the directory cannot vanish.
        if attempt.is_over:
            return
        if not is_first_time:
            message = f"the pod of node {node.number} restarted while its ranks were running"
            _write_error(directory, local[0], message)
            return
        code = _run_torchrun(directory, attempt.num_ranks, node, stop, lambda: attempt.is_over)
        have_failed = [_has_failed(directory, rank) for rank in local]
        if code and not any(have_failed) and not attempt.is_over:
            message = f"torchrun on node {node.number} exited with code {code}"
            _write_error(directory, local[0], message)
    finally:
        attempt.leave(node.number)


def _write_error(directory: Path, rank: int, message: str) -> None:
    record = {"kind": "Exception", "message": message, "time": time.time()}
    (directory / f"rank-{rank}.error").write_text(json.dumps(record), encoding="utf-8")


def _run_torchrun(
    directory: Path,
    num_ranks: int,
    node: Node | None,
    stop: StopRequest,
    is_over: Callable[[], bool],
) -> int:
    """Start the ranks of this machine, watch them until they end, and return torchrun's code."""
    local = node.local_ranks if node else range(num_ranks)
    if node:
        rendezvous = [
            *("--nnodes", str(node.num_nodes), "--node-rank", str(node.number)),
            *("--master-addr", node.master_address, "--master-port", str(node.master_port)),
        ]
    else:
        rendezvous = ["--standalone", "--local-addr", "127.0.0.1"]
    logs = f"logs-{node.number if node else 0}"
    command = [
        *(sys.executable, "-m", "torch.distributed.run", *rendezvous),
        *("--nproc-per-node", str(len(local))),
        *("--log-dir", str(directory / logs), "--tee", "3", "--local-ranks-filter", "0"),
        *("-m", "tuneline.train.ranks.process", str(directory), str(os.getpid())),
    ]
    # The ranks of this machine share its cores.
    threads = str(max(1, (os.cpu_count() or 1) // len(local)))
    environment = {
        "TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE": "rank ${rank}: ",
        "OMP_NUM_THREADS": threads,
        **os.environ,
    }
    # In a new session, the ranks do not receive Ctrl-C. This process receives it, and stops them.
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        _watch(process, directory, local, num_ranks, stop, is_over)
    finally:
        _kill(process, directory, local)
    return process.returncode


def _watch(
    process: subprocess.Popen[bytes],
    directory: Path,
    local: range,
    num_ranks: int,
    stop: StopRequest,
    is_over: Callable[[], bool],
) -> None:
    """Wait until the ranks of this machine have ended, or a rank of any machine has failed."""
    is_forwarded = False
    while process.poll() is None and not is_over():
        if stop.is_made and not is_forwarded:
            # Send SIGTERM only to the ranks: torchrun would kill them half a minute later.
            is_forwarded = True
            for rank in local:
                _send(_pid(directory, rank), signal.SIGTERM)
        remote = (rank for rank in range(num_ranks) if rank not in local)
        have_failed = [_has_failed(directory, rank) for rank in local]
        have_failed += [_has_recorded_failure(directory, rank) for rank in remote]
        if any(have_failed):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_SECONDS_FOR_OTHER_RANKS)
            # Check again: another rank that is dead by now may be the cause of the first failure.
            for rank in local:
                _has_failed(directory, rank)
            return
        time.sleep(_POLL_SECONDS)


def _kill(process: subprocess.Popen[bytes], directory: Path, local: range) -> None:
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


def _has_failed(directory: Path, rank: int) -> bool:
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


def _failure(
    directory: Path, num_ranks: int, stop: StopRequest, node: Node | None = None
) -> Exception:
    """Return the error of the rank that failed first."""
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
        failure: Exception = kind(first["message"])
        return failure
    if stop.is_made:
        return StoppedError(
            "stopped by SIGTERM before the first step: run the step again, and it resumes from "
            "its last checkpoint if there is one"
        )
    failed_rank, what = 0, "ended without a result"
    # A silent rank without a .dead file was alive until the watcher killed it.
    dead = [rank for rank in silent if (directory / f"rank-{rank}.dead").exists()]
    if dead:
        failed_rank = dead[0]
        what = "was killed or crashed without an error message (is the machine short of memory?)"
    elif errors_of_ranks:
        error, failed_rank = min(errors_of_ranks, key=lambda pair: pair[0]["time"])
        what = f"failed: {error['message']}"
    lines = _last_lines(directory, failed_rank, node.ranks_per_node if node else num_ranks)
    tail = f"; the end of its log: {' | '.join(lines)}" if lines else ""
    return TrainingError(
        f"rank {failed_rank} of {num_ranks} {what}, so the other ranks were killed{tail}"
    )


def _last_lines(directory: Path, rank: int, ranks_per_node: int) -> list[str]:
    node, local_rank = divmod(rank, ranks_per_node)
    for path in directory.glob(f"logs-{node}/*/attempt_0/{local_rank}/stderr.log"):
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        return [line.strip() for line in lines if line.strip()][-_NUM_LOG_LINES:]
    return []
