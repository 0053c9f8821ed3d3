"""How many answers of a prepared dataset are desirable, for the method kto."""

import logging

from tuneline.errors import DataError

logger = logging.getLogger(__name__)


def check_desirable(source: str, num_desirable: int, num_rows: int) -> None:
    """Check that some answers of the training rows are desirable; warn if all of them are.

    Args:
        source: name of the dataset.
        num_desirable: number of training rows whose answer is desirable.
        num_rows: number of training rows.

    Raises:
        DataError: no answer is desirable.
    """
    if not num_desirable:
        raise DataError(
            f"all {num_rows} training rows of {source} have undesirable answers, from which a "
            "model only learns to avoid them: add rows whose label is true, and check which value "
            "of the label means desirable"
        )
    if num_desirable == num_rows:
        logger.warning(
            "all %d training rows of %s have desirable answers: method kto learns from the "
            "difference to undesirable ones, and method sft learns from answers like these faster",
            num_rows,
            source,
        )
