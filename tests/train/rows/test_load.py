from pathlib import Path

import pytest

from tuneline.artifacts import TRAIN_FILE, DatasetManifest
from tuneline.errors import DataError
from tuneline.train.rows.load import load_rows


def load(path: Path, tmp_path: Path, *, packing: bool):
    manifest = DatasetManifest.read(path)
    return load_rows(path, manifest, packing=packing, cache_dir=tmp_path / "cache")


def test_labels_are_the_tokens_that_the_mask_counts(dataset_dir, tmp_path):
    path = dataset_dir([{"input_ids": [5, 6, 7, 8], "loss_mask": [0, 0, 1, 1]}])
    train, held = load(path, tmp_path, packing=False)
    assert train[:] == {"input_ids": [[5, 6, 7, 8]], "labels": [[-100, -100, 7, 8]]}
    assert held[:] == train[:]


def test_packing_keeps_every_token_with_its_label_and_its_row(dataset_dir, answer_rows, tmp_path):
    path = dataset_dir(answer_rows, max_seq_length=64)
    packed, _ = load(path, tmp_path, packing=True)
    found = []
    for pack in packed:
        assert sum(pack["seq_lengths"]) == len(pack["input_ids"]) == len(pack["labels"]) <= 64
        start = 0
        for length in pack["seq_lengths"]:
            part = slice(start, start + length)
            found.append((pack["input_ids"][part], pack["labels"][part]))
            start += length
    expected = [
        (
            row["input_ids"],
            [i if m else -100 for i, m in zip(row["input_ids"], row["loss_mask"], strict=True)],
        )
        for row in answer_rows
    ]
    assert sorted(found) == sorted(expected)
    assert len(packed) < len(answer_rows)


def test_raw_text_longer_than_a_pack_is_split_and_nothing_is_lost(dataset_dir, tmp_path):
    long = list(range(200, 371))
    row = {"input_ids": long, "loss_mask": [1] * len(long)}
    path = dataset_dir([row], method="cpt", max_seq_length=50)
    packed, _ = load(path, tmp_path, packing=True)
    assert sorted(token for pack in packed for token in pack["input_ids"]) == long
    assert max(len(pack["input_ids"]) for pack in packed) == 50


def test_without_evaluation_rows_there_are_none(dataset_dir, answer_rows, tmp_path):
    _, held = load(dataset_dir(answer_rows, eval_rows=[]), tmp_path, packing=True)
    assert held is None


def test_a_column_of_another_method_is_named(dataset_dir, answer_rows, tmp_path):
    path = dataset_dir(answer_rows, method="dpo")
    with pytest.raises(DataError, match=r"prompt_ids.*method dpo.*input_ids"):
        load(path, tmp_path, packing=False)


def test_no_rows_file(dataset_dir, answer_rows, tmp_path):
    path = dataset_dir(answer_rows)
    (path / TRAIN_FILE).unlink()
    with pytest.raises(DataError, match=r"train\.parquet has no row"):
        load(path, tmp_path, packing=False)
