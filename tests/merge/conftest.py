"""A data set and an adapter that the train step made on the tiny model."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tuneline.artifacts import (
    EVAL_FILE,
    HELDOUT_FILE,
    TRAIN_FILE,
    DatasetManifest,
    write_jsonl,
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny models run faster on one thread, above all beside other processes."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def small_dataset_dir(
    tmp_path_factory: pytest.TempPathFactory, new_dataset: Callable[..., DatasetManifest]
) -> Path:
    """Twelve rows of tokens, and three held-out texts."""
    path = tmp_path_factory.mktemp("merge") / "dataset"
    path.mkdir()
    rows = [
        {"input_ids": [100 + (n * k) % 40 for k in range(20)], "loss_mask": [0] * 5 + [1] * 15}
        for n in range(1, 13)
    ]
    for name in (TRAIN_FILE, EVAL_FILE):
        pq.write_table(pa.Table.from_pylist(rows), path / name)
    write_jsonl(
        path / HELDOUT_FILE,
        [
            {"prompt": f"How much is {n} Ki?", "answer": f" {n * 1024}", "end": "", "question": ""}
            for n in range(3)
        ],
    )
    new_dataset(num_train_rows=12, num_eval_rows=12, num_heldout_rows=3).write(path)
    return path


@pytest.fixture(scope="session")
def adapter_dir(
    tiny_model_dir: Path, small_dataset_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """An adapter of a few large steps, so that it is far from nothing."""
    from tuneline.train import TrainConfig
    from tuneline.train.run import run

    path = tmp_path_factory.mktemp("merge") / "adapter"
    run(
        TrainConfig(
            learning_rate=2e-2,
            max_steps=6,
            warmup_steps=0,
            global_batch_size=2,
            gradient_checkpointing=False,
            # auto would be bfloat16 on some CPUs, and sums are held against float32 here.
            dtype="float32",
        ),
        base_model_dir=tiny_model_dir,
        dataset_dir=small_dataset_dir,
        adapter_dir=path,
        curves_path=path.parent / "curves.html",
    )
    return path
