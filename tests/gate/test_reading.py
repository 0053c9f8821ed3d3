"""Scores that must not be compared: each is refused by name."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gate_scores import Evaluated, accuracies, decide, gate, origin, write_scores

from tuneline.artifacts import read_jsonl, write_jsonl
from tuneline.errors import TaskError, WorldError
from tuneline.record import sha256_of_file


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_scores(tmp_path / "base", "base", {"quiz": accuracies(1, 0.3)})
    write_scores(tmp_path / "tuned", "tuned", {"quiz": accuracies(2, 0.7)})
    return tmp_path


def edited(rows: list[dict]) -> list[dict]:
    return [{**row, "score": 1.0} for row in rows]


def removed(rows: list[dict]) -> list[dict]:
    return [row for row in rows if row["score"] == 1.0]


def doubled(rows: list[dict]) -> list[dict]:
    return rows + rows[:1]


@pytest.mark.parametrize("change", [edited, removed, doubled])
def test_a_changed_file_is_found_by_its_hash(root: Path, change: Callable) -> None:
    path = root / "tuned/samples/quiz.jsonl"
    write_jsonl(path, change(read_jsonl(path)))
    with pytest.raises(WorldError, match=r"tuned/samples/quiz\.jsonl was changed after"):
        gate(root)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (edited, r"the mean of the samples is 1, but its record has 0\.\d+"),
        (removed, r"has 1\d\d samples, but its record has 200"),
        (doubled, "has samples twice: quiz-0"),
        (lambda rows: [{**rows[0], "score": "high"}, *rows[1:]], "a number as its score.*'high'"),
        (lambda rows: [{**rows[0], "weight": 0}, *rows[1:]], "a positive number as its weight"),
        (lambda rows: [{"score": 1.0}, *rows[1:]], "a sample needs an ID"),
        (lambda rows: [{**rows[0], "id": "other"}, *rows[1:]], "in one only: other, quiz-0"),
        (lambda rows: [{**rows[0], "weight": 1.0, "cluster": "x"}, *rows[1:]], "other clusters"),
    ],
)
def test_and_without_its_hash_by_what_the_record_says(
    root: Path, change: Callable, says: str
) -> None:
    path = root / "tuned/samples/quiz.jsonl"
    write_jsonl(path, change(read_jsonl(path)))
    record = json.loads((root / "tuned/scores.json").read_text())
    record["files"]["samples/quiz.jsonl"] = sha256_of_file(path)
    (root / "tuned/scores.json").write_text(json.dumps(record))
    with pytest.raises(TaskError, match=says):
        gate(root)


def test_a_file_that_the_record_does_not_list(root: Path) -> None:
    record = json.loads((root / "tuned/scores.json").read_text())
    (root / "tuned/scores.json").write_text(json.dumps({**record, "files": {}}))
    with pytest.raises(TaskError, match="is not in its record"):
        gate(root)


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"settings": Evaluated(limit=100)}, r"evaluate\.limit None, but the tuned model with 100"),
        ({"settings": Evaluated(num_fewshot=5)}, r"evaluate\.num_fewshot None.* with 5"),
        ({"harness": "lm-eval 9"}, "by test, but the tuned model by lm-eval 9"),
        (
            {"parent": origin("f" * 64, dataset="d" * 64, merged="c" * 64)},
            "from the base_model bbbbbbbbbbbb, but the tuned scores from ffffffffffff",
        ),
        (
            {"parent": origin(dataset="e" * 64, merged="c" * 64)},
            "from the dataset dddddddddddd, but the tuned scores from eeeeeeeeeeee",
        ),
        ({"parent": origin(dataset="d" * 64)}, "tuned_scores does not say from which merged"),
        ({"parent": origin(merged="c" * 64)}, "tuned_scores does not say from which dataset"),
        ({"groups": {"all": ["quiz"]}}, "with the same evaluation config"),
    ],
)
def test_another_evaluation(tmp_path: Path, how: dict, says: str) -> None:
    write_scores(tmp_path / "base", "base", {"quiz": accuracies(1, 0.3)})
    write_scores(tmp_path / "tuned", "tuned", {"quiz": accuracies(2, 0.7)}, **how)
    with pytest.raises(TaskError, match=says):
        gate(tmp_path)


def test_the_speed_of_the_evaluation_may_differ(tmp_path: Path) -> None:
    write_scores(tmp_path / "base", "base", {"quiz": accuracies(1, 0.3)})
    slow = Evaluated(batch_size=1)
    write_scores(tmp_path / "tuned", "tuned", {"quiz": accuracies(2, 0.7)}, settings=slow)
    assert gate(tmp_path).verdict == "promote"


def test_models_that_were_swapped(root: Path) -> None:
    (root / "base").rename(root / "other")
    (root / "tuned").rename(root / "base")
    (root / "other").rename(root / "tuned")
    with pytest.raises(TaskError, match="models 'tuned' and 'base'"):
        gate(root)


@pytest.mark.parametrize(
    ("base", "tuned", "says"),
    [
        ({"quiz": np.ones(30)}, {"quiz": np.ones(31)}, "not evaluated on the same samples"),
        ({"quiz": np.ones(30)}, {"other": np.ones(30)}, "with the same evaluation config"),
        ({"quiz": np.ones(30)}, {"quiz": np.full(30, np.nan)}, "score of a sample is not finite"),
    ],
)
def test_scores_that_cannot_be_compared(tmp_path: Path, base: dict, tuned: dict, says: str) -> None:
    with pytest.raises(TaskError, match=says):
        decide(tmp_path, base, tuned)


def test_scores_of_two_data_sets_are_no_decision(tmp_path: Path) -> None:
    # A record says which ancestor differs, instead of keeping the last one.
    base = origin(dataset="d" * 64)
    with pytest.raises(WorldError, match="two different artifacts called dataset: dddddddddddd"):
        base.write(tmp_path, parents=[base, origin(dataset="e" * 64)])
