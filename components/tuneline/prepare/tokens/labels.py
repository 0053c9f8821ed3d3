"""How many answers of a prepared dataset are desirable, for the method kto."""

import logging
from pathlib import Path

import pyarrow.compute
import pyarrow.parquet

from tuneline.artifacts import LABEL
from tuneline.errors import DataError

logger = logging.getLogger(__name__)


def count_desirable(source: str, path: Path) -> int:
    """Return the number of rows of a file whose answer is desirable; warn if all of them are.

    Args:
        source: name of the dataset.
        path: the training rows.

    Raises:
        DataError: no answer is desirable.
    """
    labels = pyarrow.parquet.read_table(path, columns=[LABEL]).column(LABEL)
    num_desirable = int(pyarrow.compute.sum(labels).as_py() or 0)
    if not num_desirable:
        raise DataError(
            f"all {len(labels)} training rows of {source} have undesirable answers, from which a "
            "model only learns to avoid them: add rows whose label is true, and check which value "
            "of the label means desirable"
        )
    if num_desirable == len(labels):
        logger.warning(
            "all %d training rows of %s have desirable answers: method kto learns from the "
            "difference to undesirable ones, and method sft learns from answers like these faster",
            len(labels),
            source,
        )
    return num_desirable
