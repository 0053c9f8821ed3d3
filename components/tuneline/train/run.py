"""From a base model and token rows to an adapter."""

import contextlib
import json
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tuneline.artifacts import (
    CHAT_TEMPLATE_FILE,
    PROGRESS_FILE,
    DatasetManifest,
    ModelOrigin,
    TrainingSummary,
    new_directory,
)
from tuneline.errors import ModelError
from tuneline.models.tokenizer_files import copy_tokenizer, set_chat_template
from tuneline.train.checkpoints import ROOT_VARIABLE, CheckpointStore
from tuneline.train.config import TrainConfig
from tuneline.train.memory.plan import Plan

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
        curves_path: an HTML page with the curves, and answers before and after.

    Raises:
        ModelError: a target module or the tokenizer is missing.
        DataError: there is no row to train on.
        RecipeError: a name in the config is unknown to the libraries, or the run cannot fit the
            memory that is free, or its steps cannot be shared by the ranks.
        TrainingError: losses or gradients are not finite, and no lower rate helped; or memory ran
            out with the smallest batch; or one of several ranks died.
        StoppedError: SIGTERM came; the checkpoint is written.
        StorageError: checkpoints cannot be written, or another process is writing them.
        OutputExistsError: `adapter_dir` has something in it.
    """
    began = time.monotonic()
    origin = ModelOrigin.read(base_model_dir)
    manifest = DatasetManifest.read(dataset_dir)
    with new_directory(adapter_dir) as directory:
        from tuneline.train.model.adapter import check_targets
        from tuneline.train.model.precision import choose_device
        from tuneline.train.ranks.launch import choose_num_ranks
        from tuneline.train.trainer.arguments import check_names
        from tuneline.train.trainer.trackers import trackers

        device = choose_device()
        num_ranks = choose_num_ranks(config, device)
        check_names(config, manifest.method, device)
        trackers(config)
        tokenizer = _load_tokenizer(base_model_dir, dataset_dir)
        check_targets(config.lora, base_model_dir)
        from tuneline.train.within_memory import plan_within_memory, train_within_memory

        copy_tokenizer(Path(base_model_dir), directory)
        template = Path(dataset_dir, CHAT_TEMPLATE_FILE)
        if template.is_file():
            set_chat_template(directory, template.read_text(encoding="utf-8"))
        plan, estimated = plan_within_memory(config, manifest, base_model_dir, device, num_ranks)
        root = os.environ.get(ROOT_VARIABLE) or Path(adapter_dir).parent / ".checkpoints"
        with (
            CheckpointStore.opened(root, _identity(config, origin, manifest, plan)) as store,
            _no_progress_bars(),
        ):
            summary = train_within_memory(
                config,
                plan,
                origin=origin,
                manifest=manifest,
                tokenizer=tokenizer,
                base_model_dir=Path(base_model_dir),
                dataset_dir=Path(dataset_dir),
                directory=directory,
                device=device,
                store=store,
                num_ranks=num_ranks,
            )
        seconds = time.monotonic() - began
        summary = summary.model_copy(update={"seconds": seconds, "estimated_peak_bytes": estimated})
        _write_page(summary, directory, store.directory, Path(curves_path))
        summary.write(directory, config, parents=(origin, manifest))
    store.remove()
    return summary


def _identity(
    config: TrainConfig, origin: ModelOrigin, manifest: DatasetManifest, plan: Plan
) -> dict[str, object]:
    """Return everything that decides the adapter."""
    without = {"checkpoint_minutes", "fit", "fit_min_length", "memory_gib"}
    # A step has the same rows on any number of ranks.
    without |= {"track", "price_per_hour", "num_ranks", "offload_optimizer"}
    without |= {"sample_prompts", "sample_tokens"}
    return {
        "base": origin.sha256,
        "dataset": manifest.sha256,
        "method": manifest.method,
        "max_seq_length": plan.max_seq_length,
        "train": config.model_dump(mode="json", exclude=without),
    }


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


def _write_page(summary: TrainingSummary, directory: Path, store_dir: Path, path: Path) -> None:
    from tuneline.train.observe.page import render
    from tuneline.train.observe.samples import read_samples

    lines = (directory / PROGRESS_FILE).read_text(encoding="utf-8").splitlines()
    path.parent.mkdir(parents=True, exist_ok=True)
    page = render(summary, [json.loads(line) for line in lines], read_samples(store_dir))
    path.write_text(page, encoding="utf-8")


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
