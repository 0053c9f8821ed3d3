"""Ranks share every step: its rows are those of one rank, and their parts are alike."""

import pytest
import torch
from accelerate.data_loader import SeedableRandomSampler
from datasets import Dataset

from tuneline.errors import RecipeError
from tuneline.train.memory.plan import Plan
from tuneline.train.rows.batches import StepBatches, row_lengths


def batches(
    num_rows, num_ranks, *, rank=0, global_batch_size=8, micro_batch_size=2, **rest
) -> StepBatches:
    return StepBatches(
        num_rows,
        global_batch_size=global_batch_size,
        micro_batch_size=micro_batch_size,
        rank=rank,
        num_ranks=num_ranks,
        seed=7,
        **rest,
    )


def test_one_rank_has_the_order_of_accelerates_sampler():
    ours = batches(21, 1)
    for epoch in (0, 1, 5):
        ours.set_epoch(epoch)
        generator = torch.Generator()
        theirs = SeedableRandomSampler(range(21), generator=generator, data_seed=7)
        theirs.set_epoch(epoch)
        assert [row for batch in ours for row in batch] == list(theirs)
        assert [len(batch) for batch in ours] == [2] * 10 + [1]


@pytest.mark.parametrize("num_rows", [8, 13, 21, 24, 3, 1])
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_steps_have_the_rows_of_one_rank(num_rows, num_ranks):
    lengths = [(17 * row) % 23 + 1 for row in range(num_rows)]
    alone = batches(num_rows, 1)
    shared = [batches(num_rows, num_ranks, rank=r, lengths=lengths) for r in range(num_ranks)]
    assert len({len(list(one)) for one in shared} | {len(one) for one in shared}) == 1
    assert shared[0].num_steps == alone.num_steps
    for step in range(alone.num_steps):
        expected = sorted(row for batch in alone.of_step(3, step)[0] for row in batch)
        parts = shared[0].of_step(3, step)
        assert sorted(row for part in parts for batch in part for row in batch) == expected
        assert len({len(part) for part in parts}) == 1
        counts = [sum(map(len, part)) for part in parts]
        assert max(counts) - min(counts) <= 1
        for rank, part in enumerate(parts):
            assert shared[rank].num_own(step) == sum(bool(batch) for batch in part)
            # What is empty comes last, and is filled with rows of the same step.
            assert all(part[: shared[rank].num_own(step)])
    for rank, one in enumerate(shared):
        one.set_epoch(3)
        found = iter(one)
        for step in range(one.num_steps):
            parts = one.of_step(3, step)
            for batch in parts[rank]:
                assert next(found) == (batch or parts[0][0])


def test_packs_give_ranks_the_same_number_of_tokens():
    generator = torch.Generator().manual_seed(0)
    lengths = (2048 - torch.randint(0, 400, (512,), generator=generator)).tolist()
    shared = batches(512, 4, global_batch_size=16, micro_batch_size=1, lengths=lengths)
    for step in range(shared.num_steps):
        tokens = [
            sum(lengths[row] for batch in part for row in batch) for part in shared.of_step(0, step)
        ]
        assert max(tokens) - min(tokens) < 0.02 * max(tokens)


def test_lengths_are_those_of_all_the_tokens_of_a_row():
    rows = [{"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": []}]
    assert row_lengths(Dataset.from_list([{**rows[0], "labels": [1] * 9}] * 2)) == [3, 3]


def plan(rows, accumulated) -> Plan:
    return Plan(
        global_batch_size=rows * accumulated,
        micro_batch_size=rows,
        gradient_checkpointing=False,
        max_seq_length=64,
    )


@pytest.mark.parametrize(
    ("asked", "num_ranks", "expected"),
    [
        ((2, 4), 1, (2, 4)),
        ((2, 4), 2, (2, 4)),  # two forwards of two rows each
        ((2, 4), 8, (1, 8)),  # one row each
        ((8, 1), 4, (2, 4)),
        ((6, 2), 4, (3, 4)),
        ((4, 3), 2, (3, 4)),  # six rows each: 4 does not divide them
    ],
)
def test_a_step_keeps_its_rows(asked, num_ranks, expected):
    found = plan(*asked).divided_over(num_ranks)
    micro, accumulated = expected
    assert found.global_batch_size == micro * accumulated
    assert found.micro_batch_size == micro
    assert num_ranks * found.accumulation_steps(num_ranks) == accumulated


def test_rows_that_cannot_be_shared():
    with pytest.raises(
        RecipeError,
        match=r"size is 6, which 4 ranks cannot .* multiple of 4, such as 4 or 8, or .* 2$",
    ):
        plan(2, 3).divided_over(4)
