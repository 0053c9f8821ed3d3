"""The training rows on which exports are calibrated."""

import logging
from pathlib import Path

from tuneline.artifacts import INPUT_IDS, PROMPT_IDS, TRAIN_FILE
from tuneline.errors import DataError

logger = logging.getLogger(__name__)


def read_rows(dataset_dir: Path, num_rows: int, *, setting: str, purpose: str) -> list[list[int]]:
    """Read the token ids of the first training rows; they were shuffled when prepared.

    Args:
        dataset_dir: what prepare made.
        num_rows: how many; fewer where there are not so many.
        setting: the config's name of that number, for a warning.
        purpose: for errors: "GPTQ calibrates".

    Raises:
        DataError: there are none.
    """
    import pyarrow.parquet

    path = dataset_dir / TRAIN_FILE
    if not path.is_file():
        raise DataError(f"{path} does not exist, and {purpose} on training rows: run prepare")
    file = pyarrow.parquet.ParquetFile(path)
    column = INPUT_IDS if INPUT_IDS in file.schema_arrow.names else PROMPT_IDS
    rows: list[list[int]] = []
    for batch in file.iter_batches(batch_size=num_rows, columns=[column]):
        rows += batch.column(column).to_pylist()
        if len(rows) >= num_rows:
            break
    if not rows:
        raise DataError(f"{path} has no rows, and {purpose} on training rows: run prepare")
    if len(rows) < num_rows:
        logger.warning("%s is %d, the data set has %d", setting, num_rows, len(rows))
    return rows[:num_rows]
