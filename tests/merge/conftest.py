"""A data set and an adapter that the train step made on the tiny model."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file, save_file
from small_records import record_again

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


@pytest.fixture
def merge(tmp_path, tiny_model_dir, adapter_dir, small_dataset_dir):
    """Merge with what differs from the usual; returns the proof and the directory."""
    from tuneline.merge import MergeConfig
    from tuneline.merge.run import run

    def call(
        *,
        base_model_dir=tiny_model_dir,
        adapter=adapter_dir,
        dataset_dir=small_dataset_dir,
        as_recorded=False,
        **settings,
    ):
        merged = tmp_path / "out" / "merged"
        for path in () if as_recorded else (base_model_dir, adapter):
            record_again(path)
        proof = run(
            MergeConfig(**{"num_proof_prompts": 8, **settings}),
            base_model_dir=base_model_dir,
            adapter_dir=adapter,
            dataset_dir=dataset_dir,
            merged_dir=merged,
        )
        return proof, merged

    return call


@pytest.fixture
def changed_adapter():
    """Return a function that copies an adapter, changing settings or adding tensors."""

    def change(adapter_dir, path, *, config=None, tensors=None):
        shutil.copytree(adapter_dir, path)
        if config:
            file = path / "adapter_config.json"
            file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
        if tensors:
            file = path / "adapter_model.safetensors"
            save_file({**load_file(file), **tensors}, file)
        return path

    return change
