"""Division of a dataset into optimizer steps, and of each step over the ranks.

    global batch    examples of one step. Only the seed and the epoch decide which examples, so a
                    step has the same examples on any number of ranks.
    part            examples that one rank takes of a global batch. The numbers of examples of two
                    parts differ by one at most, and the numbers of tokens are about equal.
    micro-batch     examples of one forward and backward pass on one rank.

With packing, an example here is a pack. The last step of an epoch has the remaining examples. In
this step too, all ranks run the same number of micro-batches: a rank that has no examples left for
a micro-batch repeats another micro-batch of the step, and the trainer multiplies the loss of the
repetition by zero.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, cast

import pyarrow.compute
import torch
from datasets import Dataset


class StepBatches:
    """A batch sampler that yields the micro-batches of one rank."""

    def __init__(
        self,
        num_examples: int,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int = 0,
        num_ranks: int = 1,
        seed: int | None = None,
        lengths: Sequence[int] | None = None,
    ) -> None:
        """Divide a dataset into steps.

        Args:
            num_examples: Number of examples, or packs, in the dataset.
            global_batch_size: Examples per step, over all ranks.
            micro_batch_size: Largest number of examples in a micro-batch.
            rank: Rank whose micro-batches iteration yields.
            num_ranks: Number of ranks that share every step.
            seed: Seed of the order, to which the epoch is added; None keeps the dataset's order.
            lengths: Tokens per example, by which the ranks are balanced. None: balance only the
                numbers of examples.
        """
        self._num_examples = num_examples
        self._global_batch_size = global_batch_size
        self._micro_batch_size = micro_batch_size
        self._rank = rank
        self._num_ranks = num_ranks
        self._seed = seed
        self._lengths = lengths
        self._epoch = 0
        self.with_neighbour = False
        """Whether iteration yields, for each example, also the example before it in the order of
        the epoch; the example before the first one is the last one."""
        self.num_steps = math.ceil(num_examples / global_batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Yield the examples in the order of the given epoch, counted from 0."""
        self._epoch = epoch

    def __len__(self) -> int:
        num_full = self.num_steps - 1
        last = self._num_examples - num_full * self._global_batch_size
        return num_full * self._num_batches(self._global_batch_size) + self._num_batches(last)

    def __iter__(self) -> Iterator[list[Any]]:
        order = self._order(self._epoch)
        before: dict[int, int] = {}
        if self.with_neighbour:
            before = dict(zip(order, [*order[-1:], *order], strict=False))
        for step in range(self.num_steps):
            parts = self._parts(order, step)
            for batch in parts[self._rank]:
                examples = batch or parts[0][0]
                if self.with_neighbour:
                    yield [(example, before[example]) for example in examples]
                else:
                    yield examples

    def of_step(self, epoch: int, step: int) -> list[list[list[int]]]:
        """Return, for each rank, the list of its micro-batches in this step.

        A micro-batch for which a rank has no examples is an empty list.

        Args:
            epoch: Number of the epoch, from 0.
            step: Number of the step within the epoch, from 0.
        """
        return self._parts(self._order(epoch), step)

    def num_own(self, step: int) -> int:
        """Return how many micro-batches of a step on this rank are not repetitions."""
        size = min(self._global_batch_size, self._num_examples - step * self._global_batch_size)
        part = size // self._num_ranks + (self._rank < size % self._num_ranks)
        return math.ceil(part / self._micro_batch_size)

    def _order(self, epoch: int) -> list[int]:
        if self._seed is None:
            return list(range(self._num_examples))
        generator = torch.Generator().manual_seed(self._seed + epoch)
        order: list[int] = torch.randperm(self._num_examples, generator=generator).tolist()
        return order

    def _num_batches(self, num_examples: int) -> int:
        return math.ceil(math.ceil(num_examples / self._num_ranks) / self._micro_batch_size)

    def _parts(self, order: list[int], step: int) -> list[list[list[int]]]:
        start = step * self._global_batch_size
        examples = order[start : start + self._global_batch_size]
        parts = [examples]
        if self._num_ranks > 1:
            parts = _balanced_parts(examples, self._num_ranks, self._lengths)
        size, number = self._micro_batch_size, self._num_batches(len(examples))
        return [[part[n * size : (n + 1) * size] for n in range(number)] for part in parts]


def row_lengths(rows: Dataset) -> list[int]:
    """Return the number of tokens of every row, summed over all columns of token IDs."""
    names = [name for name in rows.column_names if name.endswith("ids")]
    table = cast(Any, rows.with_format("arrow")[:])
    compute = cast(Any, pyarrow.compute)
    columns = [compute.list_value_length(table.column(name)).to_pylist() for name in names]
    return [sum(counts) for counts in zip(*columns, strict=True)]


def _balanced_parts(
    examples: list[int], num_ranks: int, lengths: Sequence[int] | None
) -> list[list[int]]:
    """Assign the longest examples first, each to the rank with the fewest tokens and a free seat.

    A rank's seats are the number of examples that it takes.
    """
    size = [0 if lengths is None else lengths[example] for example in examples]
    # The first ranks take one example more if the number is not divisible, as `num_own` assumes.
    quotient, remainder = divmod(len(examples), num_ranks)
    seats = [quotient + (rank < remainder) for rank in range(num_ranks)]
    tokens = [0] * num_ranks
    parts: list[list[int]] = [[] for _ in range(num_ranks)]
    for place in sorted(range(len(examples)), key=lambda place: -size[place]):
        free = [rank for rank in range(num_ranks) if len(parts[rank]) < seats[rank]]
        rank = min(free, key=lambda rank: tokens[rank])
        parts[rank].append(place)
        tokens[rank] += size[place]
    return [[examples[place] for place in sorted(part)] for part in parts]
