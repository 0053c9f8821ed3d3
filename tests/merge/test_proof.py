import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tuneline.artifacts import EVAL_FILE
from tuneline.errors import DataError
from tuneline.merge.proof import compare, proof_rows


def test_distance_by_hand():
    # Two positions of two tokens each: p = (1/2, 1/2) against q = (1/4, 3/4), then equal.
    first = [torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 3.0]])]
    second = [torch.tensor([[0.0, math.log(3)]]), torch.tensor([[1.0, 3.0]])]
    found = compare(first, second)
    by_hand = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert found.mean_kl == pytest.approx(by_hand / 2, rel=1e-6)
    assert found.max_logit_difference == pytest.approx(math.log(3))
    assert found.top1_agreement == 0.5


def test_a_logit_that_is_not_a_number_is_far():
    broken = torch.tensor([[float("nan"), 0.0]])
    found = compare([torch.zeros(1, 2)], [broken])
    assert math.isnan(found.mean_kl) and math.isnan(found.max_logit_difference)


def test_rows_come_from_evaluation_where_none_are_held_out(tmp_path):
    rows = [{"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4]}] * 3
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / EVAL_FILE)
    assert proof_rows(tmp_path, None, 2) == [[1, 2, 3], [1, 2, 3]]


def test_no_rows(tmp_path):
    with pytest.raises(DataError, match="no row to compare"):
        proof_rows(tmp_path, None, 2)
