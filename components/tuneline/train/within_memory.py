"""Train within the available memory: plan memory before training, and again if memory runs out.

After a fault of a rank, training continues from the last checkpoint too, see `restarts`.
"""

import dataclasses
import gc
import logging
import tempfile
from pathlib import Path
from typing import Any

import torch

from tuneline.artifacts import TrainingSummary
from tuneline.errors import TrainingError
from tuneline.kernels.decoder.stash import pinned_size
from tuneline.train.attempt import train
from tuneline.train.checkpoints import CheckpointStore
from tuneline.train.config import TrainConfig
from tuneline.train.memory.available import available_memory, host_memory, resident_bytes
from tuneline.train.memory.estimate import GIB, Settings, Shape, movable_table_bytes
from tuneline.train.memory.plan import (
    fitting_plan,
    largest_that_fits,
    min_pack_length,
    run_settings,
    smaller_plan,
)
from tuneline.train.memory.shape import model_shape
from tuneline.train.ranks.faults import RankFault
from tuneline.train.ranks.launch import run_on_ranks
from tuneline.train.ranks.process import OutOfMemory, StartAgain
from tuneline.train.restarts import Restarts
from tuneline.train.setup import Inputs, Setup, optimizer_name
from tuneline.train.trainer.resumable import saved_state
from tuneline.train.trainer.state import RunState

logger = logging.getLogger(__name__)


def made_to_fit(setup: Setup, config: TrainConfig, inputs: Inputs, *, is_auto: bool) -> Setup:
    """Return the setup with a plan that fits memory, and an estimate of its peak if possible.

    Args:
        setup: Setup with the plan that the recipe asks for.
        config: The `train` section of the recipe.
        inputs: The base model and the dataset.
        is_auto: Whether the recipe sets micro_batch_size to auto.

    Raises:
        RecipeError: see `fitting_plan`.
    """
    shape = model_shape(inputs.base_model_dir, config.lora)
    if shape is None:
        logger.warning(
            "no estimate of the memory that %s takes: its architecture is not one whose memory is "
            "known",
            inputs.base_model_dir,
        )
        asked = setup.asked
        if is_auto:
            asked = asked.model_copy(update={"micro_batch_size": 1})
        plan = asked.model_copy(update={"kept_gib": None if setup.fused else 0.0})
        return dataclasses.replace(setup, asked=asked, plan=plan)
    settings = run_settings(
        config,
        inputs.manifest,
        setup.asked,
        itemsize=setup.dtype.itemsize,
        optimizer=setup.optimizer,
        device=setup.device,
        fused=setup.fused,
        num_sharing=setup.num_ranks if setup.divides_optimizer else 1,
    )
    available = available_memory(config, setup.device, setup.num_ranks)
    asked = setup.asked
    if is_auto:
        asked = largest_that_fits(asked, shape, settings, available)
        logger.info("train.micro_batch_size auto is %d", asked.micro_batch_size)
    table_bytes = _table_bytes(setup, shape, settings)
    plan, estimate = fitting_plan(
        config,
        asked,
        shape,
        settings,
        available_bytes=available,
        min_length=min_pack_length(config, inputs.manifest),
        moves_tables=table_bytes > 0,
    )
    # On a CPU, the peak of the process also contains the memory that it holds now.
    own_bytes = resident_bytes() if setup.device == "cpu" else 0
    return dataclasses.replace(
        setup,
        asked=asked,
        plan=plan,
        estimated_bytes=estimate.total + own_bytes,
        table_bytes=table_bytes,
    )


def _table_bytes(setup: Setup, shape: Shape, settings: Settings) -> int:
    """Return the host memory that the tables of a rank would take there; 0 if they cannot be there.

    The tables may take half of a rank's host memory: the rest is for offloaded activations, the
    loader and checkpoints.
    """
    if not movable_table_bytes(shape, settings):
        return 0
    tables = shape.num_copied, shape.num_tables - shape.num_copied
    wanted = sum(pinned_size(num * settings.itemsize) for num in tables if num)
    room = host_memory(min(setup.num_ranks, torch.cuda.device_count() or 1)) // 2
    if wanted > room:
        logger.info(
            "the input embedding and the head (%.1f GiB of pinned memory) stay in device memory: "
            "they may take at most half of the host memory of a rank (%.1f GiB)",
            wanted / GIB,
            room / GIB,
        )
        return 0
    return wanted


def train_within_memory(
    config: TrainConfig,
    setup: Setup,
    inputs: Inputs,
    *,
    directory: Path,
    store: CheckpointStore,
) -> TrainingSummary:
    """Train; continue from the last checkpoint if memory runs out, or after a fault of a rank.

    Args:
        config: The `train` section of the recipe.
        setup: Decisions of the run. One rank on a CPU trains in this process. Every other rank is
            a process of its own, because a fault of CUDA breaks the process that meets it.
        inputs: The base model and the dataset.
        directory: A directory for the adapter and for temporary files.
        store: The run's checkpoints.

    Raises:
        TrainingError: memory ran out, and there is no smaller plan or `fit` is off; or a fault
            of a rank came again, or more than `max_restarts` times.
    """
    num_out_of_memory = num_restarts = 0
    restarts = Restarts(store, config.max_restarts)
    carried: dict[str, Any] = {}
    checkpoint = store.latest()
    if checkpoint is not None:
        state = saved_state(checkpoint)
        num_out_of_memory, num_restarts = state.num_out_of_memory, state.num_restarts
        setup = _resumed(setup, config, state)
    while True:
        try:
            with tempfile.TemporaryDirectory(dir=directory) as work:
                arguments: dict[str, Any] = {
                    "config": config,
                    "setup": setup,
                    "inputs": inputs,
                    "directory": directory,
                    "work_dir": Path(work),
                    "store": store,
                    "num_out_of_memory": num_out_of_memory,
                    "num_restarts": num_restarts + restarts.num_restarts,
                    "carried": carried,
                }
                summary: TrainingSummary
                grouped = setup.num_ranks > 1 or setup.divides_optimizer
                if not grouped and setup.device == "cpu":
                    summary = train(**arguments)
                else:
                    summary = run_on_ranks(
                        setup.num_ranks,
                        train,
                        arguments,
                        directory=Path(work, "ranks"),
                        device=setup.device,
                        grouped=grouped,
                    )
            return summary.model_copy(update={"fitted": setup.changes})
        except StartAgain as again:
            carried = again.carried
            continue
        except RankFault as fault:
            restarts.count(fault)
            continue
        except OutOfMemory as error:
            setup = _smaller(setup, config, error)
            carried = {}
            num_out_of_memory += 1
        # Not in the except block, where the exception's frames still hold the old model.
        _release_memory()


def _resumed(setup: Setup, config: TrainConfig, state: RunState) -> Setup:
    """Return the setup with which a run continues from a checkpoint with this state.

    A run that started with ZeRO-2 keeps sharding its optimizer state, and a run that started
    without it does not begin to, even if the number of ranks has changed. The plan takes no more
    memory than the plan of the checkpoint, because larger plans may have run out of memory before.
    """
    plan = setup.plan
    table_bytes = 0 if state.divides_optimizer else setup.table_bytes
    if state.plan is not None:
        plan = plan.at_most(state.plan).divided_over(setup.num_ranks)
    if not table_bytes:
        # The checkpoint's machine may have had kernels, or more host memory.
        plan = plan.model_copy(update={"tables_on_host": False})
    return dataclasses.replace(
        setup,
        plan=plan,
        table_bytes=table_bytes,
        divides_optimizer=state.divides_optimizer,
        optimizer=optimizer_name(config, state.divides_optimizer),
    )


def _smaller(setup: Setup, config: TrainConfig, error: OutOfMemory) -> Setup:
    """Return the setup with the next smaller plan.

    Raises:
        TrainingError: there is no smaller plan, or `fit` is off.
    """
    plan = setup.plan
    smaller = smaller_plan(plan, moves_tables=setup.table_bytes > 0)
    if config.fit == "off" or smaller is None:
        advice = "lower prepare.max_seq_length or train.lora.r, or use a larger device"
        if smaller is not None:
            advice = f"set train.fit to auto, {advice}"
        raise TrainingError(
            f"memory ran out ({error}) with micro-batches of {plan.micro_batch_size} and "
            f"gradient_checkpointing {str(plan.gradient_checkpointing).lower()}: {advice}"
        ) from None
    logger.warning("memory ran out (%s): continuing with %s", error, smaller.changes_from(plan))
    return dataclasses.replace(setup, plan=smaller)


def _release_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
