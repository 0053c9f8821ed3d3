"""What the ranks of tests/train/ranks/test_ranks.py do: importable in their processes."""

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
    """Do several trainings one after another: what ranks import takes longer than they do."""
    return {name: one_job(**job) for name, job in jobs.items()}


def one_job(
    arguments: dict[str, Any],
    stop_at: int | None = None,
    nan_at: int | None = None,
    fused: bool = False,
    zero: bool = False,
) -> Any:
    """Train, told to stop, with a loss that is not finite, or with our kernels' references.

    Args:
        arguments: of `attempt.train`.
        stop_at: SIGTERM comes to the last rank, and to no other, in this step.
        nan_at: the last rank's loss is not finite in this step.
        fused: patch the model as on a GPU.
        zero: DeepSpeed runs, without what it would compile for a CPU.

    Returns:
        The summary, or the sentence of a StoppedError.
    """
    import pytest
    import torch
    from accelerate import Accelerator

    from tuneline.train import attempt
    from tuneline.train.trainer.trainers import SupervisedTrainer

    num_fused: list[int] = []
    is_last = collectives.rank() == collectives.num_ranks() - 1
    compute = SupervisedTrainer.compute_loss

    def compute_loss(trainer, model, inputs, *rest, **named):
        # A part in the other mode would run stock layers, and no dropout.
        assert len({module.training for module in trainer.model.modules()}) == 1
        loss = compute(trainer, model, inputs, *rest, **named)
        if model.training and is_last and trainer.state.global_step + 1 == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        if model.training and is_last and trainer.state.global_step + 1 == nan_at:
            return loss * float("nan")
        return loss

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(SupervisedTrainer, "compute_loss", compute_loss)
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

            patched.setitem(deepspeed.ops.__compatible_ops__, "deepspeed_shm_comm", False)
        try:
            summary = attempt.train(**arguments)
        except StoppedError as error:
            return str(error)
        assert bool(num_fused) == fused
        return summary


def fail(how: str, where: Path) -> None:
    """Let rank 1 die while rank 0 waits for it, as it would in a step."""
    (where / f"{collectives.rank()}").write_text(str(os.getpid()))
    logger.warning("rank %d is about to meet the others", collectives.rank())
    if collectives.rank() == 1:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ValueError("a fault of its own")
    # A process that cannot be asked to stop, as one in a kernel of NCCL cannot.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.pause()
