"""Training rows in the prompt of the base model: what prompting alone gives, without training.

A base model does not know the form of the answers, which a few examples show it. The part of a
gain that remains against such a prompt is what training was needed for.
"""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet

from tuneline.artifacts import (
    CHOSEN_IDS,
    COMPLETION_IDS,
    INPUT_IDS,
    LABEL,
    PROMPT_IDS,
    TRAIN_FILE,
    DatasetManifest,
)

logger = logging.getLogger(__name__)

MAX_TOKENS = 1024
"""Maximum number of tokens of all examples together, which are computed for every prompt."""
_SEARCHED_ROWS = 256
"""Number of training rows among which the examples are searched."""

Tokens = tuple[int, ...]


def choose(
    dataset_dir: str | Path, *, num_examples: int, max_tokens: int, begin_id: int | None
) -> list[Tokens]:
    """Return the token IDs of the first training rows that are short enough.

    A row with the maximum length of the dataset may be truncated, so it is no example.

    Args:
        dataset_dir: the prepared dataset.
        num_examples: largest number of examples.
        max_tokens: largest number of tokens of all examples together.
        begin_id: the token that begins a text; see `without_begin`.

    Returns:
        The examples; none if the dataset has documents instead of answers, or if even one row is
        too long.
    """
    manifest = DatasetManifest.read(dataset_dir)
    path = Path(dataset_dir, TRAIN_FILE)
    if manifest.method == "cpt" or not num_examples or not path.is_file():
        return []
    found: list[Tokens] = []
    used = 0
    for ids in _rows(path):
        if len(ids) >= manifest.max_seq_length or used + len(ids) > max_tokens:
            continue
        used += len(ids)
        found.append(without_begin(ids, begin_id) if found else ids)
        if len(found) == num_examples:
            return found
    logger.warning(
        "evaluate.num_examples is %d, but only %d of the first %d training rows fit into the "
        "prompt of the base model together (%d tokens)",
        *(num_examples, len(found), _SEARCHED_ROWS, max_tokens),
    )
    return found


def without_begin(ids: Tokens, begin_id: int | None) -> Tokens:
    """Return the token IDs of a text that continues another one.

    A token that begins a text is left out, unless the text has it in other places too, where it
    begins a turn.
    """
    return ids[1:] if ids[:1] == (begin_id,) and ids.count(ids[0]) == 1 else ids


def _rows(path: Path) -> Iterator[Tokens]:
    """Yield the token IDs of each row with its good answer."""
    with pyarrow.parquet.ParquetFile(path) as file:
        batch = next(file.iter_batches(batch_size=_SEARCHED_ROWS), None)
    rows: list[dict[str, Any]] = batch.to_pylist() if batch else []
    for row in rows:
        if row.get(LABEL, True):
            answer = row.get(CHOSEN_IDS) or row.get(COMPLETION_IDS) or ()
            yield tuple(row[INPUT_IDS]) if INPUT_IDS in row else (*row[PROMPT_IDS], *answer)
