"""Read the training rows on which exports are calibrated."""

import logging
from pathlib import Path

import pyarrow.parquet

from tuneline.artifacts import INPUT_IDS, PROMPT_IDS, TRAIN_FILE
from tuneline.errors import DataError

logger = logging.getLogger(__name__)


def read_rows(dataset_dir: Path, num_rows: int, *, setting: str, purpose: str) -> list[list[int]]:
    """Read the token IDs of the first training rows, which the prepare step has shuffled.

    Args:
        dataset_dir: the directory that prepare made.
        num_rows: number of rows to read; all rows are read if the dataset has fewer.
        setting: name of the setting that `num_rows` comes from, for the warning about too few rows.
        purpose: subject and verb of the error message, e.g. "GPTQ calibrates".

    Raises:
        DataError: the dataset has no training rows.
    """
    path = dataset_dir / TRAIN_FILE
    if not path.is_file():
        raise DataError(f"{path} does not exist, but {purpose} on training rows: run prepare")
    file = pyarrow.parquet.ParquetFile(path)
    column = INPUT_IDS if INPUT_IDS in file.schema_arrow.names else PROMPT_IDS
    rows: list[list[int]] = []
    for batch in file.iter_batches(batch_size=num_rows, columns=[column]):
        rows += batch.column(column).to_pylist()
        if len(rows) >= num_rows:
            break
    if not rows:
        raise DataError(f"{path} has no rows, but {purpose} on training rows: run prepare")
    if len(rows) < num_rows:
        logger.warning("%s is %d, but the dataset has only %d rows", setting, num_rows, len(rows))
    return rows[:num_rows]
