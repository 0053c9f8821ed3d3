"""Which rows of the data set a batch was made of."""

import math
import tempfile
from pathlib import Path
from typing import Any

from tuneline.artifacts import DatasetManifest
from tuneline.train.rows import rows_in_packs


def rows_of_batches(
    trainer: Any,
    step: int,
    batches: list[int],
    dataset_dir: Path,
    manifest: DatasetManifest,
    packing: bool,
) -> list[int]:
    """Return the rows of train.parquet, from 0, in some micro-batches of a step, from 1.

    The order is drawn again, and rows are packed again with their numbers: a run that goes well
    carries nothing along for this.
    """
    loader = trainer.get_train_dataloader()
    num_accumulated = trainer.args.gradient_accumulation_steps
    epoch, within = divmod(step - 1, math.ceil(len(loader) / num_accumulated))
    loader.set_epoch(epoch)
    order = list(loader.batch_sampler)
    found = {index for number in batches for index in order[within * num_accumulated + number]}
    if manifest.method == "dpo" or not packing:
        return sorted(found)
    with tempfile.TemporaryDirectory() as cache:
        packs = rows_in_packs(dataset_dir, manifest, cache_dir=Path(cache))
        return sorted({row for index in found for row in packs[index]["row"]})
