"""Look up which rows of the dataset a micro-batch was made of, to name them in an error."""

from pathlib import Path
from typing import Any

from tuneline.artifacts import DatasetManifest
from tuneline.runtime.scratch import scratch_directory
from tuneline.train.rows.load import rows_in_packs


def rows_of_batches(
    trainer: Any,
    step: int,
    batches: list[tuple[int, int]],
    dataset_dir: Path,
    manifest: DatasetManifest,
    packing: bool,
) -> list[int]:
    """Return the indices, from 0, of the train.parquet rows in the given micro-batches of a step.

    Training does not store row numbers. This function therefore computes the order of the examples
    again, and packs row numbers in the same way as training packed the rows.

    Args:
        trainer: Trainer of the run.
        step: Number of the optimizer step, from 1.
        batches: (rank, micro-batch number within the step) pairs, both from 0.
        dataset_dir: Dataset directory that prepare wrote.
        manifest: Record of that dataset.
        packing: Whether the run packs rows.
    """
    epoch, step_in_epoch = divmod(step - 1, trainer.train_batches.num_steps)
    batches_of_ranks = trainer.train_batches.of_step(epoch, step_in_epoch)
    examples = {example for rank, number in batches for example in batches_of_ranks[rank][number]}
    if not packing:
        return sorted(examples)
    with scratch_directory() as cache:
        packs = rows_in_packs(dataset_dir, manifest, cache_dir=cache)
        return sorted({row for example in examples for row in packs[example]["row"]})
