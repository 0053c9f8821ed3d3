"""Read the rows on which two models are compared, preferably rows that were not trained on.

This module is importable without torch and pyarrow.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tuneline.artifacts import (
    CHOSEN_IDS,
    COMPLETION_IDS,
    EVAL_FILE,
    HELDOUT_FILE,
    INPUT_IDS,
    LABEL,
    LOSS_MASK,
    PROMPT_IDS,
    TRAIN_FILE,
    read_jsonl,
)
from tuneline.errors import DataError

MAX_ROW_TOKENS = 256
"""Maximum number of tokens of a row. It limits memory: the reference's logits are held for each
token, and there are as many logits per token as the vocabulary has entries."""


@dataclass(frozen=True)
class Row:
    """The token IDs of a row, and the index of the first token that the loss counts."""

    ids: list[int]
    start: int


def read_rows(dataset_dir: Path, num_rows: int, tokenise: Callable[[str], list[int]]) -> list[Row]:
    """Return up to `num_rows` rows: held-out rows first, then evaluation and training rows.

    Args:
        dataset_dir: the dataset that the prepare step made.
        num_rows: maximum number of rows.
        tokenise: returns the token IDs of a text.

    Raises:
        DataError: the dataset has no row that is long enough.
    """
    path = dataset_dir / HELDOUT_FILE
    rows = []
    for row in read_jsonl(path)[:num_rows] if path.is_file() else []:
        prompt, ids = tokenise(row["prompt"]), tokenise(row["prompt"] + row["answer"] + row["end"])
        # The answer begins at the first ID that differs from the prompt's own IDs: a token may
        # span the end of the prompt and the start of the answer.
        pairs = enumerate(zip(prompt, ids, strict=False))
        rows.append(_cut(ids, next((n for n, pair in pairs if pair[0] != pair[1]), len(prompt))))
    for name in (EVAL_FILE, TRAIN_FILE):
        if len(rows) < num_rows and (dataset_dir / name).is_file():
            rows += _prepared_rows(dataset_dir / name, num_rows - len(rows))
    rows = [row for row in rows if max(row.start, 1) < len(row.ids)]
    if not rows:
        raise DataError(f"{dataset_dir} has no row to compare models on: run the prepare step")
    return rows


def _cut(ids: list[int], start: int) -> Row:
    """Return a row of the last MAX_ROW_TOKENS IDs, with `start` moved accordingly."""
    left_out = max(0, len(ids) - MAX_ROW_TOKENS)
    return Row(ids[left_out:], max(0, start - left_out))


def _prepared_rows(path: Path, num_rows: int) -> list[Row]:
    import pyarrow.parquet

    batch = next(pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=num_rows), None)
    columns = batch.to_pydict() if batch else {INPUT_IDS: []}
    if LABEL in columns:
        # Only desirable answers, unless the first rows have none.
        labels = columns[LABEL] if any(columns[LABEL]) else [True] * len(columns[LABEL])
        judged = zip(columns[PROMPT_IDS], columns[COMPLETION_IDS], labels, strict=True)
        return [_cut(prompt + answer, len(prompt)) for prompt, answer, is_good in judged if is_good]
    if INPUT_IDS not in columns:
        pairs = zip(columns[PROMPT_IDS], columns[CHOSEN_IDS], strict=True)
        return [_cut(prompt + chosen, len(prompt)) for prompt, chosen in pairs]
    masks = columns.get(LOSS_MASK) or [[1] * len(ids) for ids in columns[INPUT_IDS]]
    return [
        _cut(ids, mask.index(1) if 1 in mask else 0)
        for ids, mask in zip(columns[INPUT_IDS], masks, strict=True)
    ]
