"""Functions that the ranks of tests/train/ranks/test_ranks.py run, importable in their processes.

The imports that only `one_job` needs are late, because `fail` should start without them.
"""

import dataclasses
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any

from tuneline.errors import StoppedError
from tuneline.train.ranks import collectives

logger = logging.getLogger(__name__)


def all_jobs(jobs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Run several trainings in the same processes, because imports take longer than a training."""
    return {name: one_job(**job) for name, job in jobs.items()}


def one_job(
    arguments: dict[str, Any],
    stop_at: int | None = None,
    nan_at: int | None = None,
    fused: bool = False,
    zero: bool = False,
    num_workers: int = 0,
) -> Any:
    """Train, optionally with SIGTERM, a NaN loss, the fused layers, DeepSpeed or a worker.

    Args:
        arguments: Arguments of `attempt.train`.
        stop_at: Send SIGTERM to the last rank, and to no other, in this step.
        nan_at: Make the loss of the last rank NaN in this step.
        fused: Patch the model as on a GPU.
        zero: Prepare DeepSpeed for a CPU, without the extension that it would compile.
        num_workers: Processes that collate batches, as on a GPU.

    Returns:
        The summary, or the message of a StoppedError.
    """
    import pytest
    import torch
    from accelerate import Accelerator

    from tuneline.train import attempt
    from tuneline.train.trainer import arguments as arguments_module
    from tuneline.train.trainer.trainers import SupervisedTrainer

    num_fused: list[int] = []
    is_last = collectives.rank() == collectives.num_ranks() - 1
    compute = SupervisedTrainer.compute_loss

    def compute_loss(trainer, model, inputs, *rest, **named):
        # A module in the other mode would use the stock layers, and no dropout.
        assert len({module.training for module in trainer.model.modules()}) == 1
        loss = compute(trainer, model, inputs, *rest, **named)
        if model.training and is_last and trainer.state.global_step + 1 == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        if model.training and is_last and trainer.state.global_step + 1 == nan_at:
            return loss * float("nan")
        return loss

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(SupervisedTrainer, "compute_loss", compute_loss)
        patched.setitem(arguments_module.NUM_WORKERS, "cpu", num_workers)
        if fused:
            setup = dataclasses.replace(arguments["setup"], fused=True)
            arguments = {**arguments, "setup": setup}
            # Ranks on a CPU are on "cpu:0", and moving a model there from "cpu" copies it, out of
            # the flat optimizer's buffers. "cuda:0" is where it is already.
            patched.setattr(Accelerator, "device", torch.device("cpu"))
            # The stock layers would give the same numbers: count.
            kernels = sys.modules["tuneline.kernels.patching"]
            fused_layer = kernels.fused_layer

            def counted(*args):
                num_fused.append(1)
                return fused_layer(*args)

            patched.setattr(kernels, "fused_layer", counted)
        if zero:
            import deepspeed
            from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

            # The norm says whether gradients are finite, and no other look is taken.
            patched.setattr(DeepSpeedZeroOptimizer, "has_overflow_partitioned_grads_serial", None)
            patched.setitem(deepspeed.ops.__compatible_ops__, "deepspeed_shm_comm", False)
        try:
            summary = attempt.train(**arguments)
        except StoppedError as error:
            return str(error)
        assert bool(num_fused) == fused
        return summary


def fail(how: str, where: Path) -> None:
    """Let rank 1 die while rank 0 waits for it, as in a step.

    Args:
        how: "killed" dies by SIGKILL; anything else raises an exception.
        where: Directory for the process ID of each rank.
    """
    (where / f"{collectives.rank()}").write_text(str(os.getpid()))
    logger.warning("rank %d is about to meet the others", collectives.rank())
    if collectives.rank() == 1:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ValueError("a fault of its own")
    # Ignore SIGTERM, like a process that waits in an NCCL kernel.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.pause()


def train_with_faults(**arguments: Any) -> Any:
    """Train as `attempt.train`, but let the last rank fail in some step of some attempts.

    The environment variable RANK_FAULT has the kind of the fault, the number of the step, the
    number of attempts that fail, and a directory in which the attempts are counted.
    """
    import pytest

    from tuneline.train import attempt
    from tuneline.train.trainer.trainers import SupervisedTrainer

    kind, step, times, where = os.environ["RANK_FAULT"].split(",")
    is_last = collectives.rank() == collectives.num_ranks() - 1
    compute = SupervisedTrainer.compute_loss

    def compute_loss(trainer, model, inputs, *rest, **named):
        if model.training and is_last and trainer.state.global_step + 1 == int(step):
            num_faults = len(list(Path(where).iterdir()))
            if num_faults < int(times):
                Path(where, str(num_faults)).touch()
                cause_fault(kind)
        return compute(trainer, model, inputs, *rest, **named)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(SupervisedTrainer, "compute_loss", compute_loss)
        return attempt.train(**arguments)


def fail_at_once(**arguments: Any) -> None:
    """Fail as RANK_FAULT says, without training."""
    cause_fault(os.environ["RANK_FAULT"].partition(",")[0])


def cause_fault(kind: str) -> None:
    """Kill this process by the signal of that name, or raise an error with that message."""
    if kind.startswith("SIG"):
        os.kill(os.getpid(), getattr(signal, kind))
        signal.pause()
    raise RuntimeError(kind)
