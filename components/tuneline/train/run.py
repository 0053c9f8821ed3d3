"""From a base model and token rows to an adapter."""

import contextlib
import logging
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuneline.artifacts import (
    CHAT_TEMPLATE_FILE,
    DatasetManifest,
    ModelOrigin,
    TrainingSummary,
    new_directory,
)
from tuneline.errors import ModelError, StoppedError
from tuneline.train.checkpoints import ROOT_VARIABLE, CheckpointStore
from tuneline.train.config import TrainConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def run(
    config: TrainConfig,
    *,
    base_model_dir: str | Path,
    dataset_dir: str | Path,
    adapter_dir: str | Path,
    curves_path: str | Path,
) -> TrainingSummary:
    """Train a LoRA adapter on a frozen base; the method is the data set's.

    A run that was stopped or killed is continued: see `checkpoints` for where it is kept, and
    what is one and the same run.

    Args:
        config: the recipe's part.
        base_model_dir: what fetch made.
        dataset_dir: what prepare made.
        adapter_dir: new; gets the adapter, the tokenizer and training.json.
        curves_path: an HTML page with the loss.

    Raises:
        ModelError: a target module or the tokenizer is missing.
        DataError: there is no row to train on.
        RecipeError: a name in the config is unknown to the libraries.
        TrainingError: losses or gradients are not finite, and no lower rate helped.
        StoppedError: SIGTERM came; the checkpoint is written.
        StorageError: checkpoints cannot be written, or another process is writing them.
        OutputExistsError: `adapter_dir` has something in it.
    """
    began = time.monotonic()
    origin = ModelOrigin.read(base_model_dir)
    manifest = DatasetManifest.read(dataset_dir)
    with new_directory(adapter_dir) as directory:
        from tuneline.train.adapter import check_targets
        from tuneline.train.arguments import check_names
        from tuneline.train.precision import choose_device

        device = choose_device()
        check_names(config, manifest.method, device)
        tokenizer = _load_tokenizer(base_model_dir, dataset_dir)
        check_targets(config.lora, base_model_dir)
        # Saved first: a trainer sets a padding token on the one that it is given.
        tokenizer.save_pretrained(str(directory))
        root = os.environ.get(ROOT_VARIABLE) or Path(adapter_dir).parent / ".checkpoints"
        with (
            CheckpointStore.opened(root, _identity(config, origin, manifest)) as store,
            tempfile.TemporaryDirectory(dir=directory) as work,
            _no_progress_bars(),
        ):
            summary = _train(
                config,
                origin=origin,
                manifest=manifest,
                tokenizer=tokenizer,
                base_model_dir=Path(base_model_dir),
                dataset_dir=Path(dataset_dir),
                directory=directory,
                work_dir=Path(work),
                device=device,
                store=store,
            )
        summary = summary.model_copy(update={"seconds": time.monotonic() - began})
        _write_curves(summary, Path(curves_path))
        summary.write(directory)
    store.remove()
    return summary


def _identity(
    config: TrainConfig, origin: ModelOrigin, manifest: DatasetManifest
) -> dict[str, object]:
    """Return everything that decides the adapter."""
    return {
        "base": origin.sha256,
        "dataset": manifest.sha256,
        "method": manifest.method,
        "max_seq_length": manifest.max_seq_length,
        "train": config.model_dump(mode="json", exclude={"checkpoint_minutes"}),
    }


def _train(
    config: TrainConfig,
    *,
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
    from transformers.trainer_callback import PrinterCallback

    from tuneline.nf4 import load_base
    from tuneline.train.adapter import keep_adapter_in_fp32, lora_config, save_adapter
    from tuneline.train.arguments import num_total_steps, training_arguments
    from tuneline.train.best import BestAdapterCallback
    from tuneline.train.divergence import train_through
    from tuneline.train.interruption import stop_on_sigterm
    from tuneline.train.kernels import can_fuse, fuse_model, fuse_trainer
    from tuneline.train.metrics import eval_gap
    from tuneline.train.precision import choose_dtype, peak_memory_bytes
    from tuneline.train.progress import ProgressCallback
    from tuneline.train.rates import auto_learning_rate
    from tuneline.train.rows import load_rows
    from tuneline.train.trainers import PreferenceTrainer, SupervisedTrainer

    dtype = choose_dtype(config, device)
    rate = config.learning_rate
    if rate == "auto":
        rate = auto_learning_rate(manifest.method, manifest.num_train_rows)
        logger.info(
            "learning rate %g, for %s on %d rows", rate, manifest.method, manifest.num_train_rows
        )
    rows, eval_rows = load_rows(
        dataset_dir, manifest, packing=config.packing, cache_dir=work_dir / "rows"
    )
    arguments = training_arguments(
        config,
        method=manifest.method,
        learning_rate=rate,
        num_steps=num_total_steps(config, len(rows)),
        max_seq_length=manifest.max_seq_length,
        evaluates=eval_rows is not None,
        dtype=dtype,
        device=device,
        work_dir=work_dir,
    )
    model = load_base(base_model_dir, dtype=dtype, device=device, quantized=config.load_in_4bit)
    fuses = can_fuse(config.kernels, device)
    if fuses:
        fuse_model(model)
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
    trainer.max_skipped_in_a_row = config.max_skipped_in_a_row
    progress = ProgressCallback(state)
    trainer.add_callback(progress)
    trainer.add_callback(BestAdapterCallback(trainer, config.early_stopping_patience))
    keep_adapter_in_fp32(trainer.model)
    kernels = fuse_trainer(trainer) if fuses else "off"
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
        checkpoint = store.latest()
        if checkpoint is not None:
            logger.info("continuing from %s", checkpoint)
        train_through(
            trainer,
            checkpoint,
            dataset_dir=dataset_dir,
            manifest=manifest,
            packing=config.packing,
        )
        if stop.is_made and not trainer.is_done:
            raise StoppedError(
                f"stopped by SIGTERM after step {trainer.state.global_step} of "
                f"{trainer.state.max_steps}: run the step again with the checkpoints in "
                f"{store.directory}, and it continues there"
            )
    trainer.restore_best()
    save_adapter(trainer.model, directory, origin)
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
        tokens_per_second=state.num_tokens / max(state.step_seconds, 1e-9),
        peak_memory_bytes=peak_memory_bytes(device),
        history=history,
        learning_rate=rate,
        best_step=state.best_step,
        stopped_early=state.stopped_early,
        eval_gap=eval_gap(history),
        num_skipped_steps=state.num_skipped_steps,
        num_rollbacks=state.num_rollbacks,
        num_resumptions=state.num_resumptions,
        base_sha256=origin.sha256,
        dataset_sha256=manifest.sha256,
    )


def _load_tokenizer(
    base_model_dir: str | Path, dataset_dir: str | Path
) -> "PreTrainedTokenizerBase":
    """Load the base's tokenizer with the template that the data set was prepared with."""
    from transformers import AutoTokenizer

    names = ("tokenizer.json", "tokenizer.model", "vocab.json")
    if not any(Path(base_model_dir, name).is_file() for name in names):
        raise ModelError(
            f"{base_model_dir} has no tokenizer (none of {', '.join(names)}): fetch the model "
            "from a source that carries one"
        )
    tokenizer = AutoTokenizer.from_pretrained(str(base_model_dir))
    template = Path(dataset_dir, CHAT_TEMPLATE_FILE)
    if template.is_file():
        tokenizer.chat_template = template.read_text(encoding="utf-8")
    return tokenizer


def _write_curves(summary: TrainingSummary, path: Path) -> None:
    from tuneline.train.curves import render

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(summary), encoding="utf-8")


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Silence the bars of datasets: ours is the one that is shown."""
    import datasets

    were_disabled = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not were_disabled:
            datasets.enable_progress_bars()
