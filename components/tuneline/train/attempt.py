"""One attempt of a run with a given plan: load the model, train, save the adapter, summarise."""

import contextlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel
from transformers.trainer_callback import PrinterCallback

from tuneline.artifacts import PROGRESS_FILE, TrainingSummary
from tuneline.errors import StoppedError
from tuneline.models import nf4
from tuneline.runtime.stop_request import stop_on_sigterm
from tuneline.train.checkpoints import CheckpointStore
from tuneline.train.config import TrainConfig
from tuneline.train.model.adapter import (
    keep_adapter_in_fp32,
    keep_hidden_states_in,
    lora_config,
    save_adapter,
)
from tuneline.train.model.fuse import fuse_model, fuse_trainer
from tuneline.train.model.loftq import start_from_error
from tuneline.train.model.precision import peak_memory_bytes
from tuneline.train.observe.metrics import eval_gap
from tuneline.train.observe.progress import ProgressCallback
from tuneline.train.observe.samples import ask_before_and_after, prompts_of, write_samples
from tuneline.train.observe.telemetry import TelemetryCallback, costs, keep_progress_file
from tuneline.train.ranks import collectives, zero2
from tuneline.train.ranks.process import OutOfMemory
from tuneline.train.restarts import StepCallback
from tuneline.train.rows.load import load_rows, packs_are_trusted
from tuneline.train.setup import Inputs, Setup
from tuneline.train.trainer.arguments import num_total_steps, training_arguments
from tuneline.train.trainer.best_adapter import BestAdapterCallback
from tuneline.train.trainer.nonfinite import GuardedTrainer, train_through
from tuneline.train.trainer.trainers import PreferenceTrainer, SupervisedTrainer

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
        TrainingError: see `nonfinite.train_through`.
        StartAgain: see `nonfinite.train_through`.
        StoppedError: SIGTERM was received, and a checkpoint has been written.
    """
    # Rows are packed to the plan's max_seq_length, which may be below that of the dataset.
    packed = inputs.manifest.model_copy(update={"max_seq_length": setup.plan.max_seq_length})
    with collectives.first_goes_first():
        rows, eval_rows = load_rows(
            inputs.dataset_dir, packed, packing=config.packing, cache_dir=work_dir / "rows"
        )
    trainer = _build_trainer(config, setup, inputs, rows, eval_rows, work_dir)
    trainer.run_state.num_out_of_memory = num_out_of_memory
    trainer.run_state.num_restarts = num_restarts
    kernels = _prepare_model(trainer, config, setup, inputs.base_model_dir)
    logger.info(
        "%s: %d steps, %d trainable parameters, %s on %s",
        inputs.manifest.method,
        trainer.args.max_steps,
        _num_trainable(trainer),
        setup.dtype,
        setup.device,
    )
    progress_path = store.directory / PROGRESS_FILE
    progress = _add_callbacks(trainer, config, setup, progress_path)
    if collectives.is_first():
        trainer.add_callback(StepCallback(store))
    with contextlib.closing(progress), stop_on_sigterm() as stop:
        trainer.keep_checkpoints(store, minutes=config.checkpoint_minutes, stop=stop)
        checkpoint = collectives.from_first(store.latest)
        if checkpoint is not None:
            logger.info("continuing from %s", checkpoint)
        try:
            train_through(
                trainer,
                checkpoint,
                dataset_dir=inputs.dataset_dir,
                manifest=packed,
                packing=config.packing,
                carried=carried,
            )
        except torch.OutOfMemoryError as error:
            raise OutOfMemory(str(error).splitlines()[0]) from None
        _check_it_is_done(trainer, store)
    trainer.restore_best()
    if collectives.is_first():
        save_adapter(trainer.model, directory, inputs.origin)
        keep_progress_file(progress_path, directory)
        _write_samples(trainer, config, setup, inputs, store)
    return _summary(trainer, config, setup, inputs, kernels)


def _build_trainer(
    config: TrainConfig,
    setup: Setup,
    inputs: Inputs,
    rows: Dataset,
    eval_rows: Dataset | None,
    work_dir: Path,
) -> Any:
    """Load the base model and build the method's trainer around it, with a new adapter."""
    method = inputs.manifest.method
    num_steps = num_total_steps(config, len(rows), setup.plan.global_batch_size)
    arguments = training_arguments(
        config,
        setup,
        method=method,
        num_steps=num_steps,
        evaluates=eval_rows is not None,
        work_dir=work_dir,
        cache_reference=num_steps * setup.plan.global_batch_size > len(rows),
        deepspeed=_deepspeed_config(config, setup),
    )
    if arguments.n_gpu > 1:
        # If one rank sees several GPUs, transformers would split its batches over them.
        arguments._n_gpu = 1
    model: PreTrainedModel = nf4.load_base(
        inputs.base_model_dir,
        dtype=setup.dtype,
        device=collectives.device_name(setup.device),
        quantized=config.load_in_4bit,
    )
    if setup.fused:
        fuse_model(model)
    # Any, as TRL's trainers and their mix-ins are typed more narrowly than they are used.
    trainer_class: Any = PreferenceTrainer if method == "dpo" else SupervisedTrainer
    with packs_are_trusted():
        trainer = trainer_class(
            model=model,
            args=arguments,
            train_dataset=rows,
            eval_dataset=eval_rows,
            processing_class=inputs.tokenizer,
            peft_config=lora_config(config.lora),
        )
    trainer.run_state.plan = setup.plan
    trainer.run_state.divides_optimizer = setup.divides_optimizer
    trainer.max_skipped_in_a_row = config.max_skipped_in_a_row
    return trainer


def _deepspeed_config(config: TrainConfig, setup: Setup) -> dict[str, Any] | None:
    """Return DeepSpeed's configuration, or None without ZeRO-2; warn about ignored settings."""
    if not setup.divides_optimizer:
        if config.offload_optimizer:
            logger.warning(
                "train.offload_optimizer has no effect: only a run on several GPUs can move the "
                "optimizer state to host memory"
            )
        return None
    if config.optim != setup.optimizer:
        logger.warning(
            "train.optim is %s but ZeRO-2 uses %s, whose state it divides over %d ranks",
            config.optim,
            setup.optimizer,
            setup.num_ranks,
        )
    return zero2.zero2_config(
        config,
        micro_batch_size=setup.plan.micro_batch_size,
        accumulation_steps=setup.accumulation_steps,
        num_ranks=setup.num_ranks,
        dtype=setup.dtype,
    )


def _prepare_model(trainer: Any, config: TrainConfig, setup: Setup, base_model_dir: Path) -> str:
    """Prepare the model and the optimizer of a trainer; return a description of what was fused."""
    keep_adapter_in_fp32(trainer.model)
    keep_hidden_states_in(trainer.model, setup.dtype)
    if config.lora.init_lora_weights == "loftq":
        start_from_error(trainer.model, base_model_dir)
    # Every rank has read the frozen base from the same files, so DDP need not send it.
    trainer.model._ddp_params_and_buffers_to_ignore = [
        name for name, parameter in trainer.model.named_parameters() if not parameter.requires_grad
    ]
    kernels = "off"
    if setup.fused:
        kernels = fuse_trainer(trainer, mode=config.kernels, kept_gib=setup.plan.kept_gib)
    if config.embedding_learning_rate is not None:
        # The flat optimizer supports only one learning rate. Without it, the trainer creates
        # another optimizer, with two rates.
        trainer.optimizer = trainer.own_grad_norm = None
        trainer.embedding_rate = config.embedding_learning_rate
    return kernels


def _add_callbacks(
    trainer: Any, config: TrainConfig, setup: Setup, progress_path: Path
) -> ProgressCallback:
    """Add the callbacks in the order that they need; return ProgressCallback, to be closed."""
    trainer.remove_callback(PrinterCallback)
    progress = ProgressCallback(trainer.run_state, shows=collectives.is_first())
    trainer.add_callback(progress)
    trainer.add_callback(TelemetryCallback(trainer.run_state, progress_path, setup.device))
    trainer.add_callback(BestAdapterCallback(trainer, config.early_stopping_patience))
    return progress


def _check_it_is_done(trainer: GuardedTrainer, store: CheckpointStore) -> None:
    """Raise StoppedError if the trainer was stopped before its last step or evaluation."""
    if trainer.stops and not trainer.is_done:
        raise StoppedError(
            f"stopped by SIGTERM after step {trainer.state.global_step} of "
            f"{trainer.state.max_steps}: run the step again with the checkpoints in "
            f"{store.directory}, and it continues there"
        )


def _write_samples(
    trainer: Any, config: TrainConfig, setup: Setup, inputs: Inputs, store: CheckpointStore
) -> None:
    samples = ask_before_and_after(
        trainer.model,
        inputs.tokenizer,
        prompts_of(config.sample_prompts, inputs.tokenizer, inputs.dataset_dir, inputs.manifest),
        num_tokens=config.sample_tokens,
        dtype=setup.dtype,
        end_of_turn=inputs.manifest.end_of_turn,
    )
    write_samples(samples, store.directory)


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
        base_quantization="nf4" if config.load_in_4bit else "none",
        compute_dtype=str(setup.dtype).removeprefix("torch."),
        kernels=kernels,
        device=setup.device,
        num_ranks=setup.num_ranks,
        tokens_per_second=state.num_tokens / max(state.step_seconds, 1e-9),
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
