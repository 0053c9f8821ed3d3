"""Which files of a directory hold the rows: splits by name, dataset cards, saved folders."""

import json
import os
import re
import threading
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.feather
import pytest
from datasets import Dataset, DatasetDict
from datasets.data_files import DataFilesDict, get_data_patterns

from tuneline.errors import DataError
from tuneline.prepare.sources.kinds import read_rows
from tuneline.prepare.sources.row import Remarks, Selection
from tuneline.prepare.sources.split_names import split_by_name
from tuneline.prepare.sources.stored import StoredFile
from tuneline.runtime.source_names import CLAIMS_VARIABLE


def write(root: Path, *names: str) -> None:
    """Write a file with one row, its own name, for each name."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"text": name}) + "\n", encoding="utf-8")


def read(source: object, **selection: Any) -> list[str]:
    return [
        row.values["text"] for row in read_rows(str(source), Selection(**selection)) if row.values
    ]


def remarks_on(source: object, **selection: Any) -> list[str]:
    remarks = Remarks()
    list(read_rows(str(source), Selection(**selection), remarks))
    return remarks.sentences()


@pytest.mark.parametrize(
    "names",
    [
        ["data/train.jsonl", "data/test.jsonl"],
        ["train.jsonl", "extra.jsonl", "validation.jsonl"],
        [
            "data/train-00000-of-00002.jsonl",
            "data/train-00001-of-00002.jsonl",
            "data/eval_x-00000-of-00001.jsonl",
        ],
        ["train/a.jsonl", "train/b.jsonl", "test/a.jsonl"],
        ["my-train/test.jsonl", "dev/train.jsonl"],
        ["rows-train.jsonl", "rows.dev.jsonl", "rows_test_1.jsonl", "eval2.jsonl"],
        ["training.jsonl", "testing.jsonl", "evaluation.jsonl", "valid.jsonl"],
        ["latest.jsonl", "constraint.jsonl", "trained.jsonl"],
        ["a.jsonl", "b/c.jsonl"],
        ["train 1.jsonl", "TEST.jsonl"],
    ],
)
def test_splits_are_those_of_the_datasets_library(tmp_path: Path, names: list[str]) -> None:
    write(tmp_path, *names)
    theirs = {
        str(split): sorted(Path(path).relative_to(tmp_path).as_posix() for path in paths)
        for split, paths in DataFilesDict.from_patterns(
            get_data_patterns(str(tmp_path)), base_path=str(tmp_path)
        ).items()
    }
    ours, _ = split_by_name(StoredFile(name, name, 1, "", None) for name in sorted(names))
    assert {split: [file.name for file in files] for split, files in ours.items()} == theirs


def test_a_clone_of_a_hub_dataset(tmp_path: Path) -> None:
    write(tmp_path, "data/train.jsonl", "data/test.jsonl", ".git/x.json", "dataset_infos.json")
    (tmp_path / "README.md").write_text("# A dataset\n\nIts text is no row.\n")
    (tmp_path / ".gitattributes").write_text("*.jsonl filter=lfs\n")
    (tmp_path / "LICENSE.txt").write_text("A licence.\n")
    assert read(tmp_path) == ["data/train.jsonl"]
    assert read(tmp_path, split="test") == ["data/test.jsonl"]
    assert remarks_on(tmp_path) == [
        f"{tmp_path}: files of the split test are left out: data/test.jsonl",
        f"{tmp_path}: files of other types are left out: LICENSE.txt",
    ]
    with pytest.raises(DataError, match="no split 'validation'.*test: data/test.jsonl; train: d"):
        read(tmp_path, split="validation")
    with pytest.raises(DataError, match="subset main is set .* which has no subsets"):
        read(tmp_path, subset="main")


CARD = """---
license: mit
configs:
- config_name: easy
  data_files:
  - split: train
    path: easy/part-*.jsonl
  - split: hard
    path: [hard/a.jsonl, "hard/b.jsonl"]
- config_name: all
  data_dir: everything
  default: true
---
# A dataset
"""


def test_the_card_names_subsets_and_splits(tmp_path: Path) -> None:
    write(tmp_path, "easy/part-1.jsonl", "easy/part-2.jsonl", "hard/a.jsonl", "hard/b.jsonl")
    write(tmp_path, "everything/train.jsonl", "everything/dev.jsonl", "test.jsonl")
    (tmp_path / "README.md").write_text(CARD)
    assert read(tmp_path, subset="easy") == ["easy/part-1.jsonl", "easy/part-2.jsonl"]
    assert read(tmp_path, subset="easy", split="hard") == ["hard/a.jsonl", "hard/b.jsonl"]
    assert read(tmp_path) == ["everything/train.jsonl"]
    assert read(tmp_path, split="validation") == ["everything/dev.jsonl"]
    with pytest.raises(
        DataError, match=r"no subset 'none': set prepare\.subset to one of easy, all"
    ):
        read(tmp_path, subset="none")
    (tmp_path / "README.md").write_text(CARD.replace("  default: true\n", ""))
    with pytest.raises(DataError, match="has several subsets: set prepare.subset to one of easy"):
        read(tmp_path)


def test_a_card_from_another_editor(tmp_path: Path) -> None:
    write(tmp_path, "easy/part-1.jsonl", "everything/train.jsonl", "test.jsonl")
    for text in ("\ufeff" + CARD, CARD.replace("\n", "\r\n"), CARD.replace("---\n", "--- \n")):
        (tmp_path / "README.md").write_bytes(text.encode())
        assert read(tmp_path) == ["everything/train.jsonl"]


@pytest.mark.parametrize(
    "data_files", ["7", "{train: 7}", "[{split: train}]", "[a.jsonl, 7]", "2026-01-31"]
)
def test_data_files_that_name_no_files(data_files: str, tmp_path: Path) -> None:
    write(tmp_path, "a.jsonl")
    card = f"---\nconfigs:\n- config_name: all\n  data_files: {data_files}\n---\n"
    (tmp_path / "README.md").write_text(card)
    with pytest.raises(DataError, match="but data_files must be a pattern, a list of patterns"):
        read(tmp_path)


@pytest.mark.parametrize("configs", ["5", "true", "all", "{all: 1}", "[all]"])
def test_configs_that_are_no_list_of_mappings(configs: str, tmp_path: Path) -> None:
    write(tmp_path, "a.jsonl")
    (tmp_path / "README.md").write_text(f"---\nconfigs: {configs}\n---\n")
    assert read(tmp_path) == ["a.jsonl"]


def test_a_card_of_laughs(tmp_path: Path) -> None:
    write(tmp_path, "a.jsonl")
    laughs = "a0: &a0 [x, x, x, x, x, x, x, x]\n" + "".join(
        f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
    )
    (tmp_path / "README.md").write_text(f"---\n{laughs}---\n")
    with pytest.raises(DataError, match=r"the dataset card README.md stands for [\d,]+ values"):
        read(tmp_path)


def test_documents_are_not_split_by_single_names(tmp_path: Path) -> None:
    for name in ("training.md", "test-plan.md", "notes.txt", "README.md"):
        (tmp_path / name).write_text(f"{name}\n")
    assert sorted(read(tmp_path)) == [
        "README.md\n",
        "notes.txt\n",
        "test-plan.md\n",
        "training.md\n",
    ]
    (tmp_path / ".gitattributes").write_text("")
    assert sorted(read(tmp_path)) == ["notes.txt\n", "test-plan.md\n", "training.md\n"]
    (tmp_path / "notes.txt").unlink()
    assert read(tmp_path) == ["training.md\n"]


def test_only_other_splits_are_a_sentence(tmp_path: Path) -> None:
    write(tmp_path, "test.jsonl", "rows.jsonl")
    with pytest.raises(DataError, match="no split 'train'.*test: test.jsonl; no split: rows.jsonl"):
        read(tmp_path)
    assert read(tmp_path, split="test") == ["test.jsonl"]
    assert read(tmp_path, takes_only_split=True) == ["test.jsonl"]
    # A glob that matches one split only names it.
    assert read(tmp_path / "te*.jsonl") == ["test.jsonl"]
    write(tmp_path, "train.jsonl")
    assert read(tmp_path / "*.jsonl") == ["train.jsonl"]
    assert remarks_on(tmp_path / "*.jsonl") == [
        f"{tmp_path}/*.jsonl: files of the split test are left out: test.jsonl",
        f"{tmp_path}/*.jsonl: files of no split are left out: rows.jsonl",
    ]


def test_a_single_file_has_no_splits(tmp_path: Path) -> None:
    write(tmp_path, "rows.jsonl", "test.jsonl")
    assert read(tmp_path / "rows.jsonl", split="train") == ["rows.jsonl"]
    assert read(tmp_path / "test.jsonl", split="test") == ["test.jsonl"]
    assert read(tmp_path / "test.jsonl") == ["test.jsonl"]
    with pytest.raises(
        DataError, match="split test is set for .*rows.jsonl, but a single file has"
    ):
        read(tmp_path / "rows.jsonl", split="test")
    with pytest.raises(DataError, match="revision v1 is set for .*only datasets on the Hub"):
        read(tmp_path / "rows.jsonl", revision="v1")
    with pytest.raises(DataError, match="builtin:kubernetes-quantities has no splits"):
        read("builtin:kubernetes-quantities", split="test")


ROWS = [{"text": f"row {number}"} for number in range(1000)]


def test_folders_that_save_to_disk_wrote(tmp_path: Path) -> None:
    Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "one"), num_shards=3)
    assert read(tmp_path / "one") == [row["text"] for row in ROWS]
    DatasetDict(
        {"train": Dataset.from_list(ROWS), "held": Dataset.from_list([{"text": "held"}])}
    ).save_to_disk(str(tmp_path / "dict"))
    assert read(tmp_path / "dict") == [row["text"] for row in ROWS]
    assert read(tmp_path / "dict", split="held") == ["held"]
    assert remarks_on(tmp_path / "dict") == [
        f"{tmp_path}/dict: files of the split held are left out: held/data-00000-of-00001.arrow"
    ]
    (tmp_path / "one" / "data-00001-of-00003.arrow").unlink()
    with pytest.raises(DataError, match="saved with save_to_disk, but of the 3 files .* 1 are abs"):
        read(tmp_path / "one")


def test_arrow_and_feather_files(tmp_path: Path) -> None:
    table = pyarrow.Table.from_pylist(ROWS)
    pyarrow.feather.write_feather(table, str(tmp_path / "a.feather"))
    with pyarrow.OSFile(str(tmp_path / "b.arrow"), "wb") as file:
        with pyarrow.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    for name in ("a.feather", "b.arrow"):
        assert read(tmp_path / name) == [row["text"] for row in ROWS]
    content = (tmp_path / "b.arrow").read_bytes()
    (tmp_path / "b.arrow").write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match="not a complete Arrow file"):
        read(tmp_path / "b.arrow")


def test_links_within_a_directory_are_followed_once(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    write(folder / "..real", "a.jsonl")
    (folder / "linked").symlink_to("..real")
    (folder / "again").symlink_to(folder)
    (folder / "b.jsonl").symlink_to(folder / "linked" / "a.jsonl")
    # A file that an editor has locked, caches, an environment: nobody reads what is hidden.
    (folder / ".#a.jsonl").symlink_to("someone@host.1234")
    (folder / ".cache").symlink_to(tmp_path)
    write(folder / ".venv" / "bin", "a.jsonl")
    (folder / ".venv" / "bin" / "python").symlink_to("/usr/bin/env")
    (folder / ".venv" / "lib64").symlink_to(tmp_path)
    (folder / ".venv" / "gone").symlink_to("nothing")
    # The directory itself may be a link.
    (tmp_path / "named").symlink_to(folder)
    for name in (folder, tmp_path / "named"):
        assert read(name) == ["a.jsonl", "a.jsonl"]
        assert read(f"{name}/*.jsonl") == ["a.jsonl"]


@pytest.mark.parametrize("name", ["b.jsonl", "sub", "sub/b.jsonl"])
def test_a_link_out_of_a_directory_is_refused(name: str, tmp_path: Path) -> None:
    folder, real = tmp_path / "data", tmp_path / "real"
    write(folder, "a.jsonl")
    write(real, "a.jsonl")
    (folder / name).parent.mkdir(exist_ok=True)
    target = real / "a.jsonl" if name.endswith(".jsonl") else real
    (folder / name).symlink_to(target)
    said = f"{folder / name} is a link that leads out of {folder}, to {target}. Only what is in a"
    with pytest.raises(DataError, match=re.escape(said)):
        read(folder)
    with pytest.raises(DataError, match=r"b?a?\.jsonl is a link that leads out of .*/data, to"):
        read(f"{folder}/**/*.jsonl")
    # A path that is named as a whole may be a link.
    assert read(folder / name) == ["a.jsonl"]


def test_a_link_to_nothing_is_named(tmp_path: Path) -> None:
    write(tmp_path, "a.jsonl")
    (tmp_path / "self.jsonl").symlink_to("self.jsonl")
    with pytest.raises(DataError, match=r"self\.jsonl is a link to self\.jsonl, which does not"):
        read(tmp_path)


def test_a_snapshot_of_the_hubs_cache_links_to_its_blobs(tmp_path: Path) -> None:
    repository = tmp_path / "datasets--a--b"
    snapshot = repository / "snapshots" / ("a" * 40)
    (snapshot / "data").mkdir(parents=True)
    write(repository / "blobs", "a.jsonl")
    (snapshot / "data" / "train.jsonl").symlink_to("../../../blobs/a.jsonl")
    assert read(snapshot) == read(snapshot / "data") == ["a.jsonl"]
    assert read(f"{snapshot}/data/*.jsonl") == ["a.jsonl"]
    write(repository, "key.jsonl")
    (snapshot / "data" / "key.jsonl").symlink_to("../../../key.jsonl")
    with pytest.raises(DataError, match=r"key\.jsonl is a link that leads out of"):
        read(snapshot)


def test_very_many_files(tmp_path: Path) -> None:
    for number in range(3000):
        (tmp_path / f"{number:05}.txt").write_text(f"{number}\n")
    assert read(tmp_path)[:2] == ["0\n", "1\n"]
    write(tmp_path, "train.jsonl")
    assert remarks_on(tmp_path) == [
        f"{tmp_path}: files of other types are left out: 00000.txt, 00001.txt and 2998 more"
    ]


def test_a_file_that_changes_while_it_is_read(tmp_path: Path) -> None:
    write(tmp_path, "a.jsonl")
    rows = read_rows(str(tmp_path / "a.jsonl"))
    next(rows)
    with open(tmp_path / "a.jsonl", "a") as file:
        file.write('{"text": "more"}\n')
    with pytest.raises(DataError, match=r"a.jsonl changed while it was read \(a.jsonl\): wait"):
        list(rows)


def test_a_pipe_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    write(tmp_path, "a.jsonl")
    found: list[str] = []
    reader = threading.Thread(target=lambda: found.extend(read(tmp_path)), daemon=True)
    reader.start()
    reader.join(20)
    assert found == ["a.jsonl"]


def test_a_claim_is_read_where_it_is_mounted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "datasets/support/train.jsonl")
    with pytest.raises(DataError, match="the claim datasets is not mounted here, at /claims/datas"):
        read("claim:datasets/support")
    monkeypatch.setenv(CLAIMS_VARIABLE, str(tmp_path))
    assert read("claim:datasets/support") == ["datasets/support/train.jsonl"]
    with pytest.raises(DataError, match="is not claim:NAME/PATH"):
        read("claim:datasets/../other")
    with pytest.raises(DataError, match="is not claim:NAME/PATH"):
        read("claim:Under_Score/rows.jsonl")
    with pytest.raises(DataError, match="there is no file or directory"):
        read("claim:datasets/none.jsonl")
