import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tuneline.artifacts import EVAL_FILE
from tuneline.errors import DataError, ProofError
from tuneline.merge.config import MergeConfig
from tuneline.merge.proof import (
    Answers,
    Comparison,
    Distance,
    answer_loss,
    check_bounds,
    greedy_gap,
)
from tuneline.models.heldout_rows import Row, read_rows


def compare(first, second):
    comparison = Comparison(first)
    for logits in second:
        comparison.add(logits)
    return comparison.distance()


def test_distance_by_hand():
    # Two positions of two tokens each: p = (1/2, 1/2) against q = (1/4, 3/4), then equal.
    first = [torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 3.0]])]
    second = [torch.tensor([[0.0, math.log(3)]]), torch.tensor([[1.0, 3.0]])]
    found = compare(first, second)
    by_hand = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert found.mean_kl == pytest.approx(by_hand / 2, rel=1e-6)
    assert found.max_logit_difference == pytest.approx(math.log(3))
    assert found.top1_agreement == 1.0  # Both tokens are as likely in p.


def test_another_choice_counts_only_beyond_a_near_tie():
    flat, clear = torch.tensor([[1.0, 0.95, 0.0]]), torch.tensor([[1.0, 0.85, 0.0]])
    other = torch.tensor([[0.0, 5.0, 0.0]])
    assert compare([flat], [other]).top1_agreement == 1.0
    assert compare([clear], [other]).top1_agreement == 0.0
    # The gap is one of the first model: the second may be as sure as it likes.
    assert compare([other], [flat]).top1_agreement == 0.0


def test_a_logit_that_is_not_a_number_is_far():
    broken = torch.tensor([[float("nan"), 0.0]])
    found = compare([torch.zeros(1, 2)], [broken])
    assert math.isnan(found.mean_kl) and math.isnan(found.max_logit_difference)


def test_rows_come_from_evaluation_where_none_are_held_out(tmp_path):
    rows = [{"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4]}] * 3
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / EVAL_FILE)
    assert read_rows(tmp_path, 2, len) == [Row([1, 2, 3], 2)] * 2


def test_no_rows(tmp_path):
    with pytest.raises(DataError, match="no row to compare"):
        read_rows(tmp_path, 2, len)


def test_loss_counts_the_answer_only():
    # Ids 0 1 1; the last two count. Token 1 has probability 3/4 after 0 and 1/4 after the first 1.
    logits = torch.tensor([[0.0, math.log(3)], [math.log(3), 0.0], [5.0, 0.0]])
    by_hand = -(math.log(3 / 4) + math.log(1 / 4))
    assert answer_loss(Row([0, 1, 1], 1), logits) == (pytest.approx(by_hand, rel=1e-6), 2)
    assert answer_loss(Row([0, 1, 1], 2), logits) == (pytest.approx(-math.log(1 / 4)), 1)


def answers(ids, logits):
    return Answers(ids, torch.tensor(logits), 0.0)


def test_where_greedy_answers_part():
    trained = answers([2, 0], [[0.0, 0.0, 9.0], [1.5, 1.25, 0.0]])
    assert greedy_gap(trained, answers([2, 0], [[0.0]])) is None
    assert greedy_gap(trained, answers([2, 1], [[0.0]])) == 0.25
    assert greedy_gap(trained, answers([0, 1], [[0.0]])) == 9.0


def test_advice_after_a_violated_bound_is_what_can_help() -> None:
    """A layer without its adapter is not mended by another bound or another type."""

    def advice(kl: float, **settings: str) -> str:
        with pytest.raises(ProofError) as raised:
            check_bounds(Distance(0.0, kl, 1.0), None, MergeConfig(**settings), num_rows=4)
        return str(raised.value)

    assert advice(0.02).endswith("set merge.dtype to float32, or raise the bound if you accept it")
    near = advice(0.02, base="original", dtype="float32")
    assert near.endswith("set merge.base to dequantized, or raise the bound if you accept it")
    assert advice(0.02, dtype="float32").endswith(": raise the bound if you accept it")
    for kl in (0.9, math.nan):
        assert "raise the bound" not in advice(kl) and "float32" not in advice(kl)
        assert "do not change the bound" in advice(kl)
    tight = MergeConfig(max_mean_kl=1e-6)
    with pytest.raises(ProofError, match="raise the bound if you accept it"):
        check_bounds(Distance(0.0, 1e-4, 1.0), None, tight, num_rows=4)


@pytest.mark.parametrize(
    ("kl", "top1", "gap", "message"),
    [
        (0.02, 1.0, None, "0.02 nats per token .* 4 prompts.* allows 0.01"),
        (math.nan, 1.0, None, "nan nats"),
        (0.0, 0.5, None, r"at 50\.0% of positions .* requires 90\.0%"),
        (0.0, 1.0, 3.0, "prefers by 3 logits.* allows 0.5"),
        (0.0, 1.0, math.nan, "prefers by nan"),
    ],
)
def test_each_bound_holds(kl, top1, gap, message):
    with pytest.raises(ProofError, match=message):
        check_bounds(Distance(0.0, kl, top1), gap, MergeConfig(), num_rows=4)
    check_bounds(Distance(0.0, 0.009, 0.91), 0.4, MergeConfig(), num_rows=4)
