"""Which rows each rank takes of every step, so that a step has the same rows on any number of them.

    step      rows_a_step rows, in an order that only the seed and the epoch decide
    share     what a rank takes of them: as many rows as the others, and about as many tokens
    batch     the rows of one forward

The last step of an epoch has the rows that are left. Ranks make the same number of forwards in it:
one that has no row for a forward repeats one of the step's, and counts it for nothing.
"""

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from datasets import Dataset


class StepBatches:
    """A batch sampler with the forwards of one rank, or of all of them by `of_step`."""

    def __init__(
        self,
        num_rows: int,
        *,
        rows_a_step: int,
        rows_a_batch: int,
        rank: int = 0,
        num_ranks: int = 1,
        seed: int | None = None,
        lengths: Sequence[int] | None = None,
    ) -> None:
        """Divide rows into steps.

        Args:
            num_rows: rows, or packs, of the data set.
            rows_a_step: rows of an optimizer step, of all ranks together.
            rows_a_batch: rows of a forward.
            rank: whose batches `iter` yields.
            num_ranks: who share every step.
            seed: of the order, together with the epoch; None: as they lie.
            lengths: tokens of every row, for shares of like size; None: not looked at.
        """
        self._num_rows = num_rows
        self._rows_a_step = rows_a_step
        self._rows_a_batch = rows_a_batch
        self._rank = rank
        self._num_ranks = num_ranks
        self._seed = seed
        self._lengths = lengths
        self._epoch = 0
        self.num_steps = math.ceil(num_rows / rows_a_step)

    def set_epoch(self, epoch: int) -> None:
        """Take the order of an epoch, from 0."""
        self._epoch = epoch

    def __len__(self) -> int:
        last = self._num_rows - (self.num_steps - 1) * self._rows_a_step
        return (self.num_steps - 1) * self._num_batches(self._rows_a_step) + self._num_batches(last)

    def __iter__(self) -> Iterator[list[int]]:
        order = self._order(self._epoch)
        for step in range(self.num_steps):
            shares = self._shares(order, step)
            for batch in shares[self._rank]:
                yield batch or shares[0][0]

    def of_step(self, epoch: int, step: int) -> list[list[list[int]]]:
        """Return the rows of a step, from 0 within its epoch, by rank and forward.

        A forward without a row of its own is empty here.
        """
        return self._shares(self._order(epoch), step)

    def num_own(self, step: int) -> int:
        """Return how many of this rank's forwards of a step have rows of its own."""
        size = min(self._rows_a_step, self._num_rows - step * self._rows_a_step)
        own = size // self._num_ranks + (self._rank < size % self._num_ranks)
        return math.ceil(own / self._rows_a_batch)

    def _order(self, epoch: int) -> list[int]:
        if self._seed is None:
            return list(range(self._num_rows))
        generator = torch.Generator().manual_seed(self._seed + epoch)
        return torch.randperm(self._num_rows, generator=generator).tolist()

    def _num_batches(self, num_rows: int) -> int:
        return math.ceil(math.ceil(num_rows / self._num_ranks) / self._rows_a_batch)

    def _shares(self, order: list[int], step: int) -> list[list[list[int]]]:
        rows = order[step * self._rows_a_step : (step + 1) * self._rows_a_step]
        dealt: list[list[int]] = [rows]
        if self._num_ranks > 1:
            dealt = _deal(rows, self._num_ranks, self._lengths)
        size, number = self._rows_a_batch, self._num_batches(len(rows))
        return [[share[n * size : (n + 1) * size] for n in range(number)] for share in dealt]


def row_lengths(rows: "Dataset") -> list[int]:
    """Count the tokens of every row, over all its lists of token ids."""
    import pyarrow.compute as pc

    names = [name for name in rows.column_names if name.endswith("ids")]
    table = rows.with_format("arrow")[:]
    columns = [pc.list_value_length(table.column(name)).to_pylist() for name in names]
    return [sum(counts) for counts in zip(*columns, strict=True)]


def _deal(rows: list[int], num_ranks: int, lengths: Sequence[int] | None) -> list[list[int]]:
    """Deal rows, the longest first, each to the rank that has the fewest tokens and a seat left."""
    size = [0 if lengths is None else lengths[row] for row in rows]
    # As `num_own` has it: what does not go round goes to the first ranks.
    seats = [len(rows) // num_ranks + (rank < len(rows) % num_ranks) for rank in range(num_ranks)]
    tokens = [0] * num_ranks
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    for place in sorted(range(len(rows)), key=lambda place: -size[place]):
        free = [rank for rank in range(num_ranks) if len(shares[rank]) < seats[rank]]
        rank = min(free, key=lambda rank: tokens[rank])
        shares[rank].append(place)
        tokens[rank] += size[place]
    return [[rows[place] for place in sorted(share)] for share in shares]
