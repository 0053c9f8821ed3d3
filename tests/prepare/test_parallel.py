"""Batches in several processes, and that a data set comes out the same however many there are."""

import functools
import importlib
import os
from concurrent.futures.process import BrokenProcessPool

import pytest

from tuneline.prepare import parallel
from tuneline.prepare.parallel import batched, in_order


def squares(batch: list[int]) -> tuple[int, list[int]]:
    return os.getpid(), [number * number for number in batch]


@pytest.mark.parametrize("num_processes", [1, 3])
def test_results_come_in_order_and_the_first_from_here(num_processes) -> None:
    batches = batched(range(103), 4)
    found = list(in_order(squares, batches, num_processes=num_processes, num_alone=2))
    assert [len(batch) for batch, _ in found] == [4] * 25 + [3]
    assert [n for _, (_, numbers) in found for n in numbers] == [n * n for n in range(103)]
    processes = [process for _, (process, _) in found]
    assert set(processes[:2]) == {os.getpid()}
    assert (os.getpid() in processes[2:]) == (num_processes == 1)


def test_few_batches_are_read_ahead() -> None:
    read = []

    def batches():
        for number in range(1000):
            read.append(number)
            yield [number]

    results = in_order(squares, batches(), num_processes=2, num_alone=0)
    for number in range(20):
        next(results)
        assert len(read) <= number + 9
    results.close()
    assert len(read) < 40


def test_what_a_process_raises_arrives_and_so_does_its_end() -> None:
    def refuse(batch: list[int]) -> None:
        raise ValueError(f"no {batch}")

    with pytest.raises(ValueError, match=r"no \[0\]"):
        list(in_order(refuse, [[0], [1]], num_processes=2, num_alone=0))
    with pytest.raises(BrokenProcessPool):
        list(in_order(lambda batch: os._exit(9), [[0]], num_processes=2, num_alone=0))


@pytest.mark.parametrize("max_seq_length", ["auto", 40])
def test_several_processes_prepare_the_same_data_set(prepare, monkeypatch, max_seq_length) -> None:
    rows = [
        {"prompt": f"Number {n}?", "completion": f"It is {n}. " + "More. " * (n % 7)}
        for n in range(2100)
    ]
    rows[900] = {"prompt": "", "completion": "x"}
    alone = prepare(rows, max_seq_length=max_seq_length, eval_share=0.1)
    for module in ("rows.intake", "encode", "cut"):
        monkeypatch.setattr(
            importlib.import_module(f"tuneline.prepare.{module}"),
            "in_order",
            functools.partial(parallel.in_order, num_processes=2, num_alone=1),
        )
    shared = prepare(rows, max_seq_length=max_seq_length, eval_share=0.1)
    assert shared.manifest.sha256 == alone.manifest.sha256
    assert shared.manifest.num_rejected_rows == 1
    assert shared.manifest.truncated_token_share == alone.manifest.truncated_token_share
    for name in ("train.parquet", "eval.parquet"):
        assert shared.rows(name) == alone.rows(name)
