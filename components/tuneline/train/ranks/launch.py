"""Run a function on N ranks: torchrun starts the processes, and `watch` watches them.

torchrun gives each process its rank, a log and a rendezvous with the other processes. It handles
the death of a rank too slowly: it sends SIGTERM to the other ranks, which are blocked in a
collective operation with the dead rank, and kills them half a minute later. Therefore the step's
own process watches the rank processes by their process IDs. As soon as one rank has failed or is
gone, this watcher kills the other ranks, and raises an error that names the failed rank and has the
last lines of that rank's log. `faults` decides which of these errors new processes can survive.

A single rank without a process group is started without torchrun. It too is a process of its own,
because a fault of CUDA breaks the process that meets it.

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

import json
import logging
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from tuneline.errors import RecipeError
from tuneline.runtime.stop_request import StopRequest, stop_on_sigterm
from tuneline.train.config import TrainConfig
from tuneline.train.ranks.faults import NODE_RESTARTED, failure
from tuneline.train.ranks.nodes import Attempt, Node
from tuneline.train.ranks.process import JOB_FILE, RESULT_FILE
from tuneline.train.ranks.watch import has_failed, kill, watch

logger = logging.getLogger(__name__)

_SECONDS_FOR_OTHER_NODES = 30.0
"""Longest wait for the other nodes to leave an attempt. It is limited because a node that is gone
never leaves the attempt."""


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
    grouped: bool = True,
) -> Any:
    """Call a function on every rank, and return what it returned on rank 0.

    Args:
        num_ranks: Number of ranks, each a process of its own.
        function: Function that the ranks import by name. It gets the rank from `collectives`.
        arguments: Keyword arguments of the function; they are pickled.
        directory: New or empty directory for the files that the processes exchange.
        device: "cuda" gives each rank its own GPU and uses NCCL; "cpu" uses gloo.
        grouped: Whether the ranks form a process group. False starts a single rank without
            torchrun.

    Raises:
        TunelineError: raised by the function on a rank.
        OutOfMemory: raised by the function on a rank.
        StartAgain: raised by the function on all ranks.
        RankFault: a rank died, or failed in a way that new processes can survive.
        TrainingError: the function raised another exception.
        StoppedError: SIGTERM came before the ranks could write a checkpoint.
    """
    assert grouped or num_ranks == 1
    directory.mkdir(parents=True, exist_ok=True)
    job = {
        "function": function,
        "arguments": dict(arguments),
        "num_ranks": num_ranks,
        "device": device,
        "grouped": grouped,
    }
    (directory / JOB_FILE).write_bytes(pickle.dumps(job))
    node = Node.from_environment()
    attempt = node and node.shared.announce(directory, num_ranks=num_ranks, device=device)
    logger.info("starting %d rank%s on %s", num_ranks, "s" if num_ranks > 1 else "", device)
    local = node.local_ranks if node else range(num_ranks)
    command = _torchrun(directory, local, node) if grouped else _rank(directory)
    try:
        with stop_on_sigterm() as stop:
            code = _run(command, directory, local, num_ranks, stop)
    finally:
        if attempt:
            attempt.end()
            attempt.wait_for_others(_SECONDS_FOR_OTHER_NODES)
    result = directory / RESULT_FILE
    if code == 0 and result.is_file():
        return pickle.loads(result.read_bytes())
    raise failure(directory, num_ranks, stop, node)


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
            _write_error(directory, local[0], NODE_RESTARTED.format(node.number))
            return
        command = _torchrun(directory, local, node)
        code = _run(command, directory, local, attempt.num_ranks, stop, lambda: attempt.is_over)
        have_failed = [has_failed(directory, rank) for rank in local]
        if code and not any(have_failed) and not attempt.is_over:
            message = f"torchrun on node {node.number} exited with code {code}"
            _write_error(directory, local[0], message)
    finally:
        attempt.leave(node.number)


def _write_error(directory: Path, rank: int, message: str) -> None:
    record = {"kind": "Exception", "message": message, "time": time.time()}
    (directory / f"rank-{rank}.error").write_text(json.dumps(record), encoding="utf-8")


def _torchrun(directory: Path, local: range, node: Node | None) -> list[str]:
    """Return the command that starts the ranks of this machine."""
    if node:
        rendezvous = [
            *("--nnodes", str(node.num_nodes), "--node-rank", str(node.number)),
            *("--master-addr", node.master_address, "--master-port", str(node.master_port)),
        ]
    else:
        rendezvous = ["--standalone", "--local-addr", "127.0.0.1"]
    logs = f"logs-{node.number if node else 0}"
    return [
        *(sys.executable, "-m", "torch.distributed.run", *rendezvous),
        *("--nproc-per-node", str(len(local))),
        *("--log-dir", str(directory / logs), "--tee", "3", "--local-ranks-filter", "0"),
        *_rank(directory)[1:],
    ]


def _rank(directory: Path) -> list[str]:
    """Return the command of one rank."""
    return [
        *(sys.executable, "-m", "tuneline.train.ranks.process"),
        *(str(directory), str(os.getpid())),
    ]


def _run(
    command: list[str],
    directory: Path,
    local: range,
    num_ranks: int,
    stop: StopRequest,
    is_over: Callable[[], bool] = lambda: False,
) -> int:
    """Start the ranks of this machine, watch them until they end, and return the exit code."""
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
        watch(process, directory, local, num_ranks, stop, is_over)
    finally:
        kill(process, directory, local)
    return process.returncode
