"""One attempt of a run with a given plan: load the model, train, save the adapter, summarise."""

import contextlib
import functools
import logging
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_callback import PrinterCallback

from tuneline.artifacts import PROGRESS_FILE, TrainingSummary
from tuneline.errors import StoppedError, TrainingError
from tuneline.models import nf4
from tuneline.models.experts import quantized_experts
from tuneline.runtime.stop_request import stop_on_sigterm
from tuneline.train.build import build_trainer, packs_rows, prepare_model
from tuneline.train.checkpoints import CheckpointStore
from tuneline.train.config import TrainConfig
from tuneline.train.model.adapter import check_it_has_learned, save_adapter
from tuneline.train.model.precision import peak_memory_bytes
from tuneline.train.observe.metrics import eval_gap
from tuneline.train.observe.progress import ProgressCallback
from tuneline.train.observe.samples import ask_before_and_after, prompts_of, write_samples
from tuneline.train.observe.telemetry import TelemetryCallback, costs, keep_progress_file
from tuneline.train.observe.tracker_guard import guard_trackers
from tuneline.train.ranks import collectives
from tuneline.train.ranks.process import OutOfMemory
from tuneline.train.restarts import StepCallback
from tuneline.train.rows.load import load_rows
from tuneline.train.setup import Inputs, Setup
from tuneline.train.trainer.best_adapter import BestAdapterCallback
from tuneline.train.trainer.nonfinite import GuardedTrainer, train_through
from tuneline.train.trainer.state import RunState

logger = logging.getLogger(__name__)


def train(
    config: TrainConfig,
    setup: Setup,
    inputs: Inputs,
    *,
    directory: Path,
    work_dir: Path,
    store: CheckpointStore,
    num_out_of_memory: int,
    num_restarts: int,
    carried: Mapping[str, Any],
) -> TrainingSummary:
    """Train to the end, from the newest checkpoint if there is one, and save the adapter.

    With several ranks, every rank calls this function with the same arguments. Only rank 0 writes
    files, and its summary describes all ranks.

    Args:
        config: The `train` section of the recipe, as it was written. Settings that the run decides
            or the plan changes are read from `setup` instead.
        setup: Decisions of the run, and the plan of this attempt.
        inputs: The base model and the dataset.
        directory: A directory for the adapter.
        work_dir: A directory for temporary files of this attempt.
        store: The run's checkpoints.
        num_out_of_memory: How often memory has run out in this run so far.
        num_restarts: How often a fault of a rank has restarted this run so far.
        carried: After a rollback, the values of the run's state that replace those of the
            checkpoint, see `StartAgain`; otherwise empty.

    Raises:
        OutOfMemory: memory ran out in a step. The checkpoints written before remain.
        TrainingError: see `nonfinite.train_through`; or the run may cost no more, and a checkpoint
            has been written.
        StartAgain: see `nonfinite.train_through`.
        StoppedError: SIGTERM was received, and a checkpoint has been written.
    """
    # Rows are packed to the plan's max_seq_length, which may be below that of the dataset.
    packed = inputs.manifest.model_copy(update={"max_seq_length": setup.plan.max_seq_length})
    model = nf4.load_base(
        inputs.base_model_dir,
        dtype=setup.dtype,
        device=collectives.device_name(setup.device),
        quantized=config.load_in_4bit,
    )
    packing = packs_rows(config, packed, model)
    with collectives.first_goes_first():
        rows, eval_rows = load_rows(
            inputs.dataset_dir, packed, packing=packing, cache_dir=work_dir / "rows"
        )
    trainer = build_trainer(
        config,
        setup,
        inputs,
        model=model,
        rows=rows,
        eval_rows=eval_rows,
        packing=packing,
        work_dir=work_dir,
    )
    trainer.run_state.num_out_of_memory = num_out_of_memory
    trainer.run_state.num_restarts = num_restarts
    kernels = prepare_model(trainer, config, setup, inputs.base_model_dir)
    logger.info(
        "%s: %d steps, %d trainable parameters, %s on %s",
        inputs.manifest.method,
        trainer.args.max_steps,
        _num_trainable(trainer),
        setup.dtype,
        setup.device,
    )
    progress_path = store.directory / PROGRESS_FILE
    progress, telemetry = _add_callbacks(trainer, config, setup, progress_path)
    if collectives.is_first():
        trainer.add_callback(StepCallback(store))
    with (
        contextlib.closing(progress),
        contextlib.closing(telemetry),
        stop_on_sigterm() as stop,
    ):
        trainer.keep_checkpoints(
            store,
            minutes=config.checkpoint_minutes,
            stop=stop,
            is_spent=functools.partial(_is_spent, trainer.run_state, config),
        )
        checkpoint = collectives.from_first(store.latest)
        if checkpoint is not None:
            logger.info("continuing from %s", checkpoint)
        try:
            train_through(
                trainer,
                checkpoint,
                dataset_dir=inputs.dataset_dir,
                manifest=packed,
                packing=packing,
                carried=carried,
            )
        except torch.OutOfMemoryError as error:
            raise OutOfMemory(str(error).splitlines()[0]) from None
        _check_it_is_done(trainer, store, config)
    trainer.restore_best()
    check_it_has_learned(trainer.model, config.lora)
    if collectives.is_first():
        save_adapter(trainer.model, directory, inputs.origin)
        keep_progress_file(progress_path, directory)
        _write_samples(trainer, config, setup, inputs, store)
    return _summary(trainer, config, setup, inputs, kernels)


def _add_callbacks(
    trainer: Any, config: TrainConfig, setup: Setup, progress_path: Path
) -> tuple[ProgressCallback, TelemetryCallback]:
    """Add the callbacks in the order that they need; return those that are to be closed."""
    trainer.remove_callback(PrinterCallback)
    guard_trackers(trainer)
    progress = ProgressCallback(trainer.run_state, shows=collectives.is_first())
    trainer.add_callback(progress)
    telemetry = TelemetryCallback(trainer.run_state, progress_path, setup.device)
    trainer.add_callback(telemetry)
    trainer.add_callback(BestAdapterCallback(trainer, config.early_stopping_patience))
    return progress, telemetry


def _is_spent(state: RunState, config: TrainConfig) -> bool:
    """Return whether the run has cost as much as it may."""
    cost = costs(state, config.price_per_hour)["cost"]
    return config.max_cost is not None and cost is not None and cost >= config.max_cost


def _check_it_is_done(trainer: GuardedTrainer, store: CheckpointStore, config: TrainConfig) -> None:
    """Raise an error if the trainer was stopped before its last step or evaluation."""
    if not trainer.stops or trainer.is_done:
        return
    where = f"after step {trainer.state.global_step} of {trainer.state.max_steps}"
    if trainer.is_spent:
        cost = costs(trainer.run_state, config.price_per_hour)["cost"]
        raise TrainingError(
            f"training has cost {cost:.4g} {where}, and train.max_cost is {config.max_cost:g}: "
            f"start the run again with a higher train.max_cost, and it continues from the "
            f"checkpoint in {store.directory}"
        )
    raise StoppedError(
        f"stopped by SIGTERM {where}: run the step again with the checkpoints in "
        f"{store.directory}, and it continues there"
    )


def _write_samples(
    trainer: Any, config: TrainConfig, setup: Setup, inputs: Inputs, store: CheckpointStore
) -> None:
    """Write sample answers for the page; if that fails, log why and write none."""
    prompts = config.sample_prompts
    try:
        samples = ask_before_and_after(
            trainer.model,
            inputs.tokenizer,
            prompts_of(prompts, inputs.tokenizer, inputs.dataset_dir, inputs.manifest),
            num_tokens=config.sample_tokens,
            dtype=setup.dtype,
            end_of_turn=inputs.manifest.end_of_turn,
        )
        write_samples(samples, store.directory)
    # The adapter is written, and nothing depends on the answers: no error in them may end the run.
    except Exception as error:
        reason = str(error).partition("\n")[0]
        logger.warning("no sample answers on the page: %s: %s", type(error).__name__, reason)


def _summary(
    trainer: Any, config: TrainConfig, setup: Setup, inputs: Inputs, kernels: str
) -> TrainingSummary:
    """Summarise the run, all of its attempts and ranks included."""
    state = trainer.run_state
    history = state.history
    losses = [point.loss for point in history if point.loss is not None]
    eval_losses = [point.eval_loss for point in history if point.eval_loss is not None]
    return TrainingSummary(
        method=inputs.manifest.method,
        num_steps=trainer.state.global_step,
        num_tokens=state.num_tokens,
        final_loss=losses[-1],
        first_eval_loss=eval_losses[0] if eval_losses else None,
        final_eval_loss=state.best_eval_loss,
        num_trainable_parameters=_num_trainable(trainer),
        num_parameters=inputs.origin.num_parameters,
        base_quantization=nf4.quantization_type(inputs.base_model_dir, config.load_in_4bit),
        quantized_fraction=nf4.quantized_fraction(trainer.model.get_base_model()),
        experts_quantized=config.load_in_4bit
        and bool(quantized_experts(trainer.model.get_base_model())),
        compute_dtype=str(setup.dtype).removeprefix("torch."),
        kernels=kernels,
        device=setup.device,
        num_ranks=setup.num_ranks,
        # Not the mean: the first steps of a process also compile kernels, which can take longer
        # than all other steps of a short run.
        tokens_per_second=statistics.median(state.step_rates or [0.0]),
        peak_memory_bytes=collectives.highest(peak_memory_bytes(setup.device)),
        history=history,
        learning_rate=setup.learning_rate,
        best_step=state.best_step,
        stopped_early=state.stopped_early,
        eval_gap=eval_gap(history),
        **costs(state, config.price_per_hour),
        num_out_of_memory=state.num_out_of_memory,
        num_skipped_steps=state.num_skipped_steps,
        num_rollbacks=state.num_rollbacks,
        num_resumptions=state.num_resumptions,
        num_restarts=state.num_restarts,
        base_sha256=inputs.origin.sha256,
        dataset_sha256=inputs.manifest.sha256,
    )


def _num_trainable(trainer: Any) -> int:
    return sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
