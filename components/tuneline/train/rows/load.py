"""The rows of a prepared data set as a trainer takes them: already tokens, perhaps packed."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuneline.artifacts import (
    CHOSEN_IDS,
    EVAL_FILE,
    INPUT_IDS,
    LOSS_MASK,
    PROMPT_IDS,
    REJECTED_IDS,
    TRAIN_FILE,
    DatasetManifest,
)
from tuneline.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

IGNORED = -100
"""The label that the loss leaves out; PyTorch's cross_entropy has the same default."""


def load_rows(
    dataset_dir: str | Path, manifest: DatasetManifest, *, packing: bool, cache_dir: Path
) -> "tuple[Dataset, Dataset | None]":
    """Read the training rows and, where there are any, the evaluation rows.

    Rows of sft and cpt have `input_ids`, `labels` and, packed, `seq_lengths`; rows of dpo the
    three columns of TRL's preference collator.

    Args:
        dataset_dir: what prepare made.
        manifest: its record.
        packing: lay rows end to end up to the manifest's max_seq_length. Rows are never cut:
            a raw text longer than a pack is split, and every piece is kept.
        cache_dir: where intermediate tables are kept while the run lasts.

    Raises:
        DataError: a file or column is missing, or there is not one row.
    """
    dataset_dir = Path(dataset_dir)
    train = _read(dataset_dir / TRAIN_FILE, manifest, cache_dir)
    if train is None or not len(train):
        raise DataError(f"{dataset_dir / TRAIN_FILE} has no row to train on: run prepare again")
    held = _read(dataset_dir / EVAL_FILE, manifest, cache_dir)
    held = held if held is not None and len(held) else None
    if manifest.method == "dpo" or not packing:
        return train, held
    packed = _pack(train, manifest)
    logger.info(
        "packed %d rows into %d of up to %d tokens",
        len(train),
        len(packed),
        manifest.max_seq_length,
    )
    return packed, _pack(held, manifest) if held is not None else None


def rows_in_packs(
    dataset_dir: str | Path, manifest: DatasetManifest, *, cache_dir: Path
) -> "Dataset":
    """Return packs as `load_rows` makes them, with one column: each token's `row`, from 0."""
    from datasets import Dataset

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
    """Leave out TRL's warnings that rows of a pack attend across each other.

    They go by the name of the attention. transformers makes the mask of a pack from its positions
    for every kind of it; tests/train/trainer/test_trainers.py holds packs against rows alone.
    """

    def keep(record: logging.LogRecord) -> bool:
        return "the attention implementation is not set to a supported" not in record.getMessage()

    trl_logger = logging.getLogger("trl.trainer.sft_trainer")
    trl_logger.addFilter(keep)
    try:
        yield
    finally:
        trl_logger.removeFilter(keep)


def _read(path: Path, manifest: DatasetManifest, cache_dir: Path) -> "Dataset | None":
    from datasets import Dataset

    if not path.is_file():
        return None
    rows = Dataset.from_parquet(str(path), cache_dir=str(cache_dir))
    wanted = (
        [PROMPT_IDS, CHOSEN_IDS, REJECTED_IDS]
        if manifest.method == "dpo"
        else [INPUT_IDS, LOSS_MASK]
    )
    missing = [name for name in wanted if name not in rows.column_names]
    if missing:
        raise DataError(
            f"{path} lacks the column {', '.join(missing)} of method {manifest.method} (it has "
            f"{', '.join(rows.column_names)}): run prepare again"
        )
    rows = rows.select_columns(wanted)
    if manifest.method == "dpo":
        return rows
    return rows.map(_to_labels, batched=True, remove_columns=[LOSS_MASK])


def _to_labels(columns: dict[str, list[Any]]) -> dict[str, list[Any]]:
    return {
        "labels": [
            [token if counts else IGNORED for token, counts in zip(ids, mask, strict=True)]
            for ids, mask in zip(columns[INPUT_IDS], columns[LOSS_MASK], strict=True)
        ]
    }


def _pack(rows: "Dataset", manifest: DatasetManifest) -> "Dataset":
    from trl import pack_dataset

    # bfd_split never drops a token; prepared sft rows fit already, so nothing of them is split.
    return pack_dataset(rows, manifest.max_seq_length, "bfd_split")
