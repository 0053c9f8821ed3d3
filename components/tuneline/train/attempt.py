"""One attempt at a run, with settings that are thought to fit: model, trainer, steps, adapter."""

import contextlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.trainer_callback import PrinterCallback

from tuneline.artifacts import PROGRESS_FILE, DatasetManifest, ModelOrigin, TrainingSummary
from tuneline.errors import StoppedError
from tuneline.models import nf4
from tuneline.runtime.stop_request import stop_on_sigterm
from tuneline.train.checkpoints import CheckpointStore
from tuneline.train.config import TrainConfig
from tuneline.train.memory.plan import Plan
from tuneline.train.model.adapter import (
    keep_adapter_in_fp32,
    keep_hidden_states_in,
    lora_config,
    save_adapter,
)
from tuneline.train.model.fuse import can_fuse, fuse_model, fuse_trainer
from tuneline.train.model.loftq import start_from_the_rest
from tuneline.train.model.precision import choose_dtype, peak_memory_bytes
from tuneline.train.observe.metrics import eval_gap
from tuneline.train.observe.progress import ProgressCallback
from tuneline.train.observe.samples import ask_before_and_after, prompts_of, write_samples
from tuneline.train.observe.telemetry import TelemetryCallback, costs, keep_progress_file
from tuneline.train.ranks import collectives, zero2
from tuneline.train.ranks.process import OutOfMemory
from tuneline.train.rows.load import load_rows, packs_are_trusted
from tuneline.train.trainer.arguments import num_total_steps, training_arguments
from tuneline.train.trainer.best_adapter import BestAdapterCallback
from tuneline.train.trainer.nonfinite import train_through
from tuneline.train.trainer.rates import auto_learning_rate
from tuneline.train.trainer.trainers import PreferenceTrainer, SupervisedTrainer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def train(
    config: TrainConfig,
    *,
    plan: Plan,
    num_out_of_memory: int,
    divides_optimizer: bool,
    carried: Mapping[str, Any],
    origin: ModelOrigin,
    manifest: DatasetManifest,
    tokenizer: "PreTrainedTokenizerBase",
    base_model_dir: Path,
    dataset_dir: Path,
    directory: Path,
    work_dir: Path,
    device: str,
    store: CheckpointStore,
) -> TrainingSummary:
    """Train from the newest checkpoint, where there is one, to the end, and save the adapter.

    On several ranks every one of them calls this with the same; the first one writes, and what it
    returns is of all.

    Raises:
        OutOfMemory: in a step; the checkpoints before it are there.
        TrainingError: see `divergence.train_through`.
        StartAgain: likewise.
        StoppedError: SIGTERM came; the checkpoint is written.
    """
    dtype = choose_dtype(config, device)
    rate = config.learning_rate
    if rate == "auto":
        rate = auto_learning_rate(manifest.method, manifest.num_train_rows)
        logger.info(
            "learning rate %g, for %s on %d rows", rate, manifest.method, manifest.num_train_rows
        )
    with collectives.first_goes_first():
        rows, eval_rows = load_rows(
            dataset_dir, manifest, packing=config.packing, cache_dir=work_dir / "rows"
        )
    num_steps = num_total_steps(config, len(rows))
    rows_a_step = config.per_device_train_batch_size * config.gradient_accumulation_steps
    deepspeed = None
    if divides_optimizer:
        deepspeed = zero2.zero2_config(config, num_ranks=collectives.num_ranks(), dtype=dtype)
        if config.optim != zero2.OPTIMIZER:
            logger.warning(
                "train.optim: ZeRO-2 takes %s in the place of %s: its state is divided over %d "
                "ranks",
                zero2.OPTIMIZER,
                config.optim,
                collectives.num_ranks(),
            )
        config = config.model_copy(update={"optim": zero2.OPTIMIZER})
    elif config.offload_optimizer:
        logger.warning(
            "train.offload_optimizer has no effect: only several GPUs divide and move it"
        )
    arguments = training_arguments(
        config,
        method=manifest.method,
        learning_rate=rate,
        num_steps=num_steps,
        max_seq_length=manifest.max_seq_length,
        evaluates=eval_rows is not None,
        dtype=dtype,
        device=device,
        work_dir=work_dir,
        cache_reference=num_steps * rows_a_step > len(rows),
        num_ranks=collectives.num_ranks(),
        deepspeed=deepspeed,
    )
    if arguments.n_gpu > 1:
        # One rank that sees several GPUs: transformers would split its batches over them.
        arguments._n_gpu = 1
    model = nf4.load_base(
        base_model_dir,
        dtype=dtype,
        device=collectives.device_name(device),
        quantized=config.load_in_4bit,
    )
    fuses = can_fuse(config.kernels, device)
    if fuses:
        fuse_model(model)
    with packs_are_trusted():
        trainer: Any = (PreferenceTrainer if manifest.method == "dpo" else SupervisedTrainer)(
            model=model,
            args=arguments,
            train_dataset=rows,
            eval_dataset=eval_rows,
            processing_class=tokenizer,
            peft_config=lora_config(config.lora),
        )
    trainer.remove_callback(PrinterCallback)
    state = trainer.run_state
    state.plan, state.num_out_of_memory = plan, num_out_of_memory
    state.divides_optimizer = divides_optimizer
    trainer.max_skipped_in_a_row = config.max_skipped_in_a_row
    progress = ProgressCallback(state, shows=collectives.is_first())
    trainer.add_callback(progress)
    progress_path = store.directory / PROGRESS_FILE
    trainer.add_callback(TelemetryCallback(state, progress_path, device))
    trainer.add_callback(BestAdapterCallback(trainer, config.early_stopping_patience))
    keep_adapter_in_fp32(trainer.model)
    keep_hidden_states_in(trainer.model, dtype)
    if config.lora.init_lora_weights == "loftq":
        start_from_the_rest(trainer.model, base_model_dir)
    # Every rank has read the frozen base from the same files: DDP need not send it.
    trainer.model._ddp_params_and_buffers_to_ignore = [
        name for name, parameter in trainer.model.named_parameters() if not parameter.requires_grad
    ]
    kernels = "off"
    if fuses:
        kernels = fuse_trainer(trainer, mode=config.kernels, kept_gib=plan.kept_gib)
    if config.embedding_learning_rate is not None:
        # A flat optimizer has one rate; the trainer makes one with two.
        trainer.optimizer = trainer.own_grad_norm = None
        trainer.embedding_rate = config.embedding_learning_rate
    trainable = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    logger.info(
        "%s: %d steps, %d trainable parameters, %s on %s",
        manifest.method,
        arguments.max_steps,
        trainable,
        dtype,
        device,
    )
    with contextlib.closing(progress), stop_on_sigterm() as stop:
        trainer.keep_checkpoints(store, minutes=config.checkpoint_minutes, stop=stop)
        checkpoint = collectives.from_first(store.latest)
        if checkpoint is not None:
            logger.info("continuing from %s", checkpoint)
        try:
            train_through(
                trainer,
                checkpoint,
                dataset_dir=dataset_dir,
                manifest=manifest,
                packing=config.packing,
                carried=carried,
            )
        except torch.OutOfMemoryError as error:
            raise OutOfMemory(str(error).splitlines()[0]) from None
        if trainer.stops and not trainer.is_done:
            raise StoppedError(
                f"stopped by SIGTERM after step {trainer.state.global_step} of "
                f"{trainer.state.max_steps}: run the step again with the checkpoints in "
                f"{store.directory}, and it continues there"
            )
    trainer.restore_best()
    if collectives.is_first():
        save_adapter(trainer.model, directory, origin)
        keep_progress_file(progress_path, directory)
        samples = ask_before_and_after(
            trainer.model,
            tokenizer,
            prompts_of(config.sample_prompts, tokenizer, dataset_dir, manifest),
            num_tokens=config.sample_tokens,
            dtype=dtype,
            end_of_turn=manifest.end_of_turn,
        )
        write_samples(samples, store.directory)
    history = state.history
    losses = [point.loss for point in history if point.loss is not None]
    eval_losses = [point.eval_loss for point in history if point.eval_loss is not None]
    return TrainingSummary(
        method=manifest.method,
        num_steps=trainer.state.global_step,
        num_tokens=state.num_tokens,
        final_loss=losses[-1],
        first_eval_loss=eval_losses[0] if eval_losses else None,
        final_eval_loss=state.best_eval_loss,
        num_trainable_parameters=trainable,
        num_parameters=origin.num_parameters,
        base_quantization="nf4" if config.load_in_4bit else "none",
        compute_dtype=str(dtype).removeprefix("torch."),
        kernels=kernels,
        device=device,
        num_ranks=collectives.num_ranks(),
        tokens_per_second=state.num_tokens / max(state.step_seconds, 1e-9),
        peak_memory_bytes=collectives.highest(peak_memory_bytes(device)),
        history=history,
        learning_rate=rate,
        best_step=state.best_step,
        stopped_early=state.stopped_early,
        eval_gap=eval_gap(history),
        **costs(state, config.price_per_hour),
        num_out_of_memory=state.num_out_of_memory,
        num_skipped_steps=state.num_skipped_steps,
        num_rollbacks=state.num_rollbacks,
        num_resumptions=state.num_resumptions,
        base_sha256=origin.sha256,
        dataset_sha256=manifest.sha256,
    )
