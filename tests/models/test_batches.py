"""Batches that fill a limit, keep the order of the results, and halve when memory runs out."""

from types import SimpleNamespace

import pytest
import torch

from tuneline.errors import ModelError
from tuneline.models.batches import Batches, Size

LENGTHS = [5, 9, 1, 7, 7, 2, 30, 4]


def run(batches, room=10**9, lengths=LENGTHS, padded=LENGTHS):
    """Return the results, and the lengths of each batch that had room.

    Lengths in `padded` are those of padded items.
    """
    computed = []

    def compute(batch):
        if len(batch) * max(batch) > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        computed.append(batch)
        return [10 * length for length in batch]

    def size_of(length):
        return Size(1, length, length in padded)

    results = batches.run(lengths, size_of, compute, called="numbers")
    return results, computed


def test_batches_are_full_and_results_in_order():
    results, computed = run(Batches(max_tokens=21))
    assert results == [10 * length for length in LENGTHS]
    # The longest first; an item beyond the limit is alone.
    assert computed == [[30], [9, 7], [7, 5, 4], [2, 1]]
    results, computed = run(Batches(max_items=3))
    assert results == [10 * length for length in LENGTHS]
    assert computed == [[30, 9, 7], [7, 5, 4], [2, 1]]
    assert run(Batches(max_tokens=21), lengths=[]) == ([], [])
    # Items of similar length only, from nine tokens on.
    results, computed = run(Batches(max_tokens=21, enough_tokens=9))
    assert results == [10 * length for length in LENGTHS]
    assert computed == [[30], [9], [7, 7], [5, 4], [2, 1]]
    # Items that are not padded share a batch with any item but a padded one that is not similar.
    results, computed = run(Batches(max_tokens=21, enough_tokens=9), padded=[4, 2])
    assert results == [10 * length for length in LENGTHS]
    assert computed == [[30], [9, 7], [7, 5], [4, 2, 1]]


def test_items_of_several_rows_count_all_of_them():
    batches = Batches(max_tokens=24)
    computed = batches.run(
        [(2, 4), (4, 3), (1, 3)],
        lambda item: Size(*item),
        lambda batch: [len(batch)] * len(batch),
        called="prompts",
    )
    # 2 x 4 and 4 x 3 would be 6 x 4, which fits; a row more does not.
    assert computed == [2, 2, 1]


def test_a_batch_without_room_is_halved_for_good(caplog):
    batches = Batches(max_tokens=60)
    results, computed = run(batches, room=31)
    assert results == [10 * length for length in LENGTHS]
    assert max(len(batch) * max(batch) for batch in computed) <= 31
    assert batches.max_tokens == 30 and "batch of 60 tokens: further batches have at most 30" in (
        caplog.text
    )
    with pytest.raises(ModelError, match="a batch of 1 x 30 tokens, which cannot be divided"):
        run(Batches(max_tokens=60), room=29)


def test_a_cpu_has_a_fixed_limit():
    assert str(Batches.that_fit(SimpleNamespace(device=torch.device("cpu")))) == "4,096 tokens"
    assert str(Batches(max_items=8)) == "8 sequences"
