"""A trainer whose steps are shared out over ranks and learn what one rank would."""

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from tuneline.train.ranks import collectives
from tuneline.train.rows.batches import StepBatches, row_lengths
from tuneline.train.rows.load import IGNORED
from tuneline.train.trainer.host_overhead import QuickStepTrainer
from tuneline.train.trainer.state import RunState

LOSS_FACTOR = "loss_factor"
"""In a batch of a training step: what its loss is multiplied by."""
NUM_LABELS = "num_labels"
"""In a batch of a training step with labels: how many count, known while they are on the host."""


class SharedStepTrainer(QuickStepTrainer):
    """A base before TRL's trainers: batches by `StepBatches`, losses by what a whole step has.

    Gradients are averaged over ranks. So a rank divides the sum of its losses by the mean count of
    a rank, not by its own: the average is then the sum over all ranks by the count over all of
    them, whoever had how many.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.run_state = RunState()
        self.train_batches: StepBatches | None = None
        self._eval_batches: StepBatches | None = None
        self._eval_number = 0
        self._eval_sums = (0.0, 0.0)

    def get_train_dataloader(self) -> DataLoader:
        """Return the forwards of this rank."""
        arguments = self.args
        rows_a_batch = arguments.per_device_train_batch_size
        forwards = arguments.gradient_accumulation_steps * collectives.num_ranks()
        self.train_batches = self._batches_of(
            self.train_dataset, rows_a_batch * forwards, rows_a_batch, seed=arguments.data_seed
        )
        return self._loader(self.train_dataset, self.train_batches)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Return the evaluation's forwards of this rank: as many as the others have."""
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        rows_a_batch = self.args.per_device_eval_batch_size
        self._eval_batches = self._batches_of(
            rows, rows_a_batch * collectives.num_ranks(), rows_a_batch, seed=None
        )
        return self._loader(rows, self._eval_batches)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """Collect the forwards of a step, and count what the step has on all ranks.

        Returns:
            The batches, each with its `LOSS_FACTOR`, and the mean count of labels a rank, or None
            where the loss is a mean over rows.
        """
        found: Any = super().get_batch_samples(epoch_iterator, num_batches, device)
        batches, labels = found
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
            # Of a mean over rows: the trainer divides by the number of forwards, and the average
            # over ranks by that of ranks.
            share = _num_rows(batch) * len(batches) * collectives.num_ranks() / num_rows
            batch[LOSS_FACTOR] = 1.0 if counts_labels else share
            if counts_labels:
                batch[NUM_LABELS] = num_labels_of(batch)
        for filler in batches[num_own:]:
            filler[LOSS_FACTOR] = 0.0
        if not counts_labels:
            return batches, None
        return batches, torch.tensor(num_labels / collectives.num_ranks(), device=device)

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Sum up what `evaluation_loop` needs for a mean over all ranks."""
        weight = self.eval_weight(inputs)
        result = super().prediction_step(model, inputs, *args, **kwargs)
        assert self._eval_batches is not None and result[0] is not None
        if weight and self._eval_batches.num_own(self._eval_number):
            loss, total = self._eval_sums
            self._eval_sums = (loss + float(result[0]) * weight, total + weight)
        self._eval_number += 1
        return result

    def eval_weight(self, inputs: dict[str, Any]) -> int:
        """Return what a batch's loss is the mean of: its rows, unless a subclass counts others."""
        return _num_rows(inputs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate, and put the mean over all that counts in the place of the mean over batches."""
        self._eval_number, self._eval_sums = 0, (0.0, 0.0)
        output: Any = super().evaluation_loop(*args, **kwargs)
        loss, total = collectives.summed(*self._eval_sums)
        output.metrics["eval_loss"] = loss / max(total, 1)
        return output

    def _batches_of(
        self, rows: Any, rows_a_step: int, rows_a_batch: int, seed: int | None
    ) -> StepBatches:
        return StepBatches(
            len(rows),
            global_batch_size=rows_a_step,
            micro_batch_size=rows_a_batch,
            rank=collectives.rank(),
            num_ranks=collectives.num_ranks(),
            seed=seed,
            lengths=row_lengths(rows) if seed is not None and collectives.num_ranks() > 1 else None,
        )

    def _loader(self, rows: Any, batches: StepBatches) -> DataLoader:
        # Not through accelerate, which shares out batches as they come and fills up the last ones
        # with rows from the front.
        return _EpochLoader(
            self._remove_unused_columns(rows),
            batch_sampler=batches,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )


def num_labels_of(batch: dict[str, Any]) -> int:
    """Return how many labels of a batch count; the first token of a row is never predicted."""
    return int((batch["labels"][:, 1:] != IGNORED).sum())


class _EpochLoader(DataLoader):
    def set_epoch(self, epoch: int) -> None:
        batches: Any = self.batch_sampler
        batches.set_epoch(epoch)


def _num_rows(batch: dict[str, Any]) -> int:
    # A preference is two rows of a batch; only ratios are taken of this.
    return batch["input_ids"].shape[0]


def _num_tokens(batch: dict[str, Any]) -> int:
    mask = batch.get("attention_mask")
    return batch["input_ids"].numel() if mask is None else int(mask.sum())
