"""Train an adapter: from a base model and a dataset of tokens to an adapter and its curves."""

import contextlib
import json
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

import datasets
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tuneline.artifacts import (
    CHAT_TEMPLATE_FILE,
    PROGRESS_FILE,
    DatasetManifest,
    ModelOrigin,
    TrainingSummary,
    new_directory,
)
from tuneline.errors import ModelError
from tuneline.html.written import write_page
from tuneline.models.tokenizer.files import copy_tokenizer, set_chat_template
from tuneline.models.tokenizer.special_tokens import add_missing_tokens
from tuneline.train.batch_size import batch_size
from tuneline.train.checkpoints import ROOT_VARIABLE, CheckpointStore
from tuneline.train.config import BATCH_KEYS, UPSTREAM_BATCH_KEYS, TrainConfig
from tuneline.train.memory.plan import recipe_plan
from tuneline.train.model.fuse import can_fuse
from tuneline.train.model.precision import choose_device, choose_dtype
from tuneline.train.model.stored_base import check_stored_base
from tuneline.train.model.targets import check_targets
from tuneline.train.observe.page import render
from tuneline.train.observe.samples import read_samples
from tuneline.train.ranks import zero2
from tuneline.train.ranks.launch import choose_num_ranks
from tuneline.train.setup import Inputs, Setup, optimizer_name
from tuneline.train.trainer.arguments import check_settings
from tuneline.train.trainer.rates import auto_learning_rate
from tuneline.train.trainer.trackers import trackers
from tuneline.train.within_memory import made_to_fit, train_within_memory

logger = logging.getLogger(__name__)

NOT_IN_IDENTITY = {
    *("checkpoint_minutes", "max_restarts", "fit", "fit_min_length", "memory_gib"),
    # A step has the same examples on any number of ranks.
    *("num_ranks", "sharding", "offload_optimizer"),
    *("track", "price_per_hour", "max_cost", "sample_prompts", "sample_tokens"),
    # The identity has the resulting global batch size instead, whichever keys the config uses. The
    # micro-batch size does not change what is learned.
    *BATCH_KEYS,
    *UPSTREAM_BATCH_KEYS,
}
"""Settings that a run may change between two attempts and still resume from its checkpoints."""


def run(
    config: TrainConfig,
    *,
    base_model_dir: str | Path,
    dataset_dir: str | Path,
    adapter_dir: str | Path,
    curves_path: str | Path,
) -> TrainingSummary:
    """Train a LoRA adapter on a frozen base model, with the method of the dataset.

    A run that was stopped or killed resumes from its last checkpoint. The module `checkpoints`
    explains where checkpoints are stored, and which runs may use them.

    Args:
        config: The `train` section of the recipe.
        base_model_dir: Base model directory that fetch wrote.
        dataset_dir: Dataset directory that prepare wrote.
        adapter_dir: New directory for the adapter, the tokenizer and training.json.
        curves_path: HTML page to write, with curves, and with answers before and after training.

    Returns:
        The summary that training.json contains.

    Raises:
        ModelError: a target module or the tokenizer is missing.
        DataError: there is no row to train on.
        RecipeError: the libraries do not know a name in the config, or the run cannot fit the free
            memory, or the ranks cannot divide its global batch.
        TrainingError: losses or gradients are not finite, even with a lowered learning rate; or
            memory ran out, and there is no smaller plan or `fit` is off; or a rank failed, and a
            restart cannot help or did not help.
        StoppedError: SIGTERM was received.
        StorageError: checkpoints cannot be written, or another process is training the same run.
        WorldError: a file of the base model or of the dataset has changed since it was made.
        OutputExistsError: `adapter_dir` is not empty.
    """
    began = time.monotonic()
    origin = ModelOrigin.read(base_model_dir)
    manifest = DatasetManifest.read(dataset_dir)
    origin.check_files(base_model_dir)
    manifest.check_files(dataset_dir)
    with new_directory(adapter_dir) as directory:
        inputs = Inputs(
            base_model_dir=Path(base_model_dir),
            dataset_dir=Path(dataset_dir),
            origin=origin,
            manifest=manifest,
            tokenizer=_load_tokenizer(base_model_dir, dataset_dir),
        )
        check_stored_base(config, base_model_dir)
        check_targets(config.lora, base_model_dir)
        setup = decide(config, inputs)
        _copy_tokenizer(inputs, directory)
        root = os.environ.get(ROOT_VARIABLE) or Path(adapter_dir).parent / ".checkpoints"
        with (
            CheckpointStore.opened(root, _identity(config, setup, inputs)) as store,
            _no_progress_bars(),
        ):
            summary = train_within_memory(config, setup, inputs, directory=directory, store=store)
        seconds = time.monotonic() - began
        summary = summary.model_copy(
            update={"seconds": seconds, "estimated_peak_bytes": setup.estimated_bytes}
        )
        _write_page(summary, directory, store.directory, Path(curves_path))
        summary.write(directory, config, parents=(origin, manifest))
    store.remove()
    return summary


def decide(config: TrainConfig, inputs: Inputs) -> Setup:
    """Decide everything that depends on the config, the data and this machine, once.

    Raises:
        RecipeError: the run is not possible on this machine as the config describes it.
    """
    manifest = inputs.manifest
    device = choose_device()
    num_ranks = choose_num_ranks(config, device)
    divides_optimizer = zero2.is_wanted(config, device, num_ranks)
    rate = config.learning_rate
    if rate == "auto":
        rate = auto_learning_rate(manifest.method, manifest.num_train_rows)
        logger.info(
            "learning rate %g, for %s on %d rows", rate, manifest.method, manifest.num_train_rows
        )
    size = batch_size(config, num_ranks)
    check_settings(config, manifest.method, device=device, global_batch_size=size.global_batch_size)
    if size.deprecation:
        logger.warning("%s", size.deprecation)
    asked = recipe_plan(config, size, manifest.max_seq_length)
    setup = Setup(
        device=device,
        num_ranks=num_ranks,
        dtype=choose_dtype(config, device),
        learning_rate=rate,
        fused=can_fuse(config.kernels, device),
        divides_optimizer=divides_optimizer,
        optimizer=optimizer_name(config, divides_optimizer),
        trackers=tuple(trackers(config)),
        asked=asked,
        plan=asked,
    )
    return made_to_fit(setup, config, inputs, is_auto=size.is_auto)


def _identity(config: TrainConfig, setup: Setup, inputs: Inputs) -> dict[str, object]:
    """Return everything that decides the result of the run, as JSON values."""
    settings = config.model_dump(mode="json", exclude=NOT_IN_IDENTITY)
    settings["global_batch_size"] = setup.asked.global_batch_size
    return {
        "base": inputs.origin.sha256,
        "dataset": inputs.manifest.sha256,
        "method": inputs.manifest.method,
        "max_seq_length": setup.plan.max_seq_length,
        "train": settings,
    }


def _load_tokenizer(base_model_dir: str | Path, dataset_dir: str | Path) -> PreTrainedTokenizerBase:
    """Load the base model's tokenizer with the chat template that the dataset was prepared with."""
    names = ("tokenizer.json", "tokenizer.model", "vocab.json")
    if not any(Path(base_model_dir, name).is_file() for name in names):
        raise ModelError(
            f"{base_model_dir} has no tokenizer (none of {', '.join(names)}): fetch the model "
            "from a source that has one"
        )
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(base_model_dir))
    add_missing_tokens(tokenizer, base_model_dir)
    template = Path(dataset_dir, CHAT_TEMPLATE_FILE)
    if template.is_file():
        tokenizer.chat_template = template.read_text(encoding="utf-8")
    return tokenizer


def _copy_tokenizer(inputs: Inputs, directory: Path) -> None:
    """Copy the base model's tokenizer, with the dataset's chat template, to a directory."""
    copy_tokenizer(inputs.base_model_dir, directory)
    template = inputs.dataset_dir / CHAT_TEMPLATE_FILE
    if template.is_file():
        set_chat_template(directory, template.read_text(encoding="utf-8"))


def _write_page(summary: TrainingSummary, directory: Path, store_dir: Path, path: Path) -> None:
    def draw() -> str:
        lines = (directory / PROGRESS_FILE).read_text(encoding="utf-8").splitlines()
        return render(summary, [json.loads(line) for line in lines], read_samples(store_dir))

    write_page(path, draw, title="Training")


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Hide the progress bars of the library datasets, as the train step has its own bar."""
    were_disabled = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not were_disabled:
            datasets.enable_progress_bars()
