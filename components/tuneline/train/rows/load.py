"""The rows of a prepared dataset in the form that a trainer takes: token IDs, packed or not."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet
from datasets import Dataset
from trl.data_utils import pack_dataset

from tuneline.artifacts import (
    COLUMNS,
    EVAL_FILE,
    INPUT_IDS,
    LOSS_MASK,
    PREFERENCE_METHODS,
    TRAIN_FILE,
    DatasetManifest,
)
from tuneline.errors import DataError

logger = logging.getLogger(__name__)

IGNORED = -100
"""Label of a token that the loss ignores; the default of PyTorch's cross_entropy."""


def load_rows(
    dataset_dir: str | Path, manifest: DatasetManifest, *, packing: bool, cache_dir: Path
) -> tuple[Dataset, Dataset | None]:
    """Read the training rows, and the evaluation rows if the dataset has any.

    Rows for sft and cpt have `input_ids`, `labels` and, if packed, `seq_lengths`. Rows for dpo and
    kto have the columns of TRL's collators.

    Args:
        dataset_dir: Dataset directory that prepare wrote.
        manifest: Record of that dataset.
        packing: Whether to lay rows of sft or cpt end to end up to the manifest's max_seq_length.
            No token is dropped: a raw text that is longer than a pack is split over several packs.
        cache_dir: Directory for intermediate tables, needed until the run ends.

    Raises:
        DataError: a file or a column is missing, or there are no training rows.
    """
    dataset_dir = Path(dataset_dir)
    train = _read(dataset_dir / TRAIN_FILE, manifest, cache_dir)
    if train is None:
        raise DataError(f"{dataset_dir / TRAIN_FILE} has no rows to train on: run prepare again")
    evaluation = _read(dataset_dir / EVAL_FILE, manifest, cache_dir)
    if not packing:
        return train, evaluation
    packed = _pack(train, manifest)
    logger.info(
        "packed %d rows into %d packs of up to %d tokens",
        len(train),
        len(packed),
        manifest.max_seq_length,
    )
    return packed, None if evaluation is None else _pack(evaluation, manifest)


def rows_in_packs(
    dataset_dir: str | Path, manifest: DatasetManifest, *, cache_dir: Path
) -> Dataset:
    """Return the packs of `load_rows`, but with one column `row`: each token's row number, from 0.

    Args:
        dataset_dir: Dataset directory that prepare wrote.
        manifest: Record of that dataset.
        cache_dir: Directory for intermediate tables, needed while the packs are in use.
    """
    rows = Dataset.from_parquet(str(Path(dataset_dir, TRAIN_FILE)), cache_dir=str(cache_dir))
    numbered = rows.map(
        lambda columns, numbers: {
            "row": [
                [number] * len(ids) for ids, number in zip(columns[INPUT_IDS], numbers, strict=True)
            ]
        },
        batched=True,
        with_indices=True,
        remove_columns=rows.column_names,
    )
    return _pack(numbered, manifest)


@contextlib.contextmanager
def packs_are_trusted() -> Iterator[None]:
    """Suppress TRL's warning that the examples of a pack attend to each other.

    TRL decides by the name of the attention implementation. transformers derives the mask of a
    pack from its position IDs for every implementation, and tests/train/trainer/test_trainers.py
    compares packs with single rows.
    """

    def keep(record: logging.LogRecord) -> bool:
        return "the attention implementation is not set to a supported" not in record.getMessage()

    trl_logger = logging.getLogger("trl.trainer.sft_trainer")
    trl_logger.addFilter(keep)
    try:
        yield
    finally:
        trl_logger.removeFilter(keep)


def _read(path: Path, manifest: DatasetManifest, cache_dir: Path) -> Dataset | None:
    """Return the rows of a file, or None if there is no file or no row in it."""
    # The library datasets cannot read a file without rows.
    if not path.is_file() or not pyarrow.parquet.read_metadata(path).num_rows:
        return None
    rows = Dataset.from_parquet(str(path), cache_dir=str(cache_dir))
    columns = COLUMNS[manifest.method]
    missing = [name for name in columns if name not in rows.column_names]
    if missing:
        raise DataError(
            f"{path} lacks the column {', '.join(missing)} that method {manifest.method} needs "
            f"(its columns are {', '.join(rows.column_names)}): run prepare again"
        )
    rows = rows.select_columns(list(columns))
    if manifest.method in PREFERENCE_METHODS:
        return rows
    return rows.map(_to_labels, batched=True, remove_columns=[LOSS_MASK])


def _to_labels(columns: dict[str, list[Any]]) -> dict[str, list[Any]]:
    return {
        "labels": [
            [token if counts else IGNORED for token, counts in zip(ids, mask, strict=True)]
            for ids, mask in zip(columns[INPUT_IDS], columns[LOSS_MASK], strict=True)
        ]
    }


def _pack(rows: Dataset, manifest: DatasetManifest) -> Dataset:
    # bfd_split never drops a token. It splits only raw texts: prepared sft rows fit into a pack.
    return pack_dataset(rows, manifest.max_seq_length, "bfd_split")
