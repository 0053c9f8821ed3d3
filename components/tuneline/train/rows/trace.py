"""Which rows of the data set a batch was made of."""

import tempfile
from pathlib import Path
from typing import Any

from tuneline.artifacts import DatasetManifest
from tuneline.train.rows.load import rows_in_packs


def rows_of_batches(
    trainer: Any,
    step: int,
    batches: list[tuple[int, int]],
    dataset_dir: Path,
    manifest: DatasetManifest,
    packing: bool,
) -> list[int]:
    """Return the rows of train.parquet, from 0, in some micro-batches of a step, from 1.

    The order is drawn again, and rows are packed again with their numbers: a run that goes well
    carries nothing along for this.

    Args:
        trainer: of the run.
        step: the optimizer step, from 1.
        batches: rank and number within the step.
        dataset_dir: what prepare made.
        manifest: its record.
        packing: whether rows were packed.
    """
    epoch, within = divmod(step - 1, trainer.train_batches.num_steps)
    of_step = trainer.train_batches.of_step(epoch, within)
    found = {index for rank, number in batches for index in of_step[rank][number]}
    if manifest.method == "dpo" or not packing:
        return sorted(found)
    with tempfile.TemporaryDirectory() as cache:
        packs = rows_in_packs(dataset_dir, manifest, cache_dir=Path(cache))
        return sorted({row for index in found for row in packs[index]["row"]})
