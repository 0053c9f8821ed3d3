"""A trainer that divides each step over ranks, with the same result as on one rank."""

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch.utils.data import DataLoader

from tuneline.train.ranks import collectives
from tuneline.train.rows.batches import StepBatches, row_lengths
from tuneline.train.rows.load import IGNORED
from tuneline.train.trainer.schedule import ScheduledTrainer
from tuneline.train.trainer.state import RunState

LOSS_FACTOR = "loss_factor"
"""Key of a training batch: the factor by which its loss is multiplied."""
NUM_LABELS = "num_labels"
"""Key of a training batch with labels: how many count, computed while they are on the host."""


class SharedStepTrainer(ScheduledTrainer):
    """A base of TRL's trainers that divides each step over ranks, with `StepBatches`.

    DDP averages gradients over ranks. A rank therefore divides the sum of its losses by the mean
    number of labels per rank, not by its own number. The average over ranks is then the sum of all
    losses divided by the number of all labels, however the labels are distributed.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.run_state = RunState()
        self.train_batches: StepBatches | None = None
        self._eval_batches: StepBatches | None = None
        self._eval_number = 0
        self._eval_sums = (0.0, 0.0)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return the micro-batches of this rank."""
        arguments = self.args
        micro_batch_size = arguments.per_device_train_batch_size
        num_micro_batches = arguments.gradient_accumulation_steps * collectives.num_ranks()
        self.train_batches = self._batches_of(
            self.train_dataset,
            micro_batch_size * num_micro_batches,
            micro_batch_size,
            seed=arguments.data_seed,
        )
        num_workers = arguments.dataloader_num_workers
        return self._loader(self.train_dataset, self.train_batches, num_workers=num_workers)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """Return the evaluation batches of this rank, the same number on every rank."""
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        batch_size = self.args.per_device_eval_batch_size
        self._eval_batches = self._batches_of(
            rows, batch_size * collectives.num_ranks(), batch_size, seed=None
        )
        return self._loader(rows, self._eval_batches)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """Collect the micro-batches of a step, and count the step's labels over all ranks.

        Args:
            epoch_iterator: Micro-batches of the epoch.
            num_batches: Number of micro-batches of the step on this rank.
            device: Device of the rank.

        Returns:
            The micro-batches, each with its `LOSS_FACTOR`, and the mean number of labels per rank,
            or None if the loss is a mean over examples.
        """
        samples: Any = super().get_batch_samples(epoch_iterator, num_batches, device)
        batches, labels = samples
        assert self.train_batches is not None
        num_own = self.train_batches.num_own(self.state.global_step % self.train_batches.num_steps)
        own = batches[:num_own]
        if len(own) < len(batches):
            labels = super()._get_num_items_in_batch(own, device)
        counts_labels = "labels" in batches[0]
        num_rows, num_tokens, num_labels = collectives.summed(
            sum(_num_rows(batch) for batch in own),
            sum(_num_tokens(batch) for batch in own),
            0.0 if labels is None else float(labels),
        )
        self.run_state.num_tokens += int(num_tokens)
        for batch in batches:
            # For losses that are means over examples. The factor cancels two divisions: the trainer
            # divides by the number of micro-batches, and DDP by the number of ranks.
            factor = _num_rows(batch) * len(batches) * collectives.num_ranks() / num_rows
            batch[LOSS_FACTOR] = 1.0 if counts_labels else factor
            if counts_labels:
                batch[NUM_LABELS] = num_labels_of(batch)
        for filler in batches[num_own:]:
            filler[LOSS_FACTOR] = 0.0
        if not counts_labels:
            return batches, None
        return batches, torch.tensor(num_labels / collectives.num_ranks(), device=device)

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Evaluate one batch, and add its loss to the sum that `evaluation_loop` divides."""
        weight = self.eval_weight(inputs)
        result = super().prediction_step(model, inputs, *args, **kwargs)
        assert self._eval_batches is not None and result[0] is not None
        if weight and self._eval_batches.num_own(self._eval_number):
            loss, total = self._eval_sums
            self._eval_sums = (loss + float(result[0]) * weight, total + weight)
        self._eval_number += 1
        return result

    def eval_weight(self, inputs: dict[str, Any]) -> int:
        """Return the number of values over which a batch's loss is a mean: by default, its rows."""
        return _num_rows(inputs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate, and replace the mean over batches by the mean over all values of all ranks."""
        self._eval_number, self._eval_sums = 0, (0.0, 0.0)
        output: Any = super().evaluation_loop(*args, **kwargs)
        loss, total = collectives.summed(*self._eval_sums)
        output.metrics["eval_loss"] = loss / max(total, 1)
        return output

    def _batches_of(
        self, rows: Any, global_batch_size: int, micro_batch_size: int, seed: int | None
    ) -> StepBatches:
        return StepBatches(
            len(rows),
            global_batch_size=global_batch_size,
            micro_batch_size=micro_batch_size,
            rank=collectives.rank(),
            num_ranks=collectives.num_ranks(),
            seed=seed,
            lengths=row_lengths(rows) if seed is not None and collectives.num_ranks() > 1 else None,
        )

    def _loader(self, rows: Any, batches: StepBatches, *, num_workers: int = 0) -> DataLoader[Any]:
        # Not with accelerate, which assigns batches to ranks in the order of the batches, and fills
        # the last batches with rows from the start of the dataset.
        return _EpochLoader(
            cast(Any, self._remove_unused_columns(rows)),
            batch_sampler=batches,
            collate_fn=self.data_collator,
            num_workers=num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )


def num_labels_of(batch: dict[str, Any]) -> int:
    """Return the number of labels that count in a batch; a row's first token is never predicted."""
    return int((batch["labels"][:, 1:] != IGNORED).sum())


class _EpochLoader(DataLoader[Any]):
    def set_epoch(self, epoch: int) -> None:
        batches: Any = self.batch_sampler
        batches.set_epoch(epoch)


def _num_rows(batch: dict[str, Any]) -> int:
    # A preference is two rows of a batch; only ratios of these numbers are used.
    return len(batch["input_ids"])


def _num_tokens(batch: dict[str, Any]) -> int:
    mask = batch.get("attention_mask")
    return batch["input_ids"].numel() if mask is None else int(mask.sum())
