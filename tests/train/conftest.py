"""Small datasets of token IDs, in the files that prepare writes."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tuneline.artifacts import EVAL_FILE, TRAIN_FILE, DatasetManifest


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Run on one thread, which is faster for tiny models, above all beside other processes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def dataset_dir(tmp_path: Path, new_dataset: Callable[..., DatasetManifest]) -> Callable[..., Path]:
    """Return a function that writes a dataset; by default its rows serve for evaluation too."""

    def make(
        rows: list[dict],
        *,
        method: str = "sft",
        eval_rows: list[dict] | None = None,
        max_seq_length: int = 64,
        name: str = "dataset",
    ) -> Path:
        path = tmp_path / name
        path.mkdir()
        pq.write_table(pa.Table.from_pylist(rows), path / TRAIN_FILE)
        evaluation = rows if eval_rows is None else eval_rows
        if evaluation:
            pq.write_table(pa.Table.from_pylist(evaluation), path / EVAL_FILE)
        new_dataset(
            method=method,
            num_train_rows=len(rows),
            num_eval_rows=len(evaluation),
            max_seq_length=max_seq_length,
        ).write(path)
        return path

    return make


@pytest.fixture
def answer_rows() -> list[dict]:
    """Return rows of odd lengths whose last third is the answer."""
    rows = []
    for number in range(13):
        length = 5 + 3 * number
        ids = [100 + (7 * number + 3 * place) % 50 for place in range(length)]
        num_answer = max(2, length // 3)
        rows.append({"input_ids": ids, "loss_mask": [0] * (length - num_answer) + [1] * num_answer})
    return rows
