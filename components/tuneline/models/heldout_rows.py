"""The rows on which two models are compared: those that training did not see, where there are any.

Importing this loads neither torch nor pyarrow.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tuneline.artifacts import (
    CHOSEN_IDS,
    EVAL_FILE,
    HELDOUT_FILE,
    INPUT_IDS,
    LOSS_MASK,
    PROMPT_IDS,
    TRAIN_FILE,
    read_jsonl,
)
from tuneline.errors import DataError

MAX_ROW_TOKENS = 256
"""Of a row: a reference's logits are kept, at the vocabulary's size for each token."""


@dataclass(frozen=True)
class Row:
    """Token ids, and the position of the first that the loss counts."""

    ids: list[int]
    start: int


def read_rows(dataset_dir: Path, num_rows: int, tokenise: Callable[[str], list[int]]) -> list[Row]:
    """Return held-out rows with their answers, then evaluation rows, then training rows.

    Raises:
        DataError: the data set has no row at all.
    """
    path = dataset_dir / HELDOUT_FILE
    rows = []
    for row in read_jsonl(path)[:num_rows] if path.is_file() else []:
        prompt, ids = tokenise(row["prompt"]), tokenise(row["prompt"] + row["answer"] + row["end"])
        # Where the answer begins; a tokenizer may join the prompt's last letters with its first.
        pairs = enumerate(zip(prompt, ids, strict=False))
        rows.append(_cut(ids, next((n for n, pair in pairs if pair[0] != pair[1]), len(prompt))))
    for name in (EVAL_FILE, TRAIN_FILE):
        if len(rows) < num_rows and (dataset_dir / name).is_file():
            rows += _prepared_rows(dataset_dir / name, num_rows - len(rows))
    rows = [row for row in rows if max(row.start, 1) < len(row.ids)]
    if not rows:
        raise DataError(f"{dataset_dir} has no row to compare models on: run prepare")
    return rows


def _cut(ids: list[int], start: int) -> Row:
    """Keep a row's last tokens: the answer, and what fits of its prompt."""
    left_out = max(0, len(ids) - MAX_ROW_TOKENS)
    return Row(ids[left_out:], max(0, start - left_out))


def _prepared_rows(path: Path, num_rows: int) -> list[Row]:
    import pyarrow.parquet

    batch = next(pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=num_rows), None)
    columns = batch.to_pydict() if batch else {INPUT_IDS: []}
    if INPUT_IDS not in columns:
        pairs = zip(columns[PROMPT_IDS], columns[CHOSEN_IDS], strict=True)
        return [_cut(prompt + chosen, len(prompt)) for prompt, chosen in pairs]
    masks = columns.get(LOSS_MASK) or [[1] * len(ids) for ids in columns[INPUT_IDS]]
    return [
        _cut(ids, mask.index(1) if 1 in mask else 0)
        for ids, mask in zip(columns[INPUT_IDS], masks, strict=True)
    ]
