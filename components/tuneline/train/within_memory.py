"""Training in the memory there is: planned before, and planned again when it runs out."""

import gc
import logging
import tempfile
from pathlib import Path
from typing import Any

import torch

from tuneline.artifacts import DatasetManifest, TrainingSummary
from tuneline.errors import TrainingError
from tuneline.train.attempt import train
from tuneline.train.checkpoints import CheckpointStore
from tuneline.train.config import TrainConfig
from tuneline.train.memory.estimate import model_shape
from tuneline.train.memory.plan import (
    Plan,
    available_memory,
    first_plan,
    fitting_plan,
    run_settings,
    smaller_plan,
)
from tuneline.train.model.fuse import can_fuse
from tuneline.train.model.precision import choose_dtype
from tuneline.train.ranks import zero2
from tuneline.train.ranks.launch import run_on_ranks
from tuneline.train.ranks.process import OutOfMemory, StartAgain
from tuneline.train.trainer.resumable import saved_state

logger = logging.getLogger(__name__)


def plan_within_memory(
    config: TrainConfig,
    manifest: DatasetManifest,
    base_model_dir: str | Path,
    device: str,
    num_ranks: int = 1,
) -> tuple[Plan, int | None]:
    """Return settings that fit the memory, and the estimate in bytes, where one can be made.

    Raises:
        RecipeError: see `fitting_plan`.
    """
    shape = model_shape(base_model_dir, config.lora)
    fused = can_fuse(config.kernels, device)
    if shape is None:
        logger.warning(
            "no estimate of the memory that %s takes: it is built otherwise than the "
            "models whose memory is known",
            base_model_dir,
        )
        return first_plan(config, manifest, num_ranks, fused=fused), None
    divides = zero2.is_wanted(config, device, num_ranks)
    settings = run_settings(
        config.model_copy(update={"optim": zero2.OPTIMIZER}) if divides else config,
        manifest,
        itemsize=choose_dtype(config, device).itemsize,
        device=device,
        fused=fused,
        num_sharing=num_ranks if divides else 1,
    )
    available = available_memory(config, device, num_ranks)
    plan, estimate = fitting_plan(config, manifest, shape, settings, available, num_ranks)
    # What is free is counted beside this process; its peak is counted with it.
    return plan, estimate.total + (_resident_bytes() if device == "cpu" else 0)


def _resident_bytes() -> int:
    """Return what the process has before a model is loaded: mostly its libraries."""
    import psutil

    return psutil.Process().memory_info().rss


def train_within_memory(
    config: TrainConfig,
    plan: Plan,
    *,
    manifest: DatasetManifest,
    directory: Path,
    store: CheckpointStore,
    device: str,
    num_ranks: int = 1,
    **rest: Any,
) -> TrainingSummary:
    """Train, and where memory runs out take a smaller plan from the last checkpoint on.

    Args:
        config: the recipe's part.
        plan: what of it was made to fit.
        manifest: of the data set.
        directory: where temporary files may be put.
        store: the run's checkpoints.
        device: "cpu" or "cuda".
        num_ranks: 1 trains in this process, more in as many others.
        rest: what `attempt.train` takes besides.

    Raises:
        TrainingError: no smaller plan is left, or `fit` is off.
    """
    asked = first_plan(config, manifest, num_ranks)
    asked = asked.model_copy(update={"kept_gib": plan.kept_gib})
    num_out_of_memory = 0
    divides_optimizer = zero2.is_wanted(config, device, num_ranks)
    carried: dict[str, Any] = {}
    checkpoint = store.latest()
    if checkpoint is not None:
        state = saved_state(checkpoint)
        num_out_of_memory = state.num_out_of_memory
        divides_optimizer = state.divides_optimizer
        # What was too much before the interruption would be again.
        plan = plan.at_most(state.plan).shared_by(num_ranks) if state.plan is not None else plan
    while True:
        try:
            with tempfile.TemporaryDirectory(dir=directory) as work:
                arguments = {
                    "config": config.model_copy(update=plan.train_values),
                    "plan": plan,
                    "num_out_of_memory": num_out_of_memory,
                    "divides_optimizer": divides_optimizer,
                    "carried": carried,
                    "manifest": manifest.model_copy(update={"max_seq_length": plan.max_seq_length}),
                    "directory": directory,
                    "work_dir": Path(work),
                    "store": store,
                    "device": device,
                    **rest,
                }
                if num_ranks == 1 and not divides_optimizer:
                    summary = train(**arguments)
                else:
                    summary = run_on_ranks(
                        num_ranks,
                        train,
                        arguments,
                        directory=Path(work, "ranks"),
                        device=device,
                    )
            return summary.model_copy(update={"fitted": plan.changes_from(asked)})
        except StartAgain as again:
            carried = again.carried
            continue
        except OutOfMemory as error:
            smaller = smaller_plan(plan)
            if config.fit == "off" or smaller is None:
                raise TrainingError(
                    f"memory ran out ({error}), with {plan.per_device_train_batch_size} rows a "
                    f"forward and gradient_checkpointing {str(plan.gradient_checkpointing).lower()}"
                    ": lower prepare.max_seq_length or lora.r, take a larger device"
                    + (", or set train.fit: auto" if smaller is not None else "")
                ) from None
            logger.warning(
                "memory ran out (%s): going on with %s", error, smaller.changes_from(plan)
            )
            plan, carried = smaller, {}
            num_out_of_memory += 1
        # Only here, where the error and with it the frames that hold the old model are gone.
        _release_memory()


def _release_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
